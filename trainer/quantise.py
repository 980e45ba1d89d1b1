"""A teacher's weights into int8, one after the other as they are read, one super-block's part of each on the devices at a time.

Letters: R repeats of the super-block, P parts of them along the stage axis, X the dims of a matrix.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from qwix import QArray

from model.storage import HOST, as_int8, on_device, quantised
from sharding.mesh import DeviceMesh
from trainer.step import Params, Skeleton


def _is_quantised(node: Any) -> bool:
    return isinstance(node, QArray)


def to_read(skeleton: Skeleton, as_stored: Callable[[Params], Params]) -> Params:
    """Shapes, dtypes and shardings in which to read the weights that `in_int8` keeps: those for int8 in the host's memory, and
    as precise as they are stored.

    `as_stored` changes the dtypes of shapes to those in which they are stored.
    """
    kept = skeleton.abstract_weights[0]

    def in_host(leaf: Any) -> Any:
        if not _is_quantised(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.qvalue.sharding.with_memory_kind(HOST))

    read = jax.tree.map(in_host, kept, is_leaf=_is_quantised)

    def precise(leaf: Any, read: Any, stored: Any) -> Any:
        return jax.ShapeDtypeStruct(read.shape, stored.dtype, sharding=read.sharding) if _is_quantised(leaf) else read

    return jax.tree.map(precise, kept, read, as_stored(read), is_leaf=_is_quantised)


def in_int8(skeleton: Skeleton, weights: Iterator[jax.Array]) -> Params:
    """What `skeleton` keeps of weights read in turn, in the order of its own."""
    kept, structure = jax.tree.flatten(skeleton.abstract_weights[0], is_leaf=_is_quantised)
    made = [
        _matrices(skeleton.mesh, weight, like) if _is_quantised(like) else weight
        for weight, like in zip(weights, kept, strict=True)
    ]
    return jax.tree.unflatten(structure, made)


def _empty(like: jax.ShapeDtypeStruct) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        return np.empty(
            [len(range(*cut.indices(size))) for cut, size in zip(index, like.shape, strict=True)], like.dtype
        )

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _matrices(mesh: DeviceMesh, stacked: jax.Array, like: QArray) -> QArray:
    """Stacked matrices [R, X] in int8, repeat by repeat: one of each part of them at once.

    The same on any mesh: a scale is that of the largest number on all devices.
    """
    put_next = _one_repeat(mesh, stacked.sharding, like.qvalue.sharding, like.scale.sharding)
    kept = jax.tree.map(_empty, like)
    for i in range(stacked.sharding.shard_shape(stacked.shape)[0]):
        kept = put_next(kept, stacked, jnp.asarray(i))
    return kept


@functools.cache
def _one_repeat(mesh: DeviceMesh, read: NamedSharding, numbers: NamedSharding, scales: NamedSharding) -> Any:
    """(int8 so far, stacked matrices, i) -> int8 with the i-th repeat of each part."""
    shardings = as_int8(numbers, scales)

    def pick(stacked: jax.Array, i: jax.Array) -> jax.Array:
        return on_device(lax.dynamic_index_in_dim(stacked, i))

    def put(kept: QArray, one: QArray, i: jax.Array) -> QArray:
        def into(all: jax.Array, one: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(all, jax.device_put(one, jax.typeof(all).memory_space), i, 0)

        return jax.tree.map(into, kept, one)

    def one_repeat(kept: QArray, stacked: jax.Array, i: jax.Array) -> QArray:
        one_PX = mesh.on_all(pick, (read, mesh.everywhere), read)(stacked, i)
        small = quantised(one_PX, (len(one_PX), *kept.scale.shape[1:]))
        return mesh.on_all(put, (shardings, shardings, mesh.everywhere), shardings)(kept, small, i)

    return jax.jit(one_repeat, donate_argnums=0, out_shardings=shardings)
