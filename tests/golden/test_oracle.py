"""The float64 oracle of `tests/oracle.py` gives the answers of Hugging Face's Llama 4."""

import numpy as np

from tests import oracle
from tests.golden.goldens import Golden
from trainer.hf.table import to_hf

TOLERANCE = 5e-5
"""The stored answers are float32; the noise that was measured in them is 2e-5."""


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=TOLERANCE)


def test_every_stage_of_the_oracle_is_that_of_hugging_face(golden: Golden) -> None:
    answers, params, first_tile = golden.answers, oracle.as_float64(golden.params), 0
    for row, where, document in oracle.documents(golden.batch):
        stages = oracle.forward(params, document, golden.config)
        close(stages.logits, answers["logits"][row, where])
        for i, hidden in enumerate(stages.hidden):
            name = f"hidden/{i - 1}" if i else "hidden/embed"
            if name in answers:
                close(hidden, answers[name][row, where])
        for i, logits in stages.router_logits.items():
            if f"router_logits/{i}" in answers:
                expected = answers[f"router_logits/{i}"].reshape(*golden.real_BS.shape, -1)
                close(logits, expected[row, where])
        if len(document.tiles):
            tiles = slice(first_tile, first_tile + len(document.tiles))
            first_tile = tiles.stop
            for name, value in stages.vision.items():
                if f"vision/{name}" in answers:
                    expected = answers[f"vision/{name}"]
                    close(value, expected.reshape(-1, *value.shape[1:])[tiles])


def test_loss_and_gradients_of_the_oracle_are_those_of_hugging_face(golden: Golden) -> None:
    loss, _, gradient = oracle.objective_and_gradient(golden.params, golden.batch, golden.config, 0.0, 0.0)
    np.testing.assert_allclose(loss, golden.answers["loss_f64"], rtol=0, atol=1e-6)
    theirs = to_hf(gradient, golden.config)
    for name, expected in golden.answers.items():
        if name.startswith("grad/"):
            of_max = 2e-5 * np.abs(expected).max()
            np.testing.assert_allclose(theirs[name[5:]], expected, rtol=2e-5, atol=of_max, err_msg=name)
    norms = [np.linalg.norm(theirs[name]) for name in golden.answers["gradnorm_names"].tolist()]
    np.testing.assert_allclose(norms, golden.answers["gradnorm"], rtol=2e-5, atol=1e-8)
