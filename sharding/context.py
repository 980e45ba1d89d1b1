"""Attention of rows that are split over devices along the context axis: each has the same share of every row, in order.

Layers that reach back a little (chunks) fetch the keys and values just left of their share. Layers that see everything
before them pass all keys and values round a ring. There a device computes a half of its own share and a half of its mirror
image's, so that each has the same work at each step, though the last share sees the most: half h of 2n sees h halves.

Letters: B rows, K key/value heads, G query heads that share one, S tokens of a share, H head width, n devices, h half.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from sharding.place import Place

AXIS = "context"


class Kernel(Protocol):
    """Attention that sums up over keys as they come (`model.blockwise.Blockwise`)."""

    def start(self, q: jax.Array, /) -> Any: ...
    def add(self, sums: Any, q: jax.Array, k: jax.Array, v: jax.Array, queries: Any, keys: Any, /) -> Any: ...
    def finish(self, sums: Any, dtype: Any, /) -> tuple[jax.Array, jax.Array]: ...
    def given(self, d_out: jax.Array, out: jax.Array, log_total: jax.Array, /) -> Any: ...
    def gradient(self, given: Any, q: jax.Array, k: jax.Array, v: jax.Array, queries: Any, keys: Any, /) -> Any: ...


class Tokens(Protocol):
    """Where the tokens of whole rows stand (`model.blockwise.Tokens`)."""

    def part(self, start: Any, size: int, /) -> Any: ...


def from_the_left(place: Place, share: jax.Array, count: int) -> jax.Array:
    """The `count` tokens before this device's share [B,K,S,...], fetched; zeros where the row has not begun."""
    size, n = share.shape[2], place.size(AXIS)
    fetched = []
    for distance in range(-(-count // size), 0, -1):
        wanted = min(size, count - (distance - 1) * size)
        pairs = [(i, i + distance) for i in range(n - distance)]
        fetched.append(lax.ppermute(share[:, :, size - wanted :], AXIS, pairs))
    return jnp.concatenate(fetched, axis=2) if fetched else share[:, :, :0]


def ring_attention(kernel: Kernel, place: Place, q: jax.Array, k: jax.Array, v: jax.Array, row: Tokens) -> jax.Array:
    """Attention of this device's share of the queries, [B,K,S,G,H], to keys and values [B,K,S,H] of all shares.

    `row`: the tokens of the whole row. Two halves of queries meet two halves of keys at each step but the first.
    """
    out: Any = _ring(kernel, place, q, k, v, row)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(kernel, place, q, k, v, row):
    return _ring_forward(kernel, place, q, k, v, row)[0]


def _halves(place: Place, shares: Any) -> Any:
    """Shares [B,K,S,...] -> [2,B,K,h,...]: the first half of this device's, and the second half of its mirror image's."""

    def halves(share: jax.Array) -> jax.Array:
        first, second = jnp.split(share, 2, axis=2)
        return jnp.stack([first, _mirrored(place, second)])

    return jax.tree.map(halves, shares)


def _shares(place: Place, halves: jax.Array) -> jax.Array:
    """Back from `_halves`."""
    return jnp.concatenate([halves[0], _mirrored(place, halves[1])], axis=2)


def _mirrored(place: Place, array: jax.Array) -> jax.Array:
    """What the mirror image of this device has."""
    n = place.size(AXIS)
    return lax.ppermute(array, AXIS, [(i, n - 1 - i) for i in range(n)])


def _passed_on(place: Place, arrays: Any) -> Any:
    """What the device before had."""
    n = place.size(AXIS)
    return lax.ppermute(arrays, AXIS, [(i, (i + 1) % n) for i in range(n)])


def _meetings(place: Place, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Which halves of queries meet which halves of keys at a step of the ring; at step 0, of a device with itself, both
    also meet themselves."""
    n, mine = place.size(AXIS), lax.axis_index(AXIS)
    owner = (mine - step) % n
    alike = jnp.where(mine >= owner, 0, 1)  # half 2 mine sees half 2 owner, or the mirrored ones do so
    across = jnp.where(mine + owner >= n, 0, 1)  # half 2 mine sees the owner's mirrored one, or the other way round
    queries, keys = jnp.stack([alike, across]), jnp.stack([alike, 1 - across])
    if isinstance(step, int):
        queries, keys = (jnp.concatenate([jnp.ones(1, jnp.int32), halves]) for halves in (queries, keys))
    return queries, keys


def _standing(place: Place, row: Tokens, device: jax.Array, slot: jax.Array, size: int) -> Any:
    """Where the tokens of a device's half stand."""
    number = jnp.where(slot == 0, 2 * device, 2 * place.size(AXIS) - 1 - 2 * device)
    return row.part(number * size, size)


def _each_step(place: Place, meet: Any, results: Any, passed: Any) -> tuple[Any, Any]:
    """`meet(step, queries' half, keys' half, results, passed)` gives results and passed for each meeting of each step."""

    def meetings(step: Any, results: Any, passed: Any) -> tuple[Any, Any]:
        queries, keys = _meetings(place, step)
        return lax.fori_loop(
            0, len(queries), lambda i, carry: meet(step, queries[i], keys[i], *carry), (results, passed)
        )

    def after_the_first(step: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        results, passed = carry
        return meetings(step, results, _passed_on(place, passed))

    return lax.fori_loop(1, place.size(AXIS), after_the_first, meetings(0, results, passed))


def _ring_forward(kernel, place, q, k, v, row):
    q, k, v = _halves(place, (q, k, v))
    mine, n, size = lax.axis_index(AXIS), place.size(AXIS), q.shape[3]

    def meet(step, a, b, sums, passed):
        k, v = passed
        at_queries = _standing(place, row, mine, a, size)
        at_keys = _standing(place, row, (mine - step) % n, b, size)
        met = kernel.add(_of(sums, a), q[a], k[b], v[b], at_queries, at_keys)
        return jax.tree.map(lambda all, one: all.at[a].set(one), sums, met), passed

    sums, _ = _each_step(place, meet, kernel.start(q), (k, v))
    out, log_total = kernel.finish(sums, q.dtype)
    return _shares(place, out), (q, k, v, out, log_total, row)


def _ring_backward(kernel, place, saved, d_out):
    q, k, v, out, log_total, row = saved
    given = kernel.given(_halves(place, d_out), out, log_total)
    mine, n, size = lax.axis_index(AXIS), place.size(AXIS), q.shape[3]
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def meet(step, a, b, d_q, passed):
        k, v, d_k, d_v = passed
        at_queries = _standing(place, row, mine, a, size)
        at_keys = _standing(place, row, (mine - step) % n, b, size)
        d_q_a, d_k_b, d_v_b = kernel.gradient(_of(given, a), q[a], k[b], v[b], at_queries, at_keys)
        return d_q.at[a].add(d_q_a), (k, v, d_k.at[b].add(d_k_b), d_v.at[b].add(d_v_b))

    zeros = [jnp.zeros(array.shape, wide) for array in (q, k, v)]
    d_q, (_, _, *d_keys) = _each_step(place, meet, zeros[0], (k, v, *zeros[1:]))
    d_k, d_v = _passed_on(place, d_keys)  # once more, and they are where they belong
    gradients = ((d_q, q), (d_k, k), (d_v, v))
    return *(_shares(place, d.astype(like.dtype)) for d, like in gradients), None


_ring.defvjp(_ring_forward, _ring_backward)


def _of(tree: Any, half: jax.Array) -> Any:
    return jax.tree.map(lambda array: array[half], tree)
