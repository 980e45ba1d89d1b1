"""Layers on several devices: a circular pipeline over the repeats of the super-block.

Each of P devices along the stage axis has rows of its own, and computes on all of theirs: it has every P-th repeat, so a
micro-batch goes round all devices as many times as each has repeats, its *rounds*. Before and after the layers each device
has its own rows again, so embeddings, images and losses are computed once. At every tick a device takes what the one before
it made; the first takes new micro-batches, then those that come round. M x rounds + P - 1 ticks, of which P - 1 are idle.

Letters: P devices, M micro-batches of all of them, c of one, b rows of a micro-batch, R repeats.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.place import Place

AXIS = "stage"


def dealt(place: Place, repeats: jax.Array) -> jax.Array:
    """Of an array over all repeats, of which each device has a row of R/P, every P-th one: [R/P, ...] -> [R/P, ...]."""
    P, each, mine = place.size(AXIS), repeats.shape[0], lax.axis_index(AXIS)
    if each == 1:
        return repeats
    room = -(-each // P)  # most repeats that go from one device to another
    sent = np.full((P, P, room), each)  # [from, to]: which of its own, or none
    found = np.zeros((P, each), int)  # [to]: where they are in what it received
    for number in range(P * each):
        source, target = number // each, number % P
        place_in = int((sent[source, target] < each).sum())
        sent[source, target, place_in] = number % each
        found[target, number // P] = source * room + place_in
    buffers = repeats.at[jnp.asarray(sent)[mine]].get(mode="fill", fill_value=0)
    received = lax.all_to_all(buffers, AXIS, 0, 0, tiled=True)
    return received.reshape(P * room, *repeats.shape[1:])[jnp.asarray(found)[mine]]


def every(place: Place, repeats: jax.Array) -> jax.Array:
    """The same of an array that every device has whole, [R, ...]."""
    return repeats.reshape(-1, place.size(AXIS), *repeats.shape[1:])[:, lax.axis_index(AXIS)]


def of_all(place: Place, mine: jax.Array) -> jax.Array:
    """[R/P, ...] of the repeats of `every` among zeros for those of the other devices, [R, ...]."""
    zeros = jnp.zeros((mine.shape[0], place.size(AXIS), *mine.shape[1:]), mine.dtype)
    return zeros.at[:, lax.axis_index(AXIS)].set(mine).reshape(-1, *mine.shape[1:])


def micro_batches(place: Place, rows: jax.Array) -> jax.Array:
    """Rows of all devices as micro-batches, [P x c x b, ...] -> [M, b, ...]: number n is device n % P's, its n // P-th."""
    split = lax.all_gather(rows.reshape(place.stage_batches, -1, *rows.shape[1:]), AXIS)
    return split.swapaxes(0, 1).reshape(-1, *split.shape[2:])


def pipeline(
    place: Place,
    layers: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]],
    rows: jax.Array,
    rounds: int,
) -> tuple[jax.Array, Any]:
    """All layers on this device's rows, and the sums over the micro-batches of what they tell, [rounds, ...].

    Args:
        layers: (micro-batch [b, ...], its number, the round, whether there is one at all) -> (micro-batch, what is told).
        rows: [c x b, ...].
    """
    P, c, mine = place.size(AXIS), place.stage_batches, lax.axis_index(AXIS)
    M, last = P * c, P - 1
    slots = rows.reshape(c, -1, *rows.shape[1:])
    following = [(i, (i + 1) % P) for i in range(P)]
    preceding = [(i, (i - 1) % P) for i in range(P)]

    def tick(carry, t):
        arrived, waiting, entering, leaving, done, told = carry
        work = t - mine
        real, number, round_ = (work >= 0) & (work < M * rounds), work % M, jnp.clip(work // M, 0, rounds - 1)
        # New micro-batches come to the first device one by one, as each device passes one on to the one before.
        entering = jnp.where(t % P == 0, slots[jnp.minimum(t // P, c - 1)], entering)
        # Those that have been round wait there for their turn.
        waiting = waiting.at[(t - P) % M].set(arrived)
        first = jnp.where(work < M, entering, waiting[number])
        made, tells = layers(jnp.where(mine == 0, first, arrived), number, round_, real)
        told = jax.tree.map(lambda sums, one: sums.at[round_].add(jnp.where(real, one, 0)), told, tells)
        # Those that are done go the same way back: P of them are P devices' when the last one is made.
        finished = t - last - M * (rounds - 1)
        leaving = jnp.where((mine == last) & (finished >= 0), made, leaving)
        kept = done.at[jnp.clip(finished // P, 0, c - 1)].set(leaving)
        done = jnp.where((finished >= 0) & (finished % P == last), kept, done)
        arrived = lax.ppermute(made, AXIS, following)
        entering, leaving = lax.ppermute((entering, leaving), AXIS, preceding)
        return (arrived, waiting, entering, leaving, done, told), None

    empty = jnp.zeros_like(slots[0])
    shapes = jax.eval_shape(layers, empty, *(jnp.zeros((), kind) for kind in (jnp.int32, jnp.int32, bool)))[1]
    told = jax.tree.map(lambda leaf: jnp.zeros((rounds, *leaf.shape), leaf.dtype), shapes)
    waiting = jnp.zeros((M, *empty.shape), empty.dtype)
    start = (empty, waiting, empty, empty, jnp.zeros_like(slots), told)
    (_, _, _, _, done, told), _ = lax.scan(tick, start, jnp.arange(M * rounds + last))
    return done.reshape(rows.shape), told
