"""Attention in blocks, next to all scores at once, in float64: values, gradients, and what is not computed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import blockwise
from model.blockwise import Blockwise, Tokens, allowed, blockwise_attention

B, K, G, H = 2, 2, 3, 4
CHUNK = 6
DOCUMENTS = ([7, 1, 12, 9], [29])
"""Lengths in each row; what is left is padding."""


def row_tokens(length: int) -> Tokens:
    segments, positions = np.zeros((B, length), np.int32), np.zeros((B, length), np.int32)
    for b, lengths in enumerate(DOCUMENTS):
        segment = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        position = np.concatenate([np.arange(n) for n in lengths])
        segments[b, : len(segment)], positions[b, : len(segment)] = segment, position
    return Tokens(jnp.asarray(segments), jnp.asarray(positions), jnp.zeros(B, jnp.int32))


def at_once(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Slow and obvious; a query that sees no key has zeros."""
    scores = jnp.where(mask[:, None, :, None], jnp.einsum("bkqgh,bkth->bkqgt", q, k), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True, initial=-1e9))
    return jnp.einsum("bkqgt,bkth->bkqgh", weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30), v)


def random(Q: int, T: int) -> list[jax.Array]:
    """q, k, v and the gradient of the result."""
    rng = np.random.default_rng(Q + T)
    shapes = ((B, K, Q, G, H), (B, K, T, H), (B, K, T, H), (B, K, Q, G, H))
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def close(found: Any, expected: Any) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), found, expected)


def check(chunk: int | None, queries: slice, keys: slice) -> None:
    """Some queries of the rows, with some keys of them."""
    row = row_tokens(32)
    at_queries, at_keys = (row.part(part.start, part.stop - part.start) for part in (queries, keys))
    q, k, v, d_out = random(at_queries.positions.shape[1], at_keys.positions.shape[1])
    mask = allowed(at_queries, at_keys, chunk)
    expected, gradient = jax.vjp(lambda q, k, v: at_once(q, k, v, mask), q, k, v)
    found, found_gradient = jax.vjp(
        lambda q, k, v: blockwise_attention(Blockwise(chunk), q, k, v, at_queries, at_keys), q, k, v
    )
    close(found, expected)
    close(found_gradient(d_out), gradient(d_out))


@pytest.mark.parametrize("block", [1, 5, 8, 100])
@pytest.mark.parametrize("chunk", [None, CHUNK])
def test_values_and_gradients_are_those_of_all_scores_at_once(
    chunk: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", block)
    with jax.enable_x64(True):
        check(chunk, slice(0, 32), slice(0, 32))
        check(chunk, slice(9, 20), slice(2, 26))
        check(chunk, slice(0, 8), slice(16, 30))  # nothing to see


def test_keys_may_come_in_parts_and_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do on a ring of devices."""
    monkeypatch.setattr(blockwise, "BLOCK", 5)
    with jax.enable_x64(True):
        row, kernel = row_tokens(32), Blockwise(None)
        q, k, v, d_out = random(32, 32)
        expected, gradient = jax.vjp(lambda q, k, v: at_once(q, k, v, allowed(row, row, None)), q, k, v)
        parts = [(k[:, :, at : at + 8], v[:, :, at : at + 8], row.part(at, 8)) for at in (16, 0, 24, 8)]
        sums = kernel.start(q)
        for k_part, v_part, tokens in parts:
            sums = kernel.add(sums, q, k_part, v_part, row, tokens)
        out, log_total = kernel.finish(sums, q.dtype)
        close(out, expected)
        given = kernel.given(d_out, out, log_total)
        found = [kernel.gradient(given, q, *part[:2], row, part[2]) for part in parts]
        in_order = [found[i] for i in (1, 3, 0, 2)]
        d_k, d_v = (np.concatenate([part[i] for part in in_order], axis=2) for i in (1, 2))
        close((sum(part[0] for part in found), d_k, d_v), gradient(d_out))


def test_blocks_that_nobody_sees_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN times zero would show."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    row = row_tokens(32)
    q, k, v, d_out = (array.astype(jnp.float32) for array in random(32, 32))
    for chunk, first, last in ((None, 20, 28), (CHUNK, 20, 28), (CHUNK, 28, 32)):
        queries = row.part(first, last - first)
        seen = np.asarray(allowed(queries, row, chunk))
        for b in range(B):
            hidden = np.ones(32, bool)
            blocks = np.flatnonzero(seen[b].any(axis=0)) // 4
            hidden[blocks.min() * 4 : blocks.max() * 4 + 4] = False
            poison = jnp.where(hidden[:, None], jnp.nan, 0)
            out, gradient = jax.vjp(
                lambda q, k, v: blockwise_attention(Blockwise(chunk), q, k, v, queries, row),  # noqa: B023
                q[:, :, first:last],
                k + poison,
                v + poison,
            )
            assert hidden.any() and np.isfinite(out[b]).all()
            assert np.isfinite(gradient(d_out[:, :, first:last])[0][b]).all()


def test_a_block_that_is_left_out_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "BLOCK", 5)
    monkeypatch.setattr(Blockwise, "_seen", lambda self, queries, keys: (1, 2))
    with jax.enable_x64(True), pytest.raises(AssertionError):
        check(None, slice(0, 32), slice(0, 32))
