"""A checkpoint of one mesh goes on on any other: bit for bit along a chain of meshes, each device reading its part."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from data.config import DataConfig
from model.config import ModelConfig
from sharding.config import MeshConfig
from tests.sharding.sameness import CASES, WIDE
from trainer import checkpoint
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, RunConfig
from trainer.initialise import abstract_state
from trainer.placement import place_run
from trainer.step import Skeleton, TrainState, init_state
from trainer.streaming import Stored

MODEL = CASES["experts everywhere, images and sound"][0]
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
