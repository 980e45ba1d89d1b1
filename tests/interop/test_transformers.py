"""An exported directory opens in Hugging Face transformers and is the same model: logits, tokens, pixels, generation.

Runs where DROVER_TRANSFORMERS_PYTHON names a Python that has torch, torchvision and transformers, such as one made by

    python -m venv hf && hf/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==5.23.0

That Python runs `check_transformers.py`, which imports nothing of Drover's; arrays travel in files.
Letters: B rows, S sequence, V vocabulary, M tiles.
"""

import dataclasses
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.tokenizer import load_bpe
from model.config import ModelConfig, RopeScaling, VisionConfig
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, RunConfig
from trainer.decode import Decoder, Prompt, rows_of
from trainer.hf.exporter import export_checkpoint
from trainer.models import LoadedModel
from trainer.prompts import conversation, document
from trainer.rundir import RunDirectory
from trainer.sections import to_plain
from trainer.step import Params, Skeleton, TrainState

PYTHON = os.environ.get("DROVER_TRANSFORMERS_PYTHON")
SCRIPT = Path(__file__).with_name("check_transformers.py")

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="DROVER_TRANSFORMERS_PYTHON does not name a Python with torch, torchvision and transformers"
)

LOGITS = 1e-4
"""As between the model and the stored answers of transformers, see tests/golden/README.md."""
PIXELS = 2 / 255 + 2**-8 + 2**-9
"""One step of a byte, for two ways to interpolate; its processor computes x / 255 and 2 x - 1 in bfloat16, and rounds."""
NEW_TOKENS = 24

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Naïve café — 東京,\n\n\ttabs and  spaces ; def f(x):\n    return x ** 2 # 1234567",
    "I'll say it's 3.14, isn't it ?",
)

TEXT = ModelConfig(
    vocab_size=320,
    hidden_size=48,
    num_layers=8,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    dense_ffn_size=64,
    expert_ffn_size=24,
    num_experts=8,
    experts_per_token=2,
    moe_layer_step=2,
    chunk_size=16,
    rope_theta=10000.0,
    rope_scaling=RopeScaling(original_length=64),
    temperature_floor=8.0,
    tie_embeddings=True,
    init_std=0.0,
)
MULTIMODAL = dataclasses.replace(
    TEXT,
    num_layers=4,
    num_experts=4,
    experts_per_token=1,
    moe_layer_step=1,
    rope_scaling=None,
    tie_embeddings=False,
    vision=VisionConfig(
        image_size=48, patch_size=12, hidden_size=32, num_layers=2, num_heads=2, ffn_size=128, adapter_size=40
    ),
)
CASES = {"text": (TEXT, "bfloat16"), "multimodal": (MULTIMODAL, None)}
"""Model, and the precision to export."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of ours, and what transformers says of its export."""

    model: LoadedModel
    images: dict[str, Path]
    directory: Path

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """Documents that are run by both."""
        if self.model.run.model.vision is None:
            ids = np.random.default_rng(5).integers(0, 300, (2, 61), np.int32)
            return [Prompt(row) for row in ids]
        wide, small = self.images["wide"], self.images["small"]
        return [
            document(self.model, [wide, "\nwhat is this, and where?"]),
            document(self.model, ["first ", small, "then ", wide, "and ", small, "which is larger?"]),
        ]

    @functools.cached_property
    def chats(self) -> list[list[tuple[str, list[Any]]]]:
        """Turns of conversations, with images as files."""
        wide, small = self.images["wide"], self.images["small"]
        return [
            [("user", ["  hello "])],
            [
                ("system", ["Be brief."]),
                ("user", [wide, "and this", small, " what is it?\n"]),
                ("assistant", ["a fox"]),
                ("user", ["why?"]),
            ],
        ]

    @functools.cached_property
    def answers(self) -> dict[str, np.ndarray]:
        """Of transformers; runs it."""
        questions: dict[str, Any] = {f"text/{i}": text for i, text in enumerate(TEXTS)}
        for i, prompt in enumerate(self.prompts):
            inputs = {"input_ids": prompt.tokens[None].astype(np.int64)}
            if prompt.tiles is not None:
                inputs["pixel_values"] = normalised(prompt.tiles)
            questions |= {f"forward/{i}/{name}": array for name, array in inputs.items()}
            questions |= {f"generate/{i}/{name}": array for name, array in inputs.items()}
            questions[f"generate/{i}/new_tokens"] = NEW_TOKENS
        if self.model.run.model.vision:
            wide, small = (np.asarray(Image.open(self.images[name])) for name in ("wide", "small"))
            questions |= {"prompt/0/text": "<|image|>\nwhat is this, and where?", "prompt/0/image/0": wide}
            questions["prompt/1/text"] = "first <|image|>then <|image|>and <|image|>which is larger?"
            questions |= {f"prompt/1/image/{i}": image for i, image in enumerate((small, wide, small))}
            for i, turns in enumerate(self.chats):
                questions[f"chat/{i}/messages"] = json.dumps([as_message(*turn) for turn in turns])
                files = [part for _, parts in turns for part in parts if isinstance(part, Path)]
                questions |= {f"chat/{i}/image/{j}": np.asarray(Image.open(file)) for j, file in enumerate(files)}
        asked, answered = self.directory.with_suffix(".questions.npz"), self.directory.with_suffix(".answers.npz")
        np.savez(asked, **questions)
        command = [str(PYTHON), str(SCRIPT), str(self.directory), str(asked), str(answered)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        child = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert child.returncode == 0, child.stderr[-4000:]
        with np.load(answered) as file:
            return dict(file)

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        return json.loads(str(self.answers["report"]))


def as_message(role: str, parts: list[Any]) -> dict[str, Any]:
    """A turn as transformers takes it; images are put in later."""
    content = [{"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def normalised(tiles: np.ndarray) -> np.ndarray:
    """uint8 [M, side, side, 3] as pixel values, float32 [M, 3, side, side]."""
    return (tiles.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)


def make_weights(skeleton: Skeleton, seed: int) -> Params:
    """Random weights, of norms and biases too: at one and zero they would hide what is done with them."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name, noise = str(path[-1].key), rng.normal(size=leaf.shape).astype(np.float32)
        if name == "scale" or name.endswith("norm"):
            return 1 + 0.2 * noise
        return noise if name.endswith("embed") else 0.15 * noise

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, skeleton.abstract_params))


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model with random weights, saved as a checkpoint and exported."""
    config, dtype = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = load_bpe([text * 20 for text in TEXTS], 300, folder)
    data = DataConfig(mixture={"text": 1.0}, tokenizer_size=300, max_tiles=4)
    run = RunConfig(name=request.param, model=config, data=data)
    skeleton = Skeleton(config)
    params, none = make_weights(skeleton, run.seed), jnp.zeros((), jnp.int32)
    directory = RunDirectory(folder / "run")
    directory.create()
    directory.save(run, tokenizer)
    checkpoints = Checkpoints(directory.checkpoints, CheckpointConfig())
    checkpoints.save(
        TrainState(none, params, {}, {}, none, none),
        {"config": to_plain(run), "next_batch": 0, "data_digest": "", "tokenizer_digest": tokenizer.digest},
    )
    checkpoints.wait()
    checkpoints.close()
    told: list[str] = []
    export_checkpoint(directory.root, folder / "exported", dtype, 60_000, told.append)
    assert not told
    if dtype:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(leaf.dtype), params)
    images = {}
    for name, shape in (("wide", (50, 100, 3)), ("small", (40, 31, 3))):
        images[name] = folder / f"{name}.png"
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, shape, np.uint8)).save(images[name])
    model = LoadedModel(run, tokenizer, skeleton, params, {}, request.param)
    return Case(model, images, folder / "exported")


def test_the_directory_opens_without_a_word(case: Case) -> None:
    images = case.model.run.model.vision is not None
    assert case.report["model"] == ("Llama4ForConditionalGeneration" if images else "Llama4ForCausalLM")
    assert case.report["processor"] == ("Llama4Processor" if images else None)
    assert case.report["loading"] == {kind: [] for kind in case.report["loading"]}
    # Scout's own factors, 1 and 1, which transformers 5 remarks on.
    assert [text for text in case.report["warnings"] if "high_freq_factor" not in text] == []
    assert case.report["dtype"] == f"torch.{CASES[case.model.run.name][1] or 'float32'}"


def test_the_weights_are_in_several_files_where_one_would_be_too_large(case: Case) -> None:
    assert len(list(case.directory.glob("model-*.safetensors"))) > 5


def test_logits_are_those_of_transformers(case: Case) -> None:
    model, top_k = case.model, case.model.run.model.experts_per_token

    @jax.jit
    def run(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        transformer = model.skeleton.model(model.params, {})
        output = transformer(batch, capture=True)
        assert output.router and output.router.logits_TE is not None
        return output.hidden_BSD @ transformer.head(), output.router.logits_TE

    batch = rows_of(case.prompts)
    with jax.default_matmul_precision("highest"):
        logits_BSV, router_logits = run(jax.tree.map(jnp.asarray, batch))
    real_BS = batch["segment_ids"] > 0
    ranked = np.sort(router_logits, axis=-1).reshape(-1, *real_BS.shape, model.run.model.num_experts)[:, real_BS]
    assert (ranked[..., -top_k] - ranked[..., -top_k - 1]).min() > 1e-4, "rounding could choose another expert"
    for i, logits_SV in enumerate(logits_BSV):
        theirs = case.answers[f"forward/{i}/logits"][0]
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(logits_SV[: len(theirs)], theirs, rtol=1e-5, atol=LOGITS)


def test_greedy_generation_with_its_cache_gives_our_tokens(case: Case) -> None:
    # More than one chunk is begun on the way, so layers that forget have something to forget.
    assert case.model.run.model.chunk_size < NEW_TOKENS
    decoder = Decoder(case.model.skeleton, case.model.params, {})
    ours = np.stack(list(decoder.stream(case.prompts, NEW_TOKENS)), axis=1)
    for i, tokens in enumerate(ours):
        np.testing.assert_array_equal(tokens, case.answers[f"generate/{i}/tokens"])


def test_the_tokenizer_gives_our_ids_and_the_text_back(case: Case) -> None:
    tokenizer = case.model.need_tokenizer()
    for i, text in enumerate(TEXTS):
        ours = [tokenizer.special["<|begin_of_text|>"], *tokenizer.encode(text)]
        assert case.answers[f"text/{i}/ids"].tolist() == ours
        assert str(case.answers[f"text/{i}/decoded"]) == text == tokenizer.decode(ours)


@pytest.mark.parametrize("case", ["multimodal"], indirect=True)
def test_the_processor_gives_our_tokens_and_pixels(case: Case) -> None:
    for i, prompt in enumerate(case.prompts):
        assert prompt.tiles is not None
        assert case.answers[f"prompt/{i}/input_ids"].tolist() == [prompt.tokens.tolist()]
        pixels = case.answers[f"prompt/{i}/pixel_values"]
        assert pixels.shape == normalised(prompt.tiles).shape
        np.testing.assert_allclose(pixels, normalised(prompt.tiles), rtol=0, atol=PIXELS)


@pytest.mark.parametrize("case", ["multimodal"], indirect=True)
def test_the_chat_template_gives_our_tokens(case: Case) -> None:
    for i, turns in enumerate(case.chats):
        ours = conversation(case.model, turns, ask=True)
        assert case.answers[f"chat/{i}/input_ids"].tolist() == [ours.tokens.tolist()]
