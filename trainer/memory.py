"""Whether what must be in memory fits into it, said before anything is computed."""

import os
from typing import Any

import jax

from sharding.errors import UserError
from trainer.step import TrainState


def check_memory(state: TrainState, device: Any) -> None:
    """Refuses a model whose weights, gradients and optimizer state alone exceed the device's memory."""
    check_room(
        tree_bytes((state, state.params)),
        device,
        "weights, gradients and optimizer state",
        "A run uses one device today: take a smaller model (model.num_layers, model.num_experts).",
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
    """Bytes of all arrays (or shapes) of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
