"""Whether what must be in memory fits into it, said before anything is computed."""

import math
import os
from typing import Any

import jax

from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from trainer.step import TrainState


def check_memory(state: TrainState | None, mesh: DeviceMesh, teacher: Any = ()) -> None:
    """Refuses a model whose weights, gradients and optimizer state alone exceed the memory of a device of the mesh, or do so
    together with the weights of a teacher; or these alone.

    `state`, `teacher`: shapes with their shardings.
    """
    what = ["weights, gradients and optimizer state"] if state else []
    what += ["the weights of the teacher (distill.teacher)"] if teacher else []
    smaller = "teacher, or teacher_dtype=bfloat16" if teacher else "model (model.num_layers, model.num_experts)"
    held = (state, state.params if state else (), teacher)
    check_room(
        tree_bytes(held) * (len(mesh.local) if mesh.devices[0].platform == "cpu" else 1),
        mesh.devices[0],
        ", with ".join(what),
        f"Take more devices and split the weights over them (mesh.fsdp, mesh.expert), or a smaller {smaller}.",
    )


def check_room(nbytes: int, device: Any, what: str, cure: str) -> None:
    """Refuses what exceeds the device's memory."""
    if device.platform == "cpu":
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        room = (device.memory_stats() or {}).get("bytes_limit", nbytes)
    if nbytes > room:
        raise UserError(
            f"model: {what} need {nbytes / 2**30:,.1f} GiB, found {room / 2**30:,.1f} GiB on {device.device_kind}. {cure}"
        )


def tree_bytes(tree: Any) -> int:
    """Bytes on one device of all arrays (or shapes) of a tree; of all of it where they have no sharding."""

    def part(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        return math.prod(sharding.shard_shape(leaf.shape) if sharding else leaf.shape) * leaf.dtype.itemsize

    return sum(part(leaf) for leaf in jax.tree.leaves(tree))
