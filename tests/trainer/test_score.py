"""Scores: the log-probabilities of the whole forward pass, one document at a time, whatever they are batched with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from sharding.errors import UserError
from tests.golden.goldens import SHIPPED, Golden
from tests.oracle_cases import FAST_COMPILE
from tests.trainer.saved_run import micro, save_run
from trainer import score
from trainer.models import LoadedModel, load_hf, load_run
from trainer.prompts import document
from trainer.score import score_file

# TensorStore reports to an event loop that has ended.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    root = tmp_path_factory.mktemp("run")
    save_run(root, micro())
    return load_run(root)


def run(model: LoadedModel, folder: Path, documents: list[Any]) -> list[dict[str, Any]]:
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in documents))
    target.unlink(missing_ok=True)
    score_file(model, source, target)
    return [json.loads(line) for line in target.read_text().splitlines()]


def alone(model: LoadedModel, batch: dict[str, np.ndarray]) -> np.ndarray:
    """log p(token | those before), [n - 1], by the model's own logits and a softmax over all of them."""

    def logprobs(params: Any, batch: Any) -> jax.Array:
        transformer = model.skeleton.model(params, model.router_bias)
        logits = transformer(batch).hidden_BSD[0] @ transformer.head()
        return jax.nn.log_softmax(logits.astype("float32"))

    found = jax.jit(logprobs, compiler_options=FAST_COMPILE)(model.params, batch)
    tokens = batch["tokens"][0]
    return np.asarray(found)[np.arange(len(tokens) - 1), tokens[1:]]


def row(tokens: list[int]) -> dict[str, np.ndarray]:
    n = len(tokens)
    named = {"tokens": np.array([tokens]), "segment_ids": np.ones((1, n)), "positions": np.arange(n)[None]}
    return {name: array.astype(np.int32) for name, array in named.items()}


def picture(path: Path, width: int, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


def test_every_document_scores_as_it_does_alone(model: LoadedModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(score, "BATCH_TOKENS", 256)
    monkeypatch.setattr(score, "WINDOW", 3)
    rng = np.random.default_rng(0)
    documents: list[Any] = [{"tokens": rng.integers(0, 256, n).tolist()} for n in (1, 90, 40, 90, 1, 40)]
    documents += [{"text": "Grüße, <|patch|> and all.\n", "id": {"any": "json"}}]
    wide, small = picture(tmp_path / "wide.png", 96, 1), picture(tmp_path / "small.png", 40, 2)
    image = {"type": "image", "path": wide}
    documents += [{"parts": [{"type": "text", "text": "before "}, image, {"type": "image", "path": small}]}]
    results = run(model, tmp_path, documents)
    assert [result["id"] for result in results] == [1, 2, 3, 4, 5, 6, {"any": "json"}, 8]
    assert model.tokenizer
    never = {model.tokenizer.special[name] for name in score.IMAGE_TOKENS}
    for given, result in zip(documents, results, strict=True):
        tokens = result["tokens"]
        assert tokens == given.get("tokens", tokens)
        batch = row(tokens)
        if "parts" in given:
            prompt = document(model, ["before ", tmp_path / wide, tmp_path / small])
            assert prompt.tiles is not None and prompt.image_positions is not None
            assert tokens == prompt.tokens.tolist()
            assert len(prompt.tiles) == 3 + 1
            batch |= {"image_tiles": prompt.tiles[None], "image_positions": prompt.image_positions[None]}
        assert result["logprobs"][0] is None
        expected = alone(model, batch)
        for token, found, value in zip(tokens[1:], result["logprobs"][1:], expected, strict=True):
            assert (found is None) == (token in never)
            if found is not None:
                assert found == pytest.approx(value, abs=2e-5)
        counted = [value for value in result["logprobs"] if value is not None]
        assert result["count"] == len(counted)
        assert result["logprob"] == pytest.approx(sum(counted))
    assert results[-1]["count"] == len(b"before ")  # image tokens are never predicted


@pytest.mark.parametrize("name", ["text_scout", "text_maverick", "text_interleaved"])
def test_scores_are_those_of_hugging_face(name: str, tmp_path: Path) -> None:
    directory = next(path for path in SHIPPED if path.name == name)
    golden = Golden(directory / "reference.npz")
    results = run(load_hf(directory), tmp_path, [{"tokens": ids.tolist()} for ids in golden.answers["input_ids"]])
    for result, nll, labels in zip(results, golden.answers["nll"], golden.answers["labels"], strict=True):
        counted = labels[1:] != -100
        found = -np.array(result["logprobs"][1:])[counted]
        np.testing.assert_allclose(found, nll[counted], rtol=1e-5, atol=1e-4)


def test_an_interrupted_start_goes_on_and_gives_the_same_file(model: LoadedModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(score, "WINDOW", 2)
    documents = [{"tokens": list(range(n, 2 * n))} for n in range(2, 9)]
    expected = run(model, tmp_path, documents)
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()

    scored: list[int] = []
    real = score._Scorer.__call__

    def count_and_stop(self, prompts):
        scored.append(len(prompts))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return real(self, prompts)

    monkeypatch.setattr(score._Scorer, "__call__", count_and_stop)
    with pytest.raises(KeyboardInterrupt):
        score_file(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with (tmp_path / ".out.jsonl.partial").open("a") as partial:
        partial.write('{"id": 5, "toke')  # killed while it wrote
    score_file(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert scored == [2, 2, 2, 2, 1]
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert len(expected) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_another_input_left_is_not_taken(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / ".out.jsonl.partial").write_text('{"input": "another", "model": "x"}\n{"count": 9, "logprob": 1}\n')
    assert len(run(model, tmp_path, [{"tokens": [1, 2]}])) == 1


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_document(model: LoadedModel, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"tokens": [1, 2]}\r\n\r\n{"text": "a"}\r\n')
    assert score_file(model, source, tmp_path / "out.jsonl").documents == 2


def test_a_model_that_is_not_a_number_gives_no_file_of_them(model: LoadedModel, tmp_path: Path) -> None:
    broken = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf * np.nan, model.params))
    with pytest.raises(UserError, match=r"in.jsonl, line 1: .* not finite"):
        run(broken, tmp_path, [{"tokens": [1, 2, 3]}])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("line", "told"), [
    ("{", "line 2: found no JSON"),
    ("[1]", "line 2: found a list, expected an object with one of"),
    ("{}", "line 2: found the fields []"),
    ('{"text": "a", "tokens": [1]}', "expected an object with one of"),
    ('{"text": "a", "txet": 1}', "txet"),
    ('{"text": 3}', "text: found int, expected a string"),
    ('{"tokens": []}', "tokens: expected a list of whole numbers from 0 to 319"),
    ('{"tokens": [320]}', "tokens: expected a list of whole numbers from 0 to 319"),
    ('{"tokens": [true]}', "tokens: expected a list of whole numbers"),
    ('{"parts": {}}', "parts: found dict, expected a list"),
    ('{"parts": [{"type": "video", "path": "a"}]}', 'parts[0]: found {"type": "video"'),
    ('{"parts": [{"type": "image", "path": "no.png"}]}', "parts[0]: there is no image file"),
    ('{"messages": []}', "messages: expected a list of messages"),
    ('{"messages": [{"content": "hi"}]}', "messages[0]: expected"),
])  # fmt: skip
def test_a_line_that_is_no_document_is_named_before_anything_is_scored(
    model: LoadedModel, tmp_path: Path, line: str, told: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"tokens": [1, 2]}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        score_file(model, source, tmp_path / "out.jsonl")
    assert told in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_text_and_images_need_what_the_model_lacks(tmp_path: Path) -> None:
    bare = load_hf(next(path for path in SHIPPED if path.name == "text_scout"))
    for record, told in (({"text": "a"}, "has no tokenizer.json"), ({"messages": [{"role": "user"}]}, "tokenizer")):
        with pytest.raises(UserError, match=told):
            run(bare, tmp_path, [record])
