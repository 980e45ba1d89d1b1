"""A run on its devices: the mesh that the config asks for, checked against the model and the batch."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from rich.filesize import decimal

from sharding.config import AXES, REST, ROW_AXES, distance, meshes, written
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from trainer.config import RunConfig
from trainer.memory import tree_bytes
from trainer.step import TrainState

SUGGESTED = 4
"""Meshes that a refusal names."""


def place_run(run: RunConfig, devices: Sequence[Any]) -> DeviceMesh:
    """The mesh of a run on these devices.

    Raises:
        UserError: its product is not their number, or it does not divide what it splits; names the nearest that do.
    """
    sizes = _sizes(run, len(devices))
    return DeviceMesh.of(devices, sizes, **_options(run, sizes))


def planned_mesh(run: RunConfig, devices: int) -> DeviceMesh:
    """The mesh of a run on so many devices that are not there; raises as `place_run` does."""
    sizes = _sizes(run, devices)
    return DeviceMesh.planned(sizes, **_options(run, sizes))


def _sizes(run: RunConfig, devices: int) -> dict[str, int]:
    sizes = run.mesh.sizes(devices)
    if sizes is None:
        asked = ", ".join(f"{name}={getattr(run.mesh, name)}" for name in AXES)
        fixed = {name: size for name in AXES if (size := getattr(run.mesh, name)) != REST}
        wanted = dict.fromkeys(AXES, max(1, devices // math.prod(fixed.values()))) | fixed
        found = f"found {asked}, whose product does not make {devices} devices"
    else:
        problems = mesh_problems(run, sizes)
        if not problems:
            return sizes
        wanted, found = sizes, f"found {written(sizes)}: {'; '.join(problems)}"
    raise UserError(f"mesh: {found}. {_cures(run, devices, wanted)}")


def _options(run: RunConfig, sizes: dict[str, int]) -> dict[str, Any]:
    """What a `Place` knows of a run."""
    return {
        "expert_buffer": run.mesh.expert_buffer,
        "stage_batches": run.mesh.stage_batches,
        "straddle": run.data.row_parts % sizes["context"] > 0,
    }


def mesh_problems(run: RunConfig, sizes: dict[str, int]) -> list[str]:
    """What in the run a mesh does not divide."""
    model, tensor, context = run.model, sizes["tensor"], sizes["context"]
    micro_batch = run.data.batch_size // run.optimizer.accumulate
    rows = f"the {micro_batch} rows of each of the optimizer.accumulate micro-batches of data.batch_size"
    kinds = [kind.moe for kind in model.layer_kinds()]
    experts = any(kinds)
    splits = {"hidden_size": sizes["fsdp"] * sizes["expert"] * context}
    splits |= dict.fromkeys(("num_heads", "num_kv_heads", "vocab_size"), tensor)
    splits |= {"num_experts": sizes["expert"], "expert_ffn_size": tensor} if experts else {}
    splits |= {} if all(kinds) else {"dense_ffn_size": tensor}
    parts = math.prod(sizes[name] for name in ROW_AXES)
    checks = [(micro_batch, parts, f"{rows}={run.data.batch_size}")]
    if sizes["stage"] > 1:
        block = len(model.super_block())
        repeats = model.num_layers // block
        blocks = f"the {repeats} super-block(s) of {block} layer(s) of model.num_layers={model.num_layers}"
        checks.append((repeats, sizes["stage"], blocks))
    if micro_batch % parts == 0:
        here = f"the {micro_batch // parts} rows that a device has of a micro-batch"
        checks.append((micro_batch // parts, run.mesh.stage_batches, f"{here} (mesh.stage_batches)"))
    if context > 1:  # twice, for a balanced ring
        checks.append((run.data.sequence_length, 2 * context, f"data.sequence_length={run.data.sequence_length}"))
    checks += [(getattr(model, name), by, f"model.{name}={getattr(model, name)}") for name, by in splits.items()]
    found = [f"{what} cannot be split into {by} equal parts" for size, by, what in checks if size % by]
    if not experts and sizes["expert"] > 1:
        found.append("the model has no experts to split, use fsdp")
    return found


def _cures(run: RunConfig, devices: int, wanted: dict[str, int]) -> str:
    fitting = sorted(
        (sizes for sizes in meshes(devices) if not mesh_problems(run, sizes)), key=lambda sizes: distance(sizes, wanted)
    )
    if fitting:
        nearest = "; ".join(written(sizes) for sizes in fitting[:SUGGESTED])
        return f"Meshes of {devices} devices that fit this run, the nearest first: {nearest}."
    micro_batches = run.optimizer.accumulate
    rows = math.lcm(run.data.batch_size, devices * micro_batches)
    return (
        f"No mesh of {devices} devices fits this run. Take data.batch_size={rows}, so that their number divides the rows of "
        "a micro-batch, or fewer devices (CUDA_VISIBLE_DEVICES on GPUs)."
    )


def memory_line(state: TrainState, mesh: DeviceMesh) -> str:
    """What weights and optimizer state take of each device, and what of that is whole or copied on all of them.

    `state`: shapes with their shardings.
    """
    part = tree_bytes(state)
    line = f"weights and optimizer state {decimal(part)} a device"
    leaves = jax.tree.leaves(state)
    whole = [leaf for leaf in leaves if leaf.ndim and leaf.sharding.is_fully_replicated]
    if len(mesh.devices) > 1:
        line += f", of which {len(whole)} arrays, {decimal(tree_bytes(whole))}, are whole on every one"
    if mesh.sizes["data"] > 1:
        line += f"; {mesh.sizes['data']} copies of all of it (mesh.data)"
    return line
