"""Arrays of a checkpoint part by part, on the host alone: a model larger than the machine's memory goes in and out.

Orbax writes and commits the checkpoint as it does any other; only the leaves are written by the piece. Reading opens the
arrays where Orbax put them.
"""

import asyncio
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import traverse_util

from sharding.errors import UserError

Name = tuple[str, ...]

CHUNK_BYTES = 256 * 2**20
"""Largest chunk on disk: what must be read to have any number in it."""


@dataclass(frozen=True)
class Streamed:
    """A leaf that is made while it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]
    """Gives (index of the leading dims, numbers), covering the leaf; called once."""
    part_dims: int
    """Leading dims that the indices number."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's writer of NumPy arrays, for leaves that come in parts."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._one_leaf_at_a_time = asyncio.Lock()  # so that one part is in memory

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        async with self._one_leaf_at_a_time:
            array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            for index, part in value.parts():
                await array[index].write(part)


def save_streamed(directory: Path, step: int, leaves: Mapping[Name, Streamed], metadata: Mapping[str, Any]) -> None:
    """Writes the checkpoint of a step, part by part, with its JSON; returns when all of it is on disk.

    `leaves` by their names on disk, such as ("params", "blocks", "0", "attn", "q").
    """
    registry = ocp.type_handlers.create_type_handler_registry((Streamed, _StreamedHandler()))
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "run": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    # Chunks end where parts do, or each part would rewrite a chunk.
    save_args = {
        name: ocp.SaveArgs(shard_axes=tuple(range(leaf.part_dims)), chunk_byte_size=CHUNK_BYTES)
        for name, leaf in leaves.items()
    }
    with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(  # pyright: ignore[reportCallIssue]
                    traverse_util.unflatten_dict(dict(leaves)),  # pyright: ignore[reportCallIssue]
                    save_args=traverse_util.unflatten_dict(save_args),  # pyright: ignore[reportCallIssue]
                ),
                run=ocp.args.JsonSave(dict(metadata)),  # pyright: ignore[reportCallIssue]
            ),
        )


class Stored:
    """The arrays of a checkpoint, read by the slice."""

    def __init__(self, state: Path):
        """`state`: the folder of that name in a checkpoint."""
        try:
            saved = json.loads((state / "_METADATA").read_text())
            assert saved["use_ocdbt"]
            names = [tuple(key["key"] for key in leaf["key_metadata"]) for leaf in saved["tree_metadata"].values()]
            driver = "zarr3" if saved.get("use_zarr3") else "zarr"
        except (OSError, ValueError, KeyError, AssertionError) as error:
            raise UserError(f"checkpoint {state.parent}: found no arrays written by Orbax ({error}).") from error
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": CHUNK_BYTES}})
        self._spec = lambda name: {
            "driver": driver,
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{state}/"},
                "path": f"{'.'.join(name)}/",
            },
        }
        self._arrays: dict[Name, Any] = {}
        self.names = names

    def array(self, name: Name) -> Any:
        """The TensorStore of one array: `shape`, `dtype.numpy_dtype`, `[index].read().result()`."""
        if name not in self._arrays:
            self._arrays[name] = ts.open(self._spec(name), open=True, read=True, context=self._context).result()
        return self._arrays[name]

    def read(self, name: Name, index: tuple[int, ...] = ()) -> np.ndarray:
        """The array, or what its leading dims hold at `index`."""
        return self.array(name)[index].read().result()

    def under(self, top: str) -> Iterator[Name]:
        """Names of the arrays whose first key is `top`."""
        return (name for name in self.names if name[0] == top)
