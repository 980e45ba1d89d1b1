"""A run goes on on any other mesh: its checkpoints bit for bit, and what it learns, says and reads."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from data.config import DataConfig
from data.media import Media
from data.questions import heldout_questions
from data.tokenizer import load_bytes
from model.config import ModelConfig
from sharding.config import MeshConfig
from tests.oracle_cases import FAST_COMPILE, random_params
from tests.sharding.collectives import instructions
from tests.sharding.sameness import CASES, WIDE
from tests.trainer.processes import metrics
from tests.trainer.saved_run import micro, nano
from trainer import checkpoint
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, RunConfig
from trainer.decode import Decoder, Prompt
from trainer.evaluate import ask, prompt_of
from trainer.initialise import abstract_state
from trainer.loop import Run, train
from trainer.placement import place_run
from trainer.step import Skeleton, TrainState, init_state
from trainer.streaming import Stored

MODEL = CASES["everything"].model
CHAIN = (
    {"fsdp": 8},
    {"fsdp": 1},
    {"expert": 8},
    {"stage": 2, "tensor": 4},
    {"fsdp": 2, "context": 4},
    {"data": 2, "expert": 4},
    {"tensor": 8},
    {"stage": 4, "fsdp": 2},
    {"context": 8},
    {"data": 8},
    {"fsdp": 1},
)
"""Axes of more than one device; all devices that they name, one where they name none."""


def devices(mesh: dict[str, int]) -> list[Any]:
    return jax.devices()[: math.prod(mesh.values())]


def on(mesh: dict[str, int], model: ModelConfig = MODEL) -> TrainState:
    """Shapes of the state with their shardings."""
    config = MeshConfig(**({"fsdp": 1} | mesh))
    run = RunConfig(model=model, data=DataConfig(batch_size=16), mesh=config)
    return abstract_state(run, Skeleton(model, place_run(run, devices(mesh))))


def test_a_checkpoint_goes_from_mesh_to_mesh_bit_for_bit(tmp_path: Path) -> None:
    run = RunConfig(model=MODEL, data=DataConfig(batch_size=16))
    # Moments are zero at first: make every array differ from every other.
    leaves, structure = jax.tree.flatten(jax.jit(lambda: init_state(run))())
    leaves = [leaf + i if leaf.ndim else leaf for i, leaf in enumerate(leaves)]
    original = jax.tree.unflatten(structure, leaves)
    state = jax.device_put(original, jax.tree.map(lambda leaf: leaf.sharding, on(CHAIN[0])))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2))
    for step, mesh in enumerate(CHAIN[1:], start=1):
        checkpoints.save(dataclasses.replace(state, step=jnp.asarray(step, jnp.int32)), {"step": step})
        checkpoints.wait()
        like = on(mesh)
        state = checkpoints.restore(step, like)
        for found, wanted, expected in zip(*map(jax.tree.leaves, (state, like, original)), strict=True):
            assert found.sharding.is_equivalent_to(wanted.sharding, found.ndim)
            if found.ndim:
                np.testing.assert_array_equal(found, expected, err_msg=str(mesh))
    checkpoints.manager.close()


# Runs


@pytest.fixture
def run_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig, dict[str, int], Path], None]:
    """Trains on a mesh of as many devices as it names. What is compiled for a mesh is kept for the next run on it."""
    programs: dict[str, Any] = {}
    compiled, every = Run._compiled, jax.devices()

    def compiled_once(self: Run, *steps: Any) -> Any:
        mesh = str(self.mesh.sizes)
        if mesh not in programs:
            programs[mesh] = compiled(self, *steps)
        return programs[mesh]

    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))
    monkeypatch.setattr(Run, "_compiled", compiled_once)

    def run_on(run: RunConfig, mesh: dict[str, int], workdir: Path) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(jax, "devices", lambda: every[: math.prod(mesh.values())])
            train(dataclasses.replace(run, mesh=MeshConfig(**({"fsdp": 1} | mesh))), workdir, allow_config_change=True)

    return run_on


def assert_same_metrics(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Every number of every record, the losses closest."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float):
                rel = 1e-6 if name.startswith("loss") else 1e-5
                assert ours[name] == pytest.approx(value, rel=rel), (ours["kind"], ours["step"], name)
            elif name != "experts/load":
                assert ours[name] == value, name


RUN_CHAIN = (
    {"fsdp": 1},
    {"fsdp": 2},
    {"expert": 2},
    {"fsdp": 2},
    {"expert": 2},
    {"tensor": 2},
    {"stage": 2},
    {"fsdp": 1},
)
STEPS = 2
"""On each mesh."""


@pytest.mark.slow
def test_a_run_goes_from_mesh_to_mesh_as_if_nothing_had_happened(run_on: Any, tmp_path: Path) -> None:
    run, last = nano(), STEPS * len(RUN_CHAIN)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, num_layers=2, nope_layer_step=0),  # two super-blocks of one layer
        optimizer=dataclasses.replace(run.optimizer, schedule="constant", warmup_steps=1),
        eval=dataclasses.replace(run.eval, every_steps=100),
        checkpoint=dataclasses.replace(run.checkpoint, every_steps=100),
    )
    run_on(dataclasses.replace(run, steps=last), {"fsdp": 1}, tmp_path / "undisturbed")
    for leg, mesh in enumerate(RUN_CHAIN, start=1):
        run_on(dataclasses.replace(run, steps=STEPS * leg), mesh, tmp_path / "moved")
    found, expected = (metrics(tmp_path / name) for name in ("moved", "undisturbed"))
    found = [record for record in found if record["kind"] == "train" or record["step"] == last]
    assert_same_metrics(found, expected)

    like = abstract_state(run, Skeleton(run.model))
    moved, undisturbed = (Checkpoints(tmp_path / name / "checkpoints") for name in ("moved", "undisturbed"))
    assert moved.metadata(last)["data_position"] == undisturbed.metadata(last)["data_position"]
    states = jax.device_get([checkpoints.restore(last, like) for checkpoints in (moved, undisturbed)])
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.slow
def test_a_run_with_pictures_and_questions_is_the_same_on_a_mesh(run_on: Any, tmp_path: Path) -> None:
    run = micro()
    run = dataclasses.replace(
        run,
        steps=4,
        data=dataclasses.replace(run.data, batch_size=8),
        optimizer=dataclasses.replace(run.optimizer, accumulate=2, warmup_steps=1),
    )
    run_on(run, {"fsdp": 1}, tmp_path / "alone")
    run_on(run, {"fsdp": 2, "expert": 2, "tensor": 2}, tmp_path / "mesh")
    assert_same_metrics(metrics(tmp_path / "mesh"), metrics(tmp_path / "alone"))
    scores, expected = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("mesh", "alone"))
    assert scores["questions"] == expected["questions"] and scores["samples"] == expected["samples"]


@pytest.mark.parametrize("mesh", [
    {"fsdp": 2, "expert": 2, "tensor": 2},
    pytest.param({"stage": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 4}, marks=pytest.mark.slow),
    pytest.param({"expert": 4}, marks=pytest.mark.slow),
    pytest.param({"tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"stage": 2, "expert": 2}, marks=pytest.mark.slow),
    pytest.param({"context": 2, "data": 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_questions_are_answered_on_a_mesh_as_on_one_device(mesh: dict[str, int]) -> None:
    """By random weights, which have another answer to each."""
    answers = answered(mesh)
    assert answers == answered({"fsdp": 1})
    assert len(set(answers)) == len(answers)


@pytest.mark.parametrize("mesh", [
    {"expert": 4},
    {"stage": 2},
    pytest.param({"tensor": 2, "expert": 2}, marks=pytest.mark.slow),
    pytest.param({"stage": 2, "expert": 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_token_is_decoded_where_its_experts_are(mesh: dict[str, int]) -> None:
    """No expert goes from device to device, neither for prompts nor for a token. With stages other weights do, among them the
    shared experts of both repeats, so there it is held that all experts of one do not."""
    run = micro(num_layers=4, hidden_size=256, expert_ffn_size=2048)  # more than two arrays of 64 tokens
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=16), mesh=MeshConfig(**mesh))
    skeleton = Skeleton(run.model, place_run(run, devices(mesh)))
    params = jax.device_put(random_params(run.model, seed=3), skeleton.shardings)
    decoder = Decoder(Skeleton(run.model, skeleton.mesh.outside()), params, {})
    assert len(list(decoder.stream([Prompt(np.arange(5, dtype=np.int32))], 2))) == 2
    for program in decoder._programs.values():
        moved = [
            sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes))
            for _, shapes in instructions(program.as_text())
        ]
        of_expert = run.model.hidden_size * run.model.expert_ffn_size
        assert 0 < max(moved) < (run.model.num_experts if "stage" in mesh else 1) * of_expert


@functools.cache
def _answered(mesh: tuple[tuple[str, int], ...]) -> list[str]:
    run = micro(num_layers=4)  # two super-blocks
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=16), mesh=MeshConfig(**dict(mesh)))
    skeleton, tokenizer = Skeleton(run.model, place_run(run, devices(dict(mesh)))), load_bytes()
    params = jax.device_put(random_params(run.model, seed=3), skeleton.shardings)
    questions = heldout_questions("scenes", run.data, run.media, tokenizer, 4)
    prompts = [prompt_of(question, Media(run.media, tokenizer), tokenizer) for question in questions]
    return ask(Decoder(Skeleton(run.model, skeleton.mesh.outside()), params, {}), tokenizer, prompts, most=6)


def answered(mesh: dict[str, int]) -> list[str]:
    """Answers to a few questions about pictures, of weights on a mesh."""
    return _answered(tuple(({"fsdp": 1} | mesh).items()))


# Reading


LARGE = dataclasses.replace(
    WIDE, num_layers=8, hidden_size=128, dense_ffn_size=128, expert_ffn_size=128, vocab_size=256
)


def bytes_read() -> int:
    """By TensorStore, from files, in this process so far."""
    (found,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return found["values"][0]["value"]


@pytest.mark.parametrize(("before", "after"), [
    ({"fsdp": 1}, {"fsdp": 4}),
    ({"fsdp": 1}, {"expert": 4}),
    ({"fsdp": 1}, {"stage": 2, "tensor": 2}),
    ({"fsdp": 4}, {"expert": 4}),
    ({"expert": 4}, {"fsdp": 4}),
    ({"stage": 2}, {"expert": 4}),
    ({"fsdp": 4}, {"fsdp": 1}),
])  # fmt: skip
def test_a_device_reads_its_part_of_a_checkpoint(
    before: dict[str, int], after: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2**12)  # which cuts these arrays into many
    random, shapes = np.random.default_rng(0), on(before, LARGE)

    def some(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(np.asarray(random.standard_normal(leaf.shape), leaf.dtype), leaf.sharding)

    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(dataclasses.replace(jax.tree.map(some, shapes), step=jnp.int32(1)), {})
    checkpoints.wait()
    checkpoints.close()

    state = tmp_path / "1" / "state"
    on_disk = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    wanted = checkpoint._named(on(after, LARGE))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values())
    held = sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in wanted.values())
    for device in devices(after):
        started, stored = bytes_read(), Stored(state)
        for name, leaf in wanted.items():  # as it is read where the device is the only one of its process
            stored.array(name)[leaf.sharding.devices_indices_map(leaf.shape)[device]].read().result()
        assert (bytes_read() - started) / on_disk < 1.1 * held / whole + 0.05
