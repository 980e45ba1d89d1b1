"""How the weights of a model that nothing trains are kept: in int8, in the memory of the host; used as any others.

This goes for the matrices of the super-blocks, in which nearly all numbers are. Embeddings and output head, which are used
whole, encoders, router and norms stay as they are. A super-block's weights come to the device, are gathered as they are
kept and become those of the computation where the scan over super-blocks uses them, so those of one exist at a time.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from qwix import QArray

from model.layers import at_least_float32
from sharding.place import Place

STACKED = ("repeats", "experts")
"""Dims that number matrices."""
HOST = "pinned_host"
"""Memory of the host that devices read by themselves, as JAX names it."""


@dataclass(frozen=True)
class Storage:
    """How a model's matrices are kept; by default as they are."""

    int8: bool = False
    """As whole numbers in 8 bits, with a scale for each output of each matrix."""
    host: bool = False
    """In the memory of the host."""


AS_THEY_ARE = Storage()

Weights = TypeVar("Weights", nnx.State, nnx.Variable)


def is_matrix(weight: nnx.Variable) -> bool:
    """Whether it is a matrix of the super-blocks, stacked over their repeats, and need not be exact."""
    note = weight.get_metadata()
    return note["dims"][:1] == ("repeats",) and bool(note.get("inputs")) and not note["exact"]


def summed_dims(weight: nnx.Variable) -> tuple[int, ...]:
    """The dims of a matrix that a product with it sums over."""
    note, dims = weight.get_metadata(), []
    left, shape = note["inputs"], weight.get_value().shape
    for i, (name, size) in enumerate(zip(note["dims"], shape, strict=True)):
        if name not in STACKED and left > 1:
            dims.append(i)
            left //= size
    assert left == 1, f"{note['dims']} {shape} has no first dims of {note['inputs']} numbers"
    return tuple(dims)


def stored(weight: nnx.Variable, storage: Storage) -> nnx.Variable:
    """The weight with the shapes of what is kept of it, from its shape; its metadata has how it is `split` over a mesh."""
    if not storage.int8 or not is_matrix(weight):
        return weight
    summed, like = summed_dims(weight), weight.get_value()
    scales = tuple(1 if i in summed else size for i, size in enumerate(like.shape))
    split = tuple(() if i in summed else axes for i, axes in enumerate(weight.get_metadata()["split"]))
    numbers = jax.ShapeDtypeStruct(like.shape, jnp.int8)
    wide = jnp.promote_types(like.dtype, jnp.float32)
    return weight.copy(as_int8(numbers, jax.ShapeDtypeStruct(scales, wide)), scale_split=split)


def as_int8(numbers: Any, scales: Any) -> QArray:
    """Arrays, or their shapes or shardings, as those of an array in int8."""
    return QArray(numbers, scales, None, jnp.int8)


def quantised(array: jax.Array, scales: tuple[int, ...]) -> QArray:
    """An array in int8, with scales of this shape: 1 in the dims that share one. Numbers times their scale are the array, to
    half a scale; a scale is the largest magnitude of its numbers / 127.5.
    """
    channels = [i for i, size in enumerate(scales) if size > 1]
    return qwix.quantize(at_least_float32(array), jnp.int8, channelwise_axes=channels)


def whole(place: Place, weights: Weights, dtype: str) -> Weights:
    """`Place.whole` of weights however they are kept, on the device; those in int8 become ones of `dtype`."""

    def used(weight: nnx.Variable) -> nnx.Variable:
        value = jax.tree.map(on_device, weight.get_value())
        if not isinstance(value, QArray):
            return place.whole(weight.replace(value), dtype)
        numbers = place.whole(weight.replace(value.qvalue))
        scales = place.whole(weight.replace(value.scale, split=weight.get_metadata()["scale_split"]))
        gathered = as_int8(numbers.get_value(), scales.get_value())
        return weight.replace(qwix.dequantize(gathered).astype(dtype))

    return jax.tree.map(used, weights, is_leaf=lambda node: isinstance(node, nnx.Variable))


def on_host(array: jax.Array) -> bool:
    """Whether it is in the memory of the host, while it is traced."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def on_device(array: jax.Array) -> jax.Array:
    """The array in the memory of the device, while it is traced."""
    return jax.device_put(array, jax.memory.Space.Device) if on_host(array) else array
