"""Sparse targets drawn from a teacher's distribution, and a student's loss on them (arXiv 2503.16870).

A token's target is not the teacher's distribution p over the whole vocabulary but N draws from it, or from a flatter
proposal with importance weights. The expectation of the loss and of its gradient over the draws is that of p itself.
Both sides go through the vocabulary in blocks, all tokens at a time; what is kept of a block are a few numbers a token.

Letters: T tokens, D width, V vocabulary (on a tensor axis this device's part), b ids of a block, B blocks, N draws,
K ids kept of a token.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sharding.place import Place

ALONE = Place()


@dataclass(frozen=True)
class Recipe:
    """How targets are made of the teacher's distribution."""

    draws: int
    """Draws a token, with replacement."""
    temperature: float
    """Of the distribution that the student learns, p ~ exp(logits / temperature)."""
    proposal: float
    """Draws come from q ~ p ** proposal: 1 is p itself, and below that unlikely ids are drawn more often, of less weight."""
    top_k: int
    """Above 0 the most likely ids stand in for draws, with their probabilities: a biased target, whatever the tail."""


class Targets(NamedTuple):
    """What is kept of the teacher's distribution at each token."""

    ids_TK: jax.Array
    """Distinct ids, ascending, int32; then slots without one, -1."""
    weights_TK: jax.Array
    """What the ids stand for: shares of the draws, importance weights p / q / N summed over the draws (their sum is 1 in
    expectation only), or probabilities of the most likely ids."""
    counts_TK: jax.Array
    """Draws of each id, int32; 1 of each of the most likely ids."""
    target_log_prob_T: jax.Array
    """The teacher's log-probability of the hard target, at temperature 1."""
    entropy_T: jax.Array
    """The teacher's entropy at temperature 1, nats."""
    correct_T: jax.Array
    """Whether the teacher holds no id likelier than the hard target."""


def draw_targets(
    hidden_TD: jax.Array,
    head_DV: jax.Array,
    targets_T: jax.Array,
    keys_T: jax.Array,
    recipe: Recipe,
    *,
    block: int,
    place: Place = ALONE,
) -> Targets:
    """Targets from the teacher's last hidden states and head; no gradient goes back to either.

    `keys_T`: uint32 [T, 2], a threefry key for each token, on which its draws depend, and on its distribution and the
    recipe. Where blocks or a tensor axis add up probabilities in another order, a draw within rounding of the boundary
    between two ids may go to the other one. Numbers are in at least float32.
    """
    hidden_TD, head_DV = lax.stop_gradient((hidden_TD, head_DV))
    powers = 1.0, 1 / recipe.temperature, recipe.proposal / recipe.temperature

    def one_block(target_logit_T, part):
        return target_logit_T + part.at(targets_T[:, None])[:, 0], _sums(part.logits_Tb, powers)

    zeros_T = jnp.zeros(targets_T.shape, _precision(hidden_TD))
    target_logit_T, sums = _through(one_block, zeros_T, hidden_TD, head_DV, block, place)
    target_logit_T = place.joined(target_logit_T)
    largest_T = sums.largest(place)
    total_T, total_p_T, total_q_T = (sums.total(i, power, largest_T, place) for i, power in enumerate(powers))
    log_prob_T = target_logit_T - largest_T - jnp.log(total_T)
    facts = log_prob_T, sums.entropy(largest_T, place), target_logit_T >= largest_T
    if recipe.top_k:
        ids_TK, logits_TK = _likeliest(hidden_TD, head_DV, recipe.top_k, block, place)
        log_p_TK = (logits_TK - largest_T[:, None]) / recipe.temperature - jnp.log(total_p_T)[:, None]
        used_TK = ids_TK >= 0
        return Targets(ids_TK, jnp.where(used_TK, jnp.exp(log_p_TK), 0), used_TK.astype(jnp.int32), *facts)

    uniforms = _uniforms(keys_T, recipe.draws, total_T.dtype)
    ids_TN, logits_TN = _drawn(hidden_TD, head_DV, uniforms, powers[-1], sums, block, place)
    ids_TK, logits_TK, counts_TK = _distinct(ids_TN, logits_TN)
    weights_TK = counts_TK.astype(logits_TK.dtype) / recipe.draws
    if recipe.proposal != 1:
        above_TK = (logits_TK - largest_T[:, None]) / recipe.temperature
        log_ratio_TK = (1 - recipe.proposal) * above_TK + jnp.log(total_q_T / total_p_T)[:, None]
        weights_TK *= jnp.where(counts_TK > 0, jnp.exp(log_ratio_TK), 0)
    return Targets(ids_TK, weights_TK, counts_TK, *facts)


def sparse_losses(
    hidden_TD: jax.Array,
    head_DV: jax.Array,
    targets_T: jax.Array,
    ids_TK: jax.Array,
    weights_TK: jax.Array,
    *,
    temperature: float,
    tail: bool,
    block: int,
    place: Place = ALONE,
) -> tuple[jax.Array, jax.Array]:
    """A student's cross-entropies with its hard targets and with its sparse ones, both [T], in at least float32.

    The first is that of `model.vocab_loss.token_losses`. The second is temperature ** 2 times minus the sum over k of
    weights_k log q(ids_k), where q is the student's distribution at the temperature; with `tail` all other ids count as
    one more, of weight 1 - sum of weights. The backward pass computes the logits of a block again.
    """
    losses: Any = _losses(hidden_TD, head_DV, targets_T, ids_TK, weights_TK, temperature, tail, block, place)
    return losses


def _precision(hidden_TD: jax.Array) -> Any:
    return jnp.promote_types(hidden_TD.dtype, jnp.float32)


class _Part(NamedTuple):
    """A block of this device's part of the vocabulary, of all tokens."""

    head_Db: jax.Array
    logits_Tb: jax.Array
    """-inf for ids that belong to the block before: the last block reaches back over it, not beyond the end."""
    start: jax.Array
    """Where the block begins in this device's part."""
    first: jax.Array
    """Its first id."""
    inputs: Any
    """What `_through` was given for this block."""

    @property
    def ids_b(self) -> jax.Array:
        return self.first + jnp.arange(self.logits_Tb.shape[1], dtype=jnp.int32)

    def at(self, ids_TK: jax.Array) -> jax.Array:
        """Logits of the ids [T, K]; 0 for those of other blocks."""
        index_TK, here_TK = self._index(ids_TK)
        found_TK = jnp.take_along_axis(self.logits_Tb, jnp.where(here_TK, index_TK, 0), axis=1)
        return jnp.where(here_TK & (found_TK > -jnp.inf), found_TK, 0)

    def put(self, array_Tb: jax.Array, ids_TK: jax.Array, values_TK: jax.Array) -> jax.Array:
        """The array with values at those of the ids, distinct ones, that are in the block."""
        index_TK, here_TK = self._index(ids_TK)
        # Ids of other blocks go to places of their own beyond the end: with all places distinct, a scatter is parallel
        # and yet deterministic.
        index_TK = jnp.where(here_TK, index_TK, array_Tb.shape[1] + jnp.arange(ids_TK.shape[1]))

        def put_row(row_b, index_K, values_K):
            return row_b.at[index_K].set(values_K, mode="drop", unique_indices=True)

        return jax.vmap(put_row)(array_Tb, index_TK, values_TK)

    def others(self, ids_TK: jax.Array) -> jax.Array:
        """Logits of the block, -inf for the ids."""
        return self.put(self.logits_Tb, ids_TK, jnp.full(ids_TK.shape, -jnp.inf, self.logits_Tb.dtype))

    def _index(self, ids_TK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where in the block the ids are, and whether they are in it."""
        index_TK = ids_TK - self.first
        return index_TK, (index_TK >= 0) & (index_TK < self.logits_Tb.shape[1])


def _through(
    step: Callable[[Any, _Part], tuple[Any, Any]],
    carry: Any,
    hidden_TD: jax.Array,
    head_DV: jax.Array,
    block: int,
    place: Place,
    inputs: Any = None,
) -> tuple[Any, Any]:
    """`lax.scan` over the blocks of this device's part of the vocabulary; `inputs` are arrays [B, ...]."""
    V = head_DV.shape[1]
    size = min(block, V)

    def one_block(carry, numbered):
        number, own = numbered
        start = jnp.minimum(number * size, V - size)
        head_Db = lax.dynamic_slice_in_dim(head_DV, start, size, axis=1)
        logits_Tb = jnp.matmul(hidden_TD, head_Db, preferred_element_type=_precision(hidden_TD))
        logits_Tb = jnp.where(start + jnp.arange(size) >= number * size, logits_Tb, -jnp.inf)
        return step(carry, _Part(head_Db, logits_Tb, start, place.first("tensor", V) + start, own))

    return lax.scan(one_block, carry, (jnp.arange(-(-V // size), dtype=jnp.int32), inputs))


class _Sums(NamedTuple):
    """Sums over the ids of each block, relative to its largest logit: nothing overflows, nothing that counts is lost."""

    largest_BT: jax.Array
    """-inf where a block has no id that counts."""
    totals_BT: tuple[jax.Array, ...]
    """Of exp(power (logit - largest)), for each of the powers."""
    tilted_BT: jax.Array
    """Of (logit - largest) exp(logit - largest)."""

    def largest(self, place: Place) -> jax.Array:
        """The largest logit of the whole vocabulary, [T]."""
        return place.largest(jnp.max(self.largest_BT, axis=0), "tensor")

    def total(self, index: int, power: float, largest_T: jax.Array, place: Place) -> jax.Array:
        """Sum of exp(power (logit - largest_T)) over the whole vocabulary, [T]."""
        return place.joined(jnp.sum(self.totals_BT[index] * jnp.exp(power * (self.largest_BT - largest_T)), axis=0))

    def entropy(self, largest_T: jax.Array, place: Place) -> jax.Array:
        """Of softmax(logits), where the first of the powers is 1, [T]."""
        below_BT = self.largest_BT - largest_T
        tilted_T = jnp.sum(jnp.exp(below_BT) * (self.tilted_BT + below_BT * self.totals_BT[0]), axis=0)
        total_T = self.total(0, 1, largest_T, place)
        return jnp.log(total_T) - place.joined(tilted_T) / total_T


def _sums(logits_Tb: jax.Array, powers: Sequence[float]) -> _Sums:
    """Those of one block."""
    largest_T = jnp.max(logits_Tb, axis=1)
    below_Tb = logits_Tb - jnp.where(largest_T > -jnp.inf, largest_T, 0)[:, None]
    totals = tuple(jnp.sum(jnp.exp(power * below_Tb), axis=1) for power in powers)
    tilted_T = jnp.sum(jnp.where(below_Tb > -jnp.inf, below_Tb * jnp.exp(below_Tb), 0), axis=1)
    return _Sums(largest_T, totals, tilted_T)


def _cumulative(mass: jax.Array) -> jax.Array:
    """Cumulative sums along the last dim that never fall, nor rise where the mass is 0, however they are rounded.

    A parallel sum adds up each prefix in its own order, so that its rounding alone would give ids of no mass a place.
    """
    return lax.cummax(jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0), axis=mass.ndim - 1)


def _uniforms(keys_T: jax.Array, draws: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Uniform numbers in (0, 1) as sums of two: multiples of 2 ** -23, and what lies between those; each [T, N].

    They are the same numbers in every precision, and fine enough for ids far less likely than 2 ** -23.
    """
    keys = jax.random.wrap_key_data(keys_T, impl="threefry2x32")
    words = jax.vmap(lambda key: jax.random.bits(key, (draws, 2), jnp.uint32))(keys) >> 9
    coarse_TN, fine_TN = words[..., 0].astype(dtype), words[..., 1].astype(dtype)
    return coarse_TN * 2.0**-23, (fine_TN + 0.5) * 2.0**-46


def _drawn(
    hidden_TD: jax.Array,
    head_DV: jax.Array,
    uniforms: tuple[jax.Array, jax.Array],
    power: float,
    sums: _Sums,
    block: int,
    place: Place,
) -> tuple[jax.Array, jax.Array]:
    """Ids and logits [T, N]: the first id up to which the probabilities exp(power logits) exceed the uniform number.

    The last of `sums.totals_BT` is of this power. It tells which block holds a draw, on whichever device, before any
    block is gone through again.
    """
    coarse_TN, fine_TN = uniforms
    largest_T = sums.largest(place)
    mass_BT = sums.totals_BT[-1] * jnp.exp(power * (sums.largest_BT - largest_T))
    B, T = mass_BT.shape
    all_BT = jnp.zeros((B * place.copies, T), mass_BT.dtype)
    all_BT = place.joined(lax.dynamic_update_slice_in_dim(all_BT, mass_BT, place.first("tensor", B), 0))
    sums_TB = _cumulative(all_BT.T)
    ends_TB = sums_TB / sums_TB[:, -1:]
    starts_TB = jnp.pad(ends_TB, ((0, 0), (1, 0)))
    # The last block with a mass is open at its end, for a draw that is rounded to 1: every draw is in some block.
    block_TN = _search(jnp.where(sums_TB < sums_TB[:, -1:], ends_TB, jnp.inf), coarse_TN + fine_TN)
    start_TN, end_TN = (jnp.take_along_axis(starts_TB, block_TN + i, axis=1) for i in (0, 1))
    # Relative to its block a draw has more digits than relative to the whole.
    within_TN = jnp.maximum((coarse_TN - start_TN) + fine_TN, 0) / (end_TN - start_TN)

    def one_block(carry, part):
        number, largest_T = part.inputs
        mass_Tb = _cumulative(jnp.exp(power * (part.logits_Tb - largest_T[:, None])))
        all_T = mass_Tb[:, -1:]
        index_TN = _search(mass_Tb, jnp.minimum(within_TN * all_T, jnp.nextafter(all_T, jnp.zeros_like(all_T))))
        ids_TN = jnp.where(block_TN == number, part.first + index_TN, -1)
        return jax.tree.map(jnp.add, carry, (jnp.maximum(ids_TN, 0), part.at(ids_TN))), None

    none = jnp.zeros(coarse_TN.shape, jnp.int32), jnp.zeros(coarse_TN.shape, mass_BT.dtype)
    inputs = place.first("tensor", B) + jnp.arange(B, dtype=jnp.int32), sums.largest_BT
    return place.joined(_through(one_block, none, hidden_TD, head_DV, block, place, inputs)[0])


def _search(sums: jax.Array, sought_TN: jax.Array) -> jax.Array:
    """How many of the cumulative sums [T, ...] are not above the numbers sought, int32 [T, N]."""
    return jax.vmap(functools.partial(jnp.searchsorted, side="right"))(sums, sought_TN).astype(jnp.int32)


NOWHERE = jnp.iinfo(jnp.int32).max
"""Stands in for the ids of unused slots where those are put last."""


def _distinct(ids_TN: jax.Array, logits_TN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Distinct ids ascending, their logits, their counts; -1, 0 and 0 in slots that are left."""
    N = ids_TN.shape[1]
    ids_TN, logits_TN = lax.sort((ids_TN, logits_TN), num_keys=1)
    new_TN = jnp.diff(ids_TN, axis=1, prepend=-1) > 0
    starts_TN = jnp.sort(jnp.where(new_TN, jnp.arange(N, dtype=jnp.int32), N), axis=1)
    counts_TK = jnp.diff(starts_TN, axis=1, append=N)
    used_TK, starts_TN = starts_TN < N, jnp.minimum(starts_TN, N - 1)
    ids_TK, logits_TK = (jnp.take_along_axis(array, starts_TN, axis=1) for array in (ids_TN, logits_TN))
    return jnp.where(used_TK, ids_TK, -1), jnp.where(used_TK, logits_TK, 0), counts_TK


def _likeliest(
    hidden_TD: jax.Array, head_DV: jax.Array, k: int, block: int, place: Place
) -> tuple[jax.Array, jax.Array]:
    """Ids, ascending, and logits of the k largest logits [T, K], of equal ones the first; -1 and -inf beyond the vocabulary."""

    def best(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_TK, index_TK = lax.top_k(logits, k)
        return logits_TK, jnp.take_along_axis(ids, index_TK, axis=1)

    def one_block(carry, part):
        ids_Tb = jnp.broadcast_to(part.ids_b, part.logits_Tb.shape)
        merged = (jnp.concatenate(pair, axis=1) for pair in zip(carry, (part.logits_Tb, ids_Tb), strict=True))
        return best(*merged), None

    T = hidden_TD.shape[0]
    none = jnp.full((T, k), -jnp.inf, _precision(hidden_TD)), jnp.full((T, k), -1, jnp.int32)
    (logits_TK, ids_TK), _ = _through(one_block, none, hidden_TD, head_DV, block, place)
    gathered = (jnp.zeros((T, k * place.copies), array.dtype) for array in (logits_TK, ids_TK))
    first = place.first("tensor", k)
    logits, ids = (
        place.joined(lax.dynamic_update_slice_in_dim(whole, own, first, 1))
        for whole, own in zip(gathered, (logits_TK, ids_TK), strict=True)
    )
    logits_TK, ids_TK = best(logits, ids)
    ids_TK, logits_TK = lax.sort((jnp.where(logits_TK > -jnp.inf, ids_TK, NOWHERE), logits_TK), num_keys=1)
    return jnp.where(ids_TK < NOWHERE, ids_TK, -1), logits_TK


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _losses(hidden_TD, head_DV, targets_T, ids_TK, weights_TK, temperature, tail, block, place):
    return _forward(hidden_TD, head_DV, targets_T, ids_TK, weights_TK, temperature, tail, block, place)[0]


def _forward(hidden_TD, head_DV, targets_T, ids_TK, weights_TK, temperature, tail, block, place):
    precision = _precision(hidden_TD)
    cool = 1 / temperature
    weights_TK = jnp.where(ids_TK >= 0, weights_TK, 0).astype(precision)

    def one_block(carry, part):
        logits = part.at(targets_T[:, None])[:, 0], part.at(ids_TK)
        sums = _sums(part.logits_Tb, (1.0, cool)), _sums(part.others(ids_TK), (cool,)) if tail else None
        return jax.tree.map(jnp.add, carry, logits), sums

    none = jnp.zeros(targets_T.shape, precision), jnp.zeros(ids_TK.shape, precision)
    logits, (sums, others) = _through(one_block, none, hidden_TD, head_DV, block, place)
    target_logit_T, logits_TK = place.joined(logits)
    largest_T = sums.largest(place)
    log_total_T, log_cool_T = (jnp.log(sums.total(i, power, largest_T, place)) for i, power in enumerate((1.0, cool)))
    cross_entropy_T = log_total_T - (target_logit_T - largest_T)
    log_q_TK = cool * (logits_TK - largest_T[:, None]) - log_cool_T[:, None]
    soft_T = -jnp.sum(weights_TK * log_q_TK, axis=1)
    rest = None
    if others is not None:
        other_T = others.largest(place)
        any_T = other_T > -jnp.inf
        other_T = jnp.where(any_T, other_T, 0)
        log_other_T = jnp.log(jnp.where(any_T, others.total(0, cool, other_T, place), 1))
        # Where the ids are the whole vocabulary there is no tail, though rounding may leave it some weight.
        weight_T = jnp.where(any_T, jnp.maximum(1 - jnp.sum(weights_TK, axis=1), 0), 0)
        soft_T -= weight_T * (cool * (other_T - largest_T) + log_other_T - log_cool_T)
        rest = weight_T, other_T, log_other_T
    saved = hidden_TD, head_DV, targets_T, ids_TK, weights_TK, largest_T, log_total_T, log_cool_T, rest
    return (cross_entropy_T, temperature**2 * soft_T), saved


def _backward(temperature, tail, block, place, saved, d_losses):
    hidden_TD, head_DV, targets_T, ids_TK, weights_TK, largest_T, log_total_T, log_cool_T, rest = saved
    precision, cool = _precision(hidden_TD), 1 / temperature
    d_cross_T, d_soft_T = place.joined(d_losses)  # every device of the axis used the losses
    d_soft_T = temperature * d_soft_T
    soft_weight_T = jnp.sum(weights_TK, axis=1)
    if tail:
        soft_weight_T += rest[0]

    def one_block(carry, part):
        d_hidden_TD, d_head_DV = carry
        below_Tb = part.logits_Tb - largest_T[:, None]
        hard_Tb = jnp.exp(below_Tb - log_total_T[:, None]) - (targets_T[:, None] == part.ids_b)
        soft_Tb = soft_weight_T[:, None] * jnp.exp(cool * below_Tb - log_cool_T[:, None])
        soft_Tb -= part.put(jnp.zeros_like(soft_Tb), ids_TK, weights_TK)
        if tail:
            weight_T, other_T, log_other_T = rest
            share_Tb = jnp.exp(cool * (part.others(ids_TK) - other_T[:, None]) - log_other_T[:, None])
            soft_Tb -= weight_T[:, None] * share_Tb
        d_logits_Tb = d_cross_T[:, None] * hard_Tb + d_soft_T[:, None] * soft_Tb
        d_logits_Tb = jnp.where(part.logits_Tb > -jnp.inf, d_logits_Tb, 0).astype(hidden_TD.dtype)
        d_hidden_TD += jnp.matmul(d_logits_Tb, part.head_Db.T, preferred_element_type=precision)
        d_head_Db = jnp.matmul(hidden_TD.T, d_logits_Tb, preferred_element_type=precision).astype(head_DV.dtype)
        d_head_Db += lax.dynamic_slice_in_dim(d_head_DV, part.start, d_head_Db.shape[1], axis=1)
        return (d_hidden_TD, lax.dynamic_update_slice_in_dim(d_head_DV, d_head_Db, part.start, axis=1)), None

    zeros = jnp.zeros(hidden_TD.shape, precision), jnp.zeros(head_DV.shape, head_DV.dtype)
    (d_hidden_TD, d_head_DV), _ = _through(one_block, zeros, hidden_TD, head_DV, block, place)
    return d_hidden_TD.astype(hidden_TD.dtype), d_head_DV, None, None, None


_losses.defvjp(_forward, _backward)
