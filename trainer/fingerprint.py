"""A model's name by its numbers: the same on any mesh and in any memory, and another if one of them changes."""

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model.storage import on_device, on_host
from sharding.mesh import DeviceMesh


def fingerprint(weights: Any, mesh: DeviceMesh) -> str:
    """Names a model by the shape, type and every number of its weights, which are on this mesh."""
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    found = np.asarray(_sums(mesh)([leaf for _, leaf in leaves]))
    digest = hashlib.blake2b(digest_size=16)
    for (path, leaf), number in zip(leaves, found, strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {number};".encode())
    return digest.hexdigest()


@functools.cache
def _sums(mesh: DeviceMesh) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(lambda arrays: jnp.stack([_sum(array) for array in arrays]), out_shardings=mesh.everywhere)


def _sum(array: jax.Array) -> jax.Array:
    """A sum over all numbers of what their bits and place make, modulo 2^32: exact, so in any order.

    For each place different bits give different summands, so one changed number always changes the sum.
    """
    if not on_host(array):
        return _partial_sum(array, jnp.uint32(0))
    size = math.prod(array.shape[1:])

    def add(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        part = on_device(lax.dynamic_index_in_dim(array, i, keepdims=False))
        return total + _partial_sum(part, i * jnp.uint32(size % 2**32)), None

    return lax.scan(add, jnp.uint32(0), jnp.arange(len(array), dtype=jnp.uint32))[0]


def _partial_sum(array: jax.Array, first: jax.Array) -> jax.Array:
    """The same of a part whose first number has this place."""
    width = array.dtype.itemsize
    bits = lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)).astype(jnp.uint32)
    place, stride = first * jnp.uint32(max(width // 4, 1)), 1
    for dim in reversed(range(bits.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[dim]
    return jnp.sum(_mixed(bits ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: one-to-one on 32 bits, and each bit moves about half of them."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
