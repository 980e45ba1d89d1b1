"""The shipped model, objective and optimizer give the answers of Hugging Face's Llama 4, in float32.

Tolerances are those of `README.md`: far above the noise of float32, far below what any mistake costs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.vocab_loss import token_losses
from tests.golden.goldens import Golden
from trainer import optimizer
from trainer.config import ObjectiveConfig, OptimizerConfig, RunConfig
from trainer.hf.table import to_hf
from trainer.objective import next_token_objective
from trainer.step import Skeleton, TrainState, loss_and_gradient, make_train_step

LOGITS = 1e-4
LOSS = 5e-6
GRADIENT_RELATIVE = 1e-3
GRADIENT_OF_MAX = 1e-4
TRAJECTORY = 1e-4

OBJECTIVE = next_token_objective(ObjectiveConfig(load_balance_coef=0.0, router_z_coef=0.0), num_sources=1)


@functools.cache
def ours(golden: Golden) -> dict[str, Any]:
    """Everything that is compared, computed once."""
    skeleton = Skeleton(golden.config)

    @jax.jit
    def run(params: Any, batch: Any) -> dict[str, Any]:
        model = skeleton.model(params, {})
        output = model(batch, capture=True)
        targets_T = batch["targets"].reshape(-1)
        hidden_TD = output.hidden_BSD.reshape(len(targets_T), -1)
        nll_T: Any = token_losses(hidden_TD, model.head(), targets_T, 64)
        loss, _, gradient = loss_and_gradient(skeleton, OBJECTIVE, params, {}, batch, 1)
        result = {
            "logits": output.hidden_BSD @ model.head(),
            "nll": nll_T.reshape(batch["targets"].shape) * batch["loss_weights"],
            "loss": loss,
            "gradient": gradient,
            "embedded": output.embedded_BSD,
            "layers": output.layers_LBSD,
            "router_logits": output.router.logits_TE if output.router else None,
        }
        if "image_tiles" in batch:
            result["projected"] = model.encode_images(batch)
            tiles = batch["image_tiles"]
            result |= model.vision(tiles.reshape(-1, *tiles.shape[2:]))[1]
        return result

    with jax.default_matmul_precision("highest"):
        result = jax.device_get(run(golden.params, golden.batch))
    result["gradient"] = to_hf(result["gradient"], golden.config)
    return result


def compare(found: Any, expected: np.ndarray, tolerance: float = LOGITS) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance)


def test_logits_are_those_of_hugging_face(golden: Golden) -> None:
    mask = golden.real_BS
    compare(ours(golden)["logits"][mask], golden.answers["logits"][mask])


def test_by_default_the_documents_that_begin_their_row_have_the_same_logits(by_row_golden: Golden) -> None:
    """The default counts each document's temperature from its own start; the first one cannot tell, the others can."""
    golden, skeleton = by_row_golden, Skeleton(by_row_golden.default_config)

    @jax.jit
    def run(params: Any, batch: Any) -> jax.Array:
        model = skeleton.model(params, {})
        return model(batch).hidden_BSD @ model.head()

    with jax.default_matmul_precision("highest"):
        logits = np.asarray(run(golden.params, golden.batch))
    same = golden.real_BS & ~golden.by_row_BS
    compare(logits[same], golden.answers["logits"][same])
    assert np.abs(logits - golden.answers["logits"])[golden.by_row_BS].max() > 100 * LOGITS


def test_hidden_states_are_those_of_hugging_face_after_every_layer(golden: Golden) -> None:
    mask = golden.real_BS
    names = ["hidden/embed", *(f"hidden/{i}" for i in range(golden.config.num_layers))]
    hidden_states = [ours(golden)["embedded"], *ours(golden)["layers"]]
    stored = [(name, hidden) for name, hidden in zip(names, hidden_states, strict=True) if name in golden.answers]
    if not stored:
        pytest.skip("no hidden states in this file")
    for name, hidden in stored:
        compare(hidden[mask], golden.answers[name][mask])


def test_router_logits_are_those_of_hugging_face(golden: Golden) -> None:
    mask = golden.real_BS.reshape(-1)
    layers = [i for i, kind in enumerate(golden.config.layer_kinds()) if kind.moe]
    assert sum(name.startswith("router_logits/") for name in golden.answers) in (0, len(layers))
    for i, logits_TE in zip(layers, ours(golden)["router_logits"] if layers else (), strict=True):
        if f"router_logits/{i}" in golden.answers:
            compare(logits_TE[mask], golden.answers[f"router_logits/{i}"][mask])


def test_losses_are_those_of_hugging_face_token_by_token(golden: Golden) -> None:
    compare(ours(golden)["nll"][:, :-1], golden.answers["nll"])


def test_the_loss_is_that_of_hugging_face(golden: Golden) -> None:
    compare(ours(golden)["loss"], golden.answers["loss_f64"], LOSS)


def test_gradients_are_those_of_hugging_face(golden: Golden) -> None:
    gradient = ours(golden)["gradient"]
    for name, expected in golden.answers.items():
        if name.startswith("grad/"):
            of_max = GRADIENT_OF_MAX * np.abs(expected).max()
            found = gradient[name.removeprefix("grad/")]
            np.testing.assert_allclose(found, expected, rtol=GRADIENT_RELATIVE, atol=of_max, err_msg=name)


def test_the_norm_of_every_gradient_is_that_of_hugging_face(golden: Golden) -> None:
    gradient = ours(golden)["gradient"]
    stored = dict(zip(golden.answers["gradnorm_names"].tolist(), golden.answers["gradnorm"], strict=True))
    assert gradient.keys() == stored.keys()
    found = {name: np.linalg.norm(value.astype(np.float64)) for name, value in gradient.items()}
    total = float(golden.answers["grad_global_norm"])
    for name, expected in stored.items():
        np.testing.assert_allclose(found[name], expected, rtol=GRADIENT_RELATIVE, atol=1e-7 * total, err_msg=name)
    np.testing.assert_allclose(np.linalg.norm(list(found.values())), total, rtol=GRADIENT_RELATIVE)


def test_every_stage_of_the_vision_encoder_is_that_of_hugging_face(vision_golden: Golden) -> None:
    golden, found = vision_golden, ours(vision_golden)
    used = (golden.batch["image_positions"] >= 0).any(axis=2).reshape(-1)
    for name in ("encoder_out", "adapter_out"):
        if f"vision/{name}" in golden.answers:
            compare(found[name][used], golden.answers[f"vision/{name}"])
    projected = golden.answers["vision/projected"]
    compare(found["projected"].reshape(len(used), -1)[used].reshape(projected.shape), projected)


def test_adamw_takes_the_steps_of_torch(trajectory_golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    golden, stored = trajectory_golden, trajectory_golden.trajectory
    monkeypatch.setattr(optimizer, "NOT_DECAYED", ())  # torch was told to decay everything
    run = RunConfig(
        steps=len(stored["losses"]),
        model=golden.config,
        optimizer=OptimizerConfig(
            peak_lr=float(stored["lr"]),
            schedule="constant",
            warmup_steps=0,
            beta1=float(stored["betas"][0]),
            beta2=float(stored["betas"][1]),
            eps=float(stored["eps"]),
            weight_decay=float(stored["weight_decay"]),
            clip_norm=0.0,
        ),
    )
    step = jax.jit(make_train_step(run, Skeleton(golden.config), OBJECTIVE))
    params = jax.tree.map(jnp.asarray, golden.params)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, {}, optimizer.adamw(run.optimizer).init(params), zero, zero)
    losses, norms = [], []
    with jax.default_matmul_precision("highest"):
        for _ in stored["losses"]:
            state, sums = step(state, golden.batch)
            losses.append(float(sums["loss"]))
            norms.append(float(sums["grad_norm"]))
    np.testing.assert_allclose(losses, stored["losses"], rtol=0, atol=TRAJECTORY)
    np.testing.assert_allclose(norms, stored["grad_norms"], rtol=GRADIENT_RELATIVE)
