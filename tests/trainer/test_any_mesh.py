"""A checkpoint of one mesh goes on on any other: saved and restored along a chain of meshes, bit for bit."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data.config import DataConfig
from sharding.config import MeshConfig
from tests.sharding.sameness import CASES
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, RunConfig
from trainer.initialise import abstract_state
from trainer.placement import place_run
from trainer.step import Skeleton, TrainState, init_state

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


def on(mesh: dict[str, int]) -> TrainState:
    """Shapes of the state with their shardings."""
    config = MeshConfig(**({"fsdp": 1} | mesh))
    run = RunConfig(model=MODEL, data=DataConfig(batch_size=16), mesh=config)
    devices = int(np.prod(list(mesh.values())))
    return abstract_state(run, Skeleton(MODEL, place_run(run, jax.devices()[:devices])))


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
