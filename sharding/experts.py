"""The experts on several devices: each token goes to the devices of its experts, and what they make of it comes back.

Dropless, in rounds of a buffer whose size is fixed: a device sends each other one up to so many rows at a time, until a
maximum over all devices says that all have been sent. Balanced routing takes one round, whose gradient is the automatic
one. The rounds after it have one that is written out, since a loop of unknown length has no other: it keeps the rows of
the sender alone and exchanges them again.

Letters: A rows (assignments, sorted by expert), D width, E experts, P parts that they are split into, L = E/P experts of a
device, C rows of a buffer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sharding.place import Place

AXIS = "expert"
ROWS_MULTIPLE = 8

Compute = Callable[..., jax.Array]
"""(rows [A,D] sorted by expert, gate, up, down of L experts, sizes [L]) -> [A,D]; clears rows after the last group."""
Weights = tuple[jax.Array, jax.Array, jax.Array]


class _Exchange(NamedTuple):
    """What does not change from round to round."""

    compute: Compute
    parts: int
    capacity: int


def expert_parallel(
    compute: Compute,
    place: Place,
    rows_AD: jax.Array,
    weights: Weights,
    sizes_E: jax.Array,
    repeat: jax.Array | None = None,
) -> jax.Array:
    """`compute` of all rows by all experts, of whose weights each device has an equal part, [E/P, ...].

    `rows_AD` are sorted by expert, the first `sizes_E` of them; what comes after them gives zeros. Outside of
    `jax.shard_map` (`Place.outside`) weights are whole, [E, ...]; so are those [R, E, ...] of as many layers as the
    super-block is repeated, of which `repeat` is meant.
    """
    if repeat is not None or place.outside:
        return _where_weights_are(compute, place.outside, rows_AD, weights, sizes_E, repeat)
    parts = place.size(AXIS)
    if parts == 1:
        return compute(rows_AD, *weights, sizes_E)
    balanced = rows_AD.shape[0] / parts
    capacity = min(rows_AD.shape[0], ROWS_MULTIPLE * math.ceil(place.expert_buffer * balanced / ROWS_MULTIPLE))
    exchange = _Exchange(compute, parts, capacity)
    most = jnp.max(jnp.sum(sizes_E.reshape(parts, -1), axis=1))
    rounds = place.largest((most + capacity - 1) // capacity)
    result_AD = _one_round(exchange, jnp.zeros((), jnp.int32), rows_AD, weights, sizes_E, jnp.zeros_like(rows_AD))
    further: Any = _further_rounds(exchange, rows_AD, weights, sizes_E, rounds)
    return result_AD + further


def _where_weights_are(
    compute: Compute,
    mesh: Mesh | AbstractMesh | None,
    rows_AD: jax.Array,
    weights: Weights,
    sizes_E: jax.Array,
    repeat: jax.Array | None,
) -> jax.Array:
    """`compute` without an exchange, outside of `jax.shard_map`: on a mesh every device is given all rows, computes those of
    its own experts, and the results add up. What other axes than these two split is left to XLA.
    """
    E, axes = len(sizes_E), (AXIS,) if repeat is None else ("stage", AXIS)
    before_E = jnp.cumsum(sizes_E) - sizes_E
    sizes = sizes_E
    if repeat is not None:  # [R,E], and zero but for one
        sizes = jnp.zeros((weights[0].shape[0], E), sizes_E.dtype).at[repeat].set(sizes_E)

    def local(rows_AD: jax.Array, weights: Weights, sizes: jax.Array) -> jax.Array:
        return compute(rows_AD, *(w.reshape(-1, *w.shape[-2:]) for w in weights), sizes.reshape(-1))

    if not mesh or all(mesh.shape[axis] == 1 for axis in axes):
        return local(rows_AD, weights, sizes)

    def of_device(rows_AD: jax.Array, weights: Weights, sizes: jax.Array, before_1: jax.Array) -> jax.Array:
        mine_AD = local(jnp.roll(rows_AD, -before_1, axis=0), weights, sizes)
        return lax.psum(jnp.roll(mine_AD, before_1, axis=0), axes)

    split, everywhere = PartitionSpec(*axes), PartitionSpec()
    inputs = everywhere, split, split, PartitionSpec(AXIS)
    on_all = jax.shard_map(
        of_device, mesh=mesh, in_specs=inputs, out_specs=everywhere, axis_names=set(axes), check_vma=False
    )
    return on_all(rows_AD, weights, sizes, before_E[:: E // mesh.shape[AXIS]])


class _Sent(NamedTuple):
    """Which rows a device sends in a round."""

    index_PC: jax.Array
    """Row for each place of the buffers; past the end where the buffer is not full."""
    counts_PL: jax.Array
    """Rows for each expert of each device."""


def _sent(exchange: _Exchange, number: jax.Array, sizes_E: jax.Array, total: int) -> _Sent:
    parts, capacity = exchange.parts, exchange.capacity
    sizes_PL = sizes_E.reshape(parts, -1)
    ends_PL, count_P = jnp.cumsum(sizes_PL, axis=1), jnp.sum(sizes_PL, axis=1)
    first = number * capacity
    within_C = first + jnp.arange(capacity)
    index_PC = jnp.where(within_C < count_P[:, None], (jnp.cumsum(count_P) - count_P)[:, None] + within_C, total)
    ends_PL = jnp.clip(ends_PL - first, 0, capacity)
    return _Sent(index_PC, jnp.diff(ends_PL, axis=1, prepend=0))


class _Order(NamedTuple):
    """How a device sorts the rows that it received by expert, and back."""

    sorted_R: jax.Array
    back_R: jax.Array
    sizes_L: jax.Array


def _order(counts_PL: jax.Array, capacity: int) -> _Order:
    """From the rows of each expert, by sender; a sender's rows are sorted by expert, and fill its buffer from the start."""
    ends_PL = jnp.cumsum(counts_PL, axis=1)
    expert_PC = jnp.sum(jnp.arange(capacity)[:, None] >= ends_PL[:, None], axis=2)
    sorted_R = jnp.argsort(expert_PC.reshape(-1), stable=True)
    return _Order(sorted_R, jnp.argsort(sorted_R), jnp.sum(counts_PL, axis=0))


def _swap(buffers: jax.Array) -> jax.Array:
    """Buffer p goes to device p; buffer p of the result is what device p sent."""
    return lax.all_to_all(buffers, AXIS, 0, 0, tiled=True)


def _send(rows_AD: jax.Array, sent: _Sent, order: _Order) -> jax.Array:
    """The rows that this device received in a round, [P x C, D], sorted by expert."""
    received = _swap(rows_AD.at[sent.index_PC].get(mode="fill", fill_value=0))
    return received.reshape(-1, rows_AD.shape[1])[order.sorted_R]


def _return(result_RD: jax.Array, sent: _Sent, order: _Order, into_AD: jax.Array) -> jax.Array:
    """`into_AD` with the results of the rows that this device sent in a round."""
    returned = _swap(result_RD[order.back_R].reshape(*sent.index_PC.shape, -1))
    return into_AD.at[sent.index_PC].set(returned, mode="drop", unique_indices=True)


def _plan(exchange: _Exchange, number: jax.Array, sizes_E: jax.Array, total: int) -> tuple[_Sent, _Order]:
    sent = _sent(exchange, number, sizes_E, total)
    return sent, _order(_swap(sent.counts_PL), exchange.capacity)


def _one_round(exchange: _Exchange, number, rows_AD, weights: Weights, sizes_E, into_AD) -> jax.Array:
    sent, order = _plan(exchange, number, sizes_E, rows_AD.shape[0])
    result_RD = exchange.compute(_send(rows_AD, sent, order), *weights, order.sizes_L)
    return _return(result_RD, sent, order, into_AD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(exchange: _Exchange, rows_AD, weights: Weights, sizes_E, rounds) -> jax.Array:
    """The results of all rounds but the first, zeros elsewhere."""

    def one(number, into_AD):
        return _one_round(exchange, number, rows_AD, weights, sizes_E, into_AD)

    return lax.fori_loop(1, rounds, one, jnp.zeros_like(rows_AD))


def _further_forward(exchange, rows_AD, weights, sizes_E, rounds):
    return _further_rounds(exchange, rows_AD, weights, sizes_E, rounds), (rows_AD, weights, sizes_E, rounds)


def _further_backward(exchange, saved, d_result_AD):
    rows_AD, weights, sizes_E, rounds = saved

    def one(number, carry):
        d_rows_AD, totals = carry
        sent, order = _plan(exchange, number, sizes_E, rows_AD.shape[0])
        received_RD, d_received_RD = (_send(array, sent, order) for array in (rows_AD, d_result_AD))
        _, gradient = jax.vjp(lambda x, w: exchange.compute(x, *w, order.sizes_L), received_RD, weights)
        d_x_RD, d_weights = gradient(d_received_RD)
        totals = jax.tree.map(lambda total, d: total + d.astype(total.dtype), totals, d_weights)
        return _return(d_x_RD, sent, order, d_rows_AD), totals

    wide = jnp.promote_types(rows_AD.dtype, jnp.float32)
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, wide), weights)
    d_rows_AD, totals = lax.fori_loop(1, rounds, one, (jnp.zeros_like(rows_AD), zeros))
    d_weights = jax.tree.map(lambda total, w: total.astype(w.dtype), totals, weights)
    return d_rows_AD, d_weights, None, None


_further_rounds.defvjp(_further_forward, _further_backward)
