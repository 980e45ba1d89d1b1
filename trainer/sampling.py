"""The next token from logits: the likeliest, or a draw by temperature and nucleus, on the device.

Letters: B rows, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw."""

    key: jax.Array
    """Of the request; the draws of a row depend on it, on the row's number and on the position, on nothing else."""
    temperature: jax.Array
    """More than 0; logits are divided by it."""
    top_p: jax.Array | None
    """Only the nucleus of this probability is drawn from; None for the whole vocabulary."""


def nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits of the fewest tokens whose probability reaches `top_p`, -inf elsewhere (arXiv 1904.09751).

    The likeliest token always stays; of equally likely ones, those of lower ids come first.
    """
    order_BV = jnp.argsort(logits_BV, axis=1, descending=True, stable=True)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    sorted_BV = jax.nn.softmax(logits_BV, axis=1)[rows_B1, order_BV]
    before_BV = jnp.cumsum(sorted_BV, axis=1)[:, :-1]
    stays_BV = jnp.concatenate([jnp.ones_like(rows_B1, bool), before_BV < top_p], axis=1)
    kept_BV = jnp.zeros_like(stays_BV).at[rows_B1, order_BV].set(stays_BV, unique_indices=True)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def choose(
    logits_BV: jax.Array, positions_B: jax.Array, sampling: Sampling | None, rows_B: jax.Array | None = None
) -> jax.Array:
    """The token of each row at its position, int32 [B]; without `sampling` the likeliest one, the first of equals.

    `rows_B`: the rows' numbers, where they are in another order.
    """
    if sampling is None:
        return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
    # From the largest one down, so that no temperature, however low, divides to infinity.
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)) / sampling.temperature
    if sampling.top_p is not None:
        logits_BV = nucleus(logits_BV, sampling.top_p)

    def noise(row: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(sampling.key, row), position)
        return jax.random.gumbel(key, logits_BV.shape[1:], logits_BV.dtype)

    # The largest of logits + Gumbel noise is a draw from the softmax.
    noise_BV = jax.vmap(noise)(jnp.arange(logits_BV.shape[0]) if rows_B is None else rows_B, positions_B)
    return jnp.argmax(logits_BV + noise_BV, axis=1).astype(jnp.int32)
