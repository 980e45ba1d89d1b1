"""A student that begins as some super-blocks of a deeper model: which ones, with what weights, and what is refused."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.config import DataConfig
from model.config import ModelConfig
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from tests import oracle
from tests.oracle_cases import (
    AUDIO,
    FAST_COMPILE,
    TINY,
    VISION,
    bias_of_layers,
    random_batch,
    random_bias,
    random_params,
)
from tests.trainer.saved_run import micro, save_run
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, InitConfig, RunConfig
from trainer.hf.exporter import export_checkpoint
from trainer.initialise import initialise
from trainer.models import load_hf
from trainer.pruning import evenly_spaced, kept_blocks
from trainer.sections import from_plain, to_plain
from trainer.step import Skeleton, TrainState

# TensorStore reports to an event loop that has ended.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

BLOCK = {"moe_layer_step": 2, "nope_layer_step": 2}
DEEP = dataclasses.replace(TINY, num_layers=10, vision=VISION, router_bias_rate=0.1, **BLOCK)
"""Five super-blocks of two layers."""
SHALLOW = dataclasses.replace(DEEP, num_layers=6)
DATA = {"data_digest": "abc", "source_digests": {}}


def saved(root: Path, model: ModelConfig = DEEP, **biases: Any) -> TrainState:
    """Random weights and router biases of a model, in a run directory."""
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, random_params(model, 1), biases.get("bias", random_bias(model, 2)), {}, zero, zero)
    metadata = DATA | {
        "config": to_plain(RunConfig(model=model, data=DataConfig(tokenizer="bytes"))),
        "tokenizer_digest": "xyz",
    }
    checkpoints = Checkpoints(root / "checkpoints", CheckpointConfig())
    checkpoints.save(state, metadata)
    checkpoints.wait()
    checkpoints.close()
    return state


def pruned(
    root: Path, model: ModelConfig, mesh: DeviceMesh | None = None, tokenizer: str = "xyz", **init: Any
) -> tuple[TrainState, str]:
    """The state of a run on `model` that begins with super-blocks of another one."""
    options = InitConfig(**{"from_run": str(root), "layers": "pruned", **init})
    run = RunConfig(model=model, data=DataConfig(batch_size=8), init=options)
    return initialise(run, Skeleton(model, mesh), Checkpoints(root / "nothing"), DATA, tokenizer)


def logits(model: ModelConfig, params: Any, bias: Any, batch: Any) -> np.ndarray:
    """Of every token, in float64."""
    wide = dataclasses.replace(model, dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        skeleton, params, bias = Skeleton(wide), oracle.as_float64(params), oracle.as_float64(bias)

        def run(params: Any, bias: Any, batch: Any) -> jax.Array:
            built = skeleton.model(params, bias)
            return built.logits(built(batch).hidden_BSD)

        return np.asarray(jax.jit(run, compiler_options=FAST_COMPILE)(params, bias, batch))


def test_with_all_super_blocks_kept_the_logits_are_the_teachers(tmp_path: Path) -> None:
    teacher = saved(tmp_path)
    student, line = pruned(tmp_path, DEEP)
    assert line == f"weights of {tmp_path}, step 0; super-blocks 0, 1, 2, 3, 4 of 0 to 4"
    batch = random_batch(DEEP, 3)
    found, expected = (logits(DEEP, s.params, s.router_bias, batch) for s in (student, teacher))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("keep", "kept"), [((), (0, 2, 4)), ((1, 2, 4), (1, 2, 4))])
def test_with_some_kept_the_logits_are_those_of_these_layers_one_after_the_other(
    keep: tuple[int, ...], kept: tuple[int, ...], tmp_path: Path
) -> None:
    teacher = saved(tmp_path)
    student, line = pruned(tmp_path, SHALLOW, keep=keep)
    assert line.endswith(f"super-blocks {kept[0]}, {kept[1]}, {kept[2]} of 0 to 4")

    layers = [oracle.layer_of(teacher.params["blocks"], i, 2) for block in kept for i in (2 * block, 2 * block + 1)]
    of_teacher = bias_of_layers(DEEP, teacher.router_bias) or {}
    biases = {place: of_teacher[2 * block + 1] for place, block in zip((1, 3, 5), kept, strict=True)}
    stacked = {j: jax.tree.map(lambda *leaves: np.stack(leaves), *layers[j::2]) for j in (0, 1)}
    batch = random_batch(SHALLOW, 3)
    found = logits(SHALLOW, student.params, student.router_bias, batch)
    for row, where, document in oracle.documents(batch):
        params = oracle.as_float64({**teacher.params, "blocks": stacked})
        expected = oracle.forward(params, document, SHALLOW, biases).logits
        np.testing.assert_allclose(found[row, where], expected, rtol=1e-9, atol=1e-9)
    for place in (0, 1):
        jax.tree.map(np.testing.assert_array_equal, student.params["blocks"][place], stacked[place])


def test_router_biases_start_from_zero_where_the_source_has_none(tmp_path: Path) -> None:
    saved(tmp_path, dataclasses.replace(DEEP, router_bias_rate=0.0), bias={})
    student, line = pruned(tmp_path, SHALLOW)
    assert line.endswith("of 0 to 4; router biases from zero")
    assert [leaf.shape for leaf in jax.tree.leaves(student.router_bias)] == [(3, 4)]
    assert not any(leaf.any() for leaf in jax.tree.leaves(student.router_bias))


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 2}, {"stage": 3, "data": 2}])
def test_a_mesh_begins_with_the_same_weights_in_its_own_places(sizes: dict[str, int], tmp_path: Path) -> None:
    """Five super-blocks are not split over three stages; what is left of them is."""
    saved(tmp_path)
    mesh = DeviceMesh.of(jax.devices()[: int(np.prod(list(sizes.values())))], sizes)
    alone, split = pruned(tmp_path, SHALLOW)[0], pruned(tmp_path, SHALLOW, mesh)[0]
    jax.tree.map(np.testing.assert_array_equal, split.params, alone.params)
    jax.tree.map(np.testing.assert_array_equal, split.router_bias, alone.router_bias)
    wanted = Skeleton(SHALLOW, mesh).shardings
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, where: leaf.sharding == where, split.params, wanted)))


def test_a_hugging_face_directory_is_pruned_as_a_run_is(tmp_path: Path) -> None:
    deep = micro(num_layers=8)
    save_run(tmp_path / "run", deep)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", None, 10**9, lambda _: None)
    tokenizer = load_hf(tmp_path / "hf").need_tokenizer().digest
    model, keep = dataclasses.replace(deep.model, num_layers=4), (1, 3)
    from_hf, line = pruned(
        tmp_path, model, tokenizer=tokenizer, from_run="", pretrained=str(tmp_path / "hf"), keep=keep
    )
    assert line == f"pretrained weights of {tmp_path / 'hf'}; super-blocks 1, 3 of 0 to 3"
    from_run, _ = pruned(tmp_path, model, tokenizer=tokenizer, from_run=str(tmp_path / "run"), keep=keep)
    jax.tree.map(np.testing.assert_array_equal, from_hf.params, from_run.params)


def test_super_blocks_are_evenly_spaced_with_the_first_and_the_last() -> None:
    assert [evenly_spaced(2, 9), evenly_spaced(5, 9), evenly_spaced(3, 6), evenly_spaced(1, 1)] == [
        (0, 8),
        (0, 2, 4, 6, 8),
        (0, 3, 5),
        (0,),
    ]
    for total in range(2, 14):
        for count in range(2, total + 1):
            blocks = evenly_spaced(count, total)
            exact = np.linspace(0, total - 1, count)
            assert len(set(blocks)) == count and np.abs(np.subtract(blocks, exact)).max() <= 0.5


@pytest.mark.parametrize(("change", "keep", "words"), [
    ({"hidden_size": 14}, (), "model.hidden_size: found 14, expected 12"),
    ({"num_experts": 2}, (), "model.num_experts: found 2, expected 4"),
    ({"expert_ffn_size": 8}, (), "model.expert_ffn_size: found 8, expected 7"),
    ({"vision": None}, (), "model.vision.image_size: found None, expected 8"),
    ({"audio": AUDIO}, (), "model.audio.hidden_size: found 6, expected None"),
    ({"moe_layer_step": 1}, (), "a super-block of (moe chunked, moe global), expected (dense chunked, moe global)"),
    ({"num_layers": 12}, (), "model.num_layers: found 6 super-blocks of 2 layers, expected at most the 5"),
    ({"num_layers": 2}, (), "init.keep: found nothing, expected the one super-block that stays"),
    ({}, (0, 4), "init.keep: found (0, 4), expected 3 of the super-blocks 0 to 4"),
    ({}, (0, 1, 5), "init.keep: found (0, 1, 5), expected 3 of the super-blocks 0 to 4"),
])  # fmt: skip
def test_what_is_no_part_of_the_source_is_refused(change: dict[str, Any], keep: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        kept_blocks(DEEP, dataclasses.replace(SHALLOW, **change), keep, "there")
    assert kept_blocks(DEEP, dataclasses.replace(SHALLOW, num_layers=2), (3,), "there").blocks == (3,)


@pytest.mark.parametrize(("init", "words"), [
    ({"layers": "pruned"}, "init.layers: found 'pruned', expected 'same' without from_run and pretrained"),
    ({"from_run": "r", "keep": [0, 1]}, "init.keep: found (0, 1), expected nothing with layers='same'"),
    ({"from_run": "r", "layers": "pruned", "keep": [1, 0]}, "expected each super-block once, in their order"),
    ({"from_run": "r", "layers": "pruned", "keep": [0, 0]}, "expected each super-block once, in their order"),
    ({"from_run": "r", "layers": "pruned", "keep": [-1, 0]}, "init.keep[0]: found -1, expected 0 or more"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_refused(init: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        from_plain(RunConfig, to_plain(micro()) | {"init": init})
