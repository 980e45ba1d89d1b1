"""Whether what must be in memory fits into it, said before anything is computed."""

import math
import os
from typing import Any

import jax

from model.storage import HOST
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from trainer.step import TrainState


def check_memory(state: TrainState | None, mesh: DeviceMesh, teacher: Any = ()) -> None:
    """Refuses a model whose weights, gradients and optimizer state alone exceed the memory of a device of the mesh, or do so
    together with what there is of a teacher at one time; or this alone. What is kept in the memory of the host must fit there.

    `state`, `teacher`: shapes with their shardings. A state on other devices than those of the mesh counts where they have one
    memory with these, on a CPU.
    """
    device = mesh.local[0]
    shared = device.platform == "cpu"
    if state and not shared and state.step.sharding.device_set.isdisjoint(mesh.devices):
        state = None
    what = ["weights, gradients and optimizer state"] if state else []
    what += ["the weights of the teacher (distill.teacher)"] if teacher else []
    smaller = (
        "teacher, or keep it in fewer bits (distill.teacher_dtype=int8) or in the memory of the host "
        "(distill.teacher_memory=host)"
        if teacher
        else "model (model.num_layers, model.num_experts)"
    )
    cure = f"Take more devices and split the weights over them (mesh.fsdp, mesh.expert), or a smaller {smaller}."
    held = (state, state.params if state else (), teacher)
    if shared:
        leaves = jax.tree.leaves(held)
        nbytes = sum(tree_bytes(leaf) * len(leaf.sharding.addressable_devices) for leaf in leaves)
        check_room(nbytes, device, ", with ".join(what), cure)
    else:
        check_room(device_bytes(held), device, ", with ".join(what), cure)
        on_host = (tree_bytes(held) - device_bytes(held)) * len(mesh.local)
        _check_room(on_host, _of_host(), "the host", f"{what[-1]} in the memory of the host", cure)


def check_room(nbytes: int, device: Any, what: str, cure: str) -> None:
    """Refuses what exceeds the device's memory."""
    room = _of_host() if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit", nbytes)
    _check_room(nbytes, room, device.device_kind, what, cure)


def _check_room(nbytes: int, room: int, where: str, what: str, cure: str) -> None:
    if nbytes > room:
        raise UserError(
            f"model: {what} need {nbytes / 2**30:,.1f} GiB, found {room / 2**30:,.1f} GiB on {where}. {cure}"
        )


def _of_host() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tree_bytes(tree: Any) -> int:
    """Bytes on one device of all arrays (or shapes) of a tree; of all of it where they have no sharding."""

    def part(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        return math.prod(sharding.shard_shape(leaf.shape) if sharding else leaf.shape) * leaf.dtype.itemsize

    return sum(part(leaf) for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """The same of those that are in the memory of the device."""
    return tree_bytes([leaf for leaf in jax.tree.leaves(tree) if _memory(leaf) != HOST])


def _memory(leaf: Any) -> str | None:
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None)
