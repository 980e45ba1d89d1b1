"""Where a device stands in the mesh, for code that runs on all of them at once (inside `jax.shard_map`).

The rule that makes gradients right: each device computes a part of the loss, and the parts add up to the whole. So what
several devices compute alike is divided by their number; the gradient of a gathered weight is summed over the devices that
gathered it and scattered back into parts; and `Place.summed` adds up, once a step, over the axes that a weight is not split
over. Along the tensor axis devices compute the same rows, each with its part of the weights: what they have in common has
its gradient in parts there, which add up wherever `Place.joined` put the value together.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh

from sharding.config import AXES, ROW_AXES
from sharding.rules import GATHERED, Axes

GATHERED_WEIGHT = "gathered"
"""Name of gathered weights in checkpoint policies: the backward pass gathers them again rather than keep them."""

Weights = TypeVar("Weights", nnx.State, nnx.Variable)


@dataclass(frozen=True)
class Place:
    """The mesh as the code on a device sees it. Without sizes: one device, on which everything here does nothing."""

    sizes: tuple[tuple[str, int], ...] = ()
    """(axis, size) of the axes with more than one device."""
    expert_buffer: float = 1.5
    """See `MeshConfig`."""
    stage_batches: int = 1
    """See `MeshConfig`."""
    outside: Mesh | AbstractMesh | None = None
    """The mesh that the weights are on, for code that runs outside of `jax.shard_map`: XLA splits the work then, but for
    that of the experts."""
    straddle: bool = True
    """Whether chunks may begin in one device's share of a row and end in another's; see `DataConfig.row_parts`."""

    @classmethod
    def on(cls, sizes: dict[str, int], **options: Any) -> "Place":
        """The place in a mesh of these sizes."""
        return cls(tuple((name, sizes[name]) for name in AXES if sizes[name] > 1), **options)

    @property
    def axes(self) -> Axes:
        """The axes with more than one device."""
        return tuple(name for name, _ in self.sizes)

    @property
    def row_axes(self) -> Axes:
        """Those that split the rows of a batch."""
        return tuple(name for name in self.axes if name in ROW_AXES)

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are split into."""
        return math.prod(map(self.size, self.row_axes))

    @property
    def parts(self) -> int:
        """Parts that the tokens of a batch are split into: rows, and the row itself."""
        return self.row_parts * self.size("context")

    @property
    def copies(self) -> int:
        """Devices that compute the same tokens."""
        return self.size("tensor")

    def size(self, axis: str) -> int:
        """Devices along an axis."""
        return dict(self.sizes).get(axis, 1)

    def total(self, tree: Any) -> Any:
        """Every array, of a part of the tokens, summed over all of them."""
        axes = tuple(name for name in self.axes if name != "tensor")
        return lax.psum(tree, axes) if axes else tree

    def row(self, share: jax.Array) -> jax.Array:
        """Whole rows [B, ...] of which this device has a share, gathered."""
        return lax.all_gather(share, "context", axis=1, tiled=True) if self.size("context") > 1 else share

    def before(self, counts: jax.Array) -> jax.Array:
        """Sum of what the devices with the shares of the rows before this one's count."""
        counts_P = lax.all_gather(counts, "context")
        earlier_P = jnp.arange(self.size("context")) < lax.axis_index("context")
        return jnp.tensordot(earlier_P.astype(counts.dtype), counts_P, 1)

    def joined(self, partial: Any) -> Any:
        """What devices of the tensor axis computed with their parts of the weights, put together."""
        return lax.psum(partial, "tensor") if self.copies > 1 else partial

    def largest(self, numbers: jax.Array, axis: str | None = None) -> jax.Array:
        """The largest of all devices', or of those along an axis."""
        axes = tuple(name for name in self.axes if axis in (None, name))
        return lax.pmax(numbers, axes) if axes else numbers

    def summed(self, gradient: nnx.Variable) -> nnx.Variable:
        """The gradient of a weight, summed over the axes that it is not split over."""
        taken = {axis for axes in gradient.get_metadata()["split"] for axis in axes}
        others = tuple(axis for axis in self.axes if axis not in taken)
        return gradient.replace(lax.psum(gradient.get_value(), others)) if others else gradient

    def whole(self, weights: Weights, dtype: str | None = None) -> Weights:
        """These weights, of which each device has its part, gathered; but for experts, which stay where they are.

        `dtype`: gather in this precision what is stored in a higher one; weights that are `exact` keep theirs.
        """
        if not self.sizes:
            return weights
        gather = functools.partial(_whole, dtype=dtype)
        return jax.tree.map(gather, weights, is_leaf=lambda node: isinstance(node, nnx.Variable))

    def rows(self, table: nnx.Variable, index: jax.Array, dtype: str) -> jax.Array:
        """Rows of a table [V, D] by their indices, [...] -> [..., D].

        The parts of the table stay where they are: each device looks up what the others ask for, in its part.
        """
        part, split = table.get_value(), _gathers(table)
        axes = split[0][1] if split else ()
        asked = lax.all_gather(index, axes) if axes else index
        found = self._looked_up(part, asked).astype(dtype)
        return lax.all_to_all(found, axes, 0, asked.ndim, tiled=True)[0] if axes else found

    def _looked_up(self, part: jax.Array, index: jax.Array) -> jax.Array:
        if self.copies == 1:
            return part[index]
        within = index - self.first("tensor", part.shape[0])
        mine = (within >= 0) & (within < part.shape[0])
        return self.joined(jnp.where(mine[..., None], part[jnp.where(mine, within, 0)], 0))

    def first(self, axis: str, size: int) -> jax.Array | int:
        """Where this device's part of a dim begins, of parts of this size along an axis."""
        return lax.axis_index(axis) * size if self.size(axis) > 1 else 0


def _gathers(weight: nnx.Variable) -> tuple[tuple[int, Axes], ...]:
    """(dim, axes) of the dims that are split and have to be gathered.

    How the weight is split is noted for all of its dims; inside a scan over stacked layers it lacks the first.
    """
    note = weight.get_metadata()
    if "split" not in note:  # a router's bias, which no mesh splits
        return ()
    scanned = len(note["split"]) - weight.get_value().ndim
    names = ("-",) * (len(note["split"]) - len(note["dims"])) + note["dims"]
    return tuple(
        (i - scanned, axes)
        for i, (name, axes) in enumerate(zip(names, note["split"], strict=True))
        if axes and name in GATHERED
    )


def _whole(weight: nnx.Variable, dtype: str | None) -> nnx.Variable:
    part, split = weight.get_value(), _gathers(weight)
    if not split:
        return weight
    narrow = dtype and not weight.get_metadata().get("exact") and jnp.dtype(dtype).itemsize < part.dtype.itemsize
    return weight.replace(checkpoint_name(_gather(part, split, dtype if narrow else part.dtype), GATHERED_WEIGHT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, split: tuple[tuple[int, Axes], ...], dtype: Any) -> jax.Array:
    """Parts become the whole array in `dtype`; gradients are summed in the precision of the part."""
    whole = part.astype(dtype)
    for dim, axes in split:
        whole = lax.all_gather(whole, axes, axis=dim, tiled=True)
    return whole


def _gather_forward(part, split, dtype):
    return _gather(part, split, dtype), jnp.zeros(0, part.dtype)


def _gather_backward(split, dtype, like, d_whole):
    d_part = d_whole.astype(like.dtype)
    for dim, axes in reversed(split):
        d_part = lax.psum_scatter(d_part, axes, scatter_dimension=dim, tiled=True)
    return (d_part,)


_gather.defvjp(_gather_forward, _gather_backward)
