"""Cross-entropy over the vocabulary in blocks of tokens: the [T, V] array of logits never exists.

Letters: T tokens, b tokens of a block, D width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sharding.place import Place

ALONE = Place()


def _blocks(array: jax.Array, block: int) -> jax.Array:
    """[T, ...] -> [ceil(T / block), block, ...], padded with zeros."""
    padding = -array.shape[0] % block
    padded = jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
    return padded.reshape(-1, block, *array.shape[1:])


def _logits(hidden_bD: jax.Array, head_DV: jax.Array) -> jax.Array:
    accumulate = jnp.promote_types(hidden_bD.dtype, jnp.float32)
    return jnp.matmul(hidden_bD, head_DV, preferred_element_type=accumulate)


def token_losses(
    hidden_TD: jax.Array, head_DV: jax.Array, targets_T: jax.Array, block: int, place: Place = ALONE
) -> jax.Array:
    """-log softmax(hidden head)[target] of each token, [T], in at least float32.

    Forward and backward hold the logits of `block` tokens at a time; the backward pass computes them again. On a tensor
    axis `head_DV` is this device's part of the vocabulary, and so are the logits.
    """
    losses: Any = _token_losses(hidden_TD, head_DV, targets_T, block, place)
    return losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_losses(hidden_TD, head_DV, targets_T, block, place):
    return _forward(hidden_TD, head_DV, targets_T, block, place)[0]


def _normalizer(logits_bV: jax.Array, place: Place) -> jax.Array:
    """log of the sum of exp(logits) over the whole vocabulary, [b]."""
    largest_b = place.largest(jnp.max(logits_bV, axis=1), "tensor")
    return largest_b + jnp.log(place.joined(jnp.sum(jnp.exp(logits_bV - largest_b[:, None]), axis=1)))


def _is_target(targets_b: jax.Array, size: int, place: Place) -> jax.Array:
    """Which of this device's tokens is the target, [b, V]; perhaps none."""
    return place.first("tensor", size) + jnp.arange(size) == targets_b[:, None]


def _forward(hidden_TD, head_DV, targets_T, block, place):
    def one_block(_, part):
        hidden_bD, targets_b = part
        logits_bV = _logits(hidden_bD, head_DV)
        if place.copies == 1:
            target_logit_b = jnp.take_along_axis(logits_bV, targets_b[:, None], axis=1)[:, 0]
            return None, (jax.nn.logsumexp(logits_bV, axis=-1), target_logit_b)
        is_target_bV = _is_target(targets_b, head_DV.shape[1], place)
        target_logit_b = place.joined(jnp.sum(jnp.where(is_target_bV, logits_bV, 0), axis=1))
        return None, (_normalizer(logits_bV, place), target_logit_b)

    parts = (_blocks(hidden_TD, block), _blocks(targets_T, block))
    _, (normalizer, target_logit) = jax.lax.scan(one_block, None, parts)
    T = targets_T.shape[0]
    normalizer_T, target_logit_T = normalizer.reshape(-1)[:T], target_logit.reshape(-1)[:T]
    return normalizer_T - target_logit_T, (hidden_TD, head_DV, targets_T, normalizer_T)


def _backward(block, place, saved, d_loss_T):
    hidden_TD, head_DV, targets_T, normalizer_T = saved
    d_loss_T = place.joined(d_loss_T)  # every device of the axis used the loss
    accumulate = jnp.promote_types(head_DV.dtype, jnp.float32)

    def one_block(d_head_DV, part):
        hidden_bD, targets_b, normalizer_b, d_loss_b = part
        probability_bV = jnp.exp(_logits(hidden_bD, head_DV) - normalizer_b[:, None])
        is_target_bV = _is_target(targets_b, head_DV.shape[1], place)
        d_logits_bV = (d_loss_b[:, None] * (probability_bV - is_target_bV)).astype(hidden_bD.dtype)
        d_head_DV += jnp.matmul(hidden_bD.T, d_logits_bV, preferred_element_type=accumulate)
        return d_head_DV, d_logits_bV @ head_DV.T

    parts = tuple(_blocks(array, block) for array in (hidden_TD, targets_T, normalizer_T, d_loss_T))
    d_head_DV, d_hidden = jax.lax.scan(one_block, jnp.zeros(head_DV.shape, accumulate), parts)
    d_hidden_TD = d_hidden.reshape(-1, hidden_TD.shape[1])[: hidden_TD.shape[0]]
    return d_hidden_TD, d_head_DV.astype(head_DV.dtype), None


_token_losses.defvjp(_forward, _backward)
