"""Attention of packed rows, a block of queries and a block of keys at a time, forward and backward: no scores are kept.

The softmax is summed up as blocks of keys come (arXiv 1805.02867, arXiv 2205.14135), so keys may come in any order and from
any device: `sharding/context.py` passes them around. Blocks of keys that no query of a block can see are not computed.

Letters: B rows, Q queries, T keys, q and t those of a block, K key/value heads, G query heads that share one, H head width.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128
"""Queries, and keys, of a block: what fits in the caches of a CPU (`python -m benchmarks.attention`)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where tokens, side by side in packed rows, stand: [B,S], or [S] in one row."""

    segment_ids: jax.Array
    """Document of each token; 0 is padding."""
    positions: jax.Array
    """Position in the document."""
    first: jax.Array
    """Place of the first of them in the row, [B] or a number."""

    @property
    def places(self) -> jax.Array:
        """In the row."""
        return self.first[..., None] + jnp.arange(self.positions.shape[-1])

    def part(self, start: jax.Array | int, size: int) -> "Tokens":
        """`size` of them, from the one at `start` on."""
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=-1)
        return Tokens(cut(self.segment_ids), cut(self.positions), self.first + start)

    def padded(self, before: int, after: int) -> "Tokens":
        """With so much padding."""
        widths = ((0, 0),) * (self.positions.ndim - 1) + ((before, after),)
        return Tokens(jnp.pad(self.segment_ids, widths), jnp.pad(self.positions, widths), self.first - before)


def allowed(queries: Tokens, keys: Tokens, chunk: int | None) -> jax.Array:
    """Which keys each query sees, [..., Q, T]: its own document, not the future, and its own chunk of that document.

    Padding sees nothing, and attention gives it zeros.
    """
    mask = (queries.segment_ids[..., :, None] == keys.segment_ids[..., None, :]) & (keys.segment_ids > 0)[..., None, :]
    mask &= queries.places[..., :, None] >= keys.places[..., None, :]
    if chunk is not None:
        mask &= (queries.positions[..., :, None] // chunk) == (keys.positions[..., None, :] // chunk)
    return mask


class Sums(NamedTuple):
    """A softmax over the keys so far."""

    largest: jax.Array
    """Score, [B,K,Q,G]."""
    total: jax.Array
    """Of exp(score - largest), [B,K,Q,G]."""
    values: jax.Array
    """Weighted by that, [B,K,Q,G,H]."""


class Blockwise(NamedTuple):
    """Attention within documents, and within chunks of them where there is a chunk.

    Queries are [B,K,Q,G,H], already scaled; keys and values [B,K,T,H]. Rows are computed one after the other, since each
    has its own blocks that are seen.
    """

    chunk: int | None

    def start(self, q: jax.Array) -> Sums:
        """Before any key."""
        wide = jnp.promote_types(q.dtype, jnp.float32)
        zeros = jnp.zeros(q.shape[:-1], wide)
        return Sums(jnp.full_like(zeros, jnp.finfo(wide).min), zeros, jnp.zeros(q.shape, wide))

    def add(self, sums: Sums, q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens) -> Sums:
        """With these keys as well."""
        return lax.map(lambda row: self._add(*row), (sums, q, k, v, queries, keys))

    def finish(self, sums: Sums, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Attention, [B,K,Q,G,H], and the logarithm of the softmax's denominator, [B,K,Q,G]."""
        total = jnp.maximum(sums.total, jnp.finfo(sums.total.dtype).tiny)
        return (sums.values / total[..., None]).astype(dtype), sums.largest + jnp.log(total)

    def given(self, d_out: jax.Array, out: jax.Array, log_total: jax.Array) -> "Given":
        """What the gradient needs of all keys together: `d_out` is that of the result, the others are of `finish`."""
        wide = jnp.promote_types(out.dtype, jnp.float32)
        return Given(d_out, log_total, jnp.sum(out.astype(wide) * d_out.astype(wide), axis=-1))

    def gradient(
        self, given: "Given", q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What these keys add to the gradients of q, k and v, in at least float32."""
        return lax.map(lambda row: self._gradient(*row), (given, q, k, v, queries, keys))

    def _add(self, sums: Sums, q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens) -> Sums:
        Q, T = q.shape[1], k.shape[1]
        (k, v), keys = _whole_blocks((k, v)), keys.padded(0, -T % min(T, BLOCK))
        (q, sums), queries = _whole_blocks((q, sums)), queries.padded(0, -Q % min(Q, BLOCK))

        def of_queries(_, i):
            (q_i, sums_i), queries_i = _cut((q, sums), i), _standing(queries, i)

            def with_keys(j, sums):
                mask = allowed(queries_i, _standing(keys, j), self.chunk)[:, None]
                scores = jnp.where(mask, _scores(q_i, _cut(k, j)), jnp.finfo(sums.total.dtype).min)
                largest = jnp.maximum(sums.largest, jnp.max(scores, axis=-1))
                shrink = jnp.exp(sums.largest - largest)
                weights = jnp.where(mask, jnp.exp(scores - largest[..., None]), 0)
                values = _product("kqgt,kth->kqgh", weights.astype(v.dtype), _cut(v, j))
                total = sums.total * shrink + jnp.sum(weights, axis=-1)
                return Sums(largest, total, sums.values * shrink[..., None] + values)

            return None, lax.fori_loop(*self._seen(queries_i, keys), with_keys, sums_i)

        _, after = lax.scan(of_queries, None, jnp.arange(q.shape[1] // min(Q, BLOCK)))
        return jax.tree.map(lambda blocks: _joined(blocks)[:, :Q], after)

    def _gradient(
        self, given: "Given", q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        Q, T = q.shape[1], k.shape[1]
        (k, v), keys = _whole_blocks((k, v)), keys.padded(0, -T % min(T, BLOCK))
        (q, given), queries = _whole_blocks((q, given)), queries.padded(0, -Q % min(Q, BLOCK))
        wide = jnp.promote_types(q.dtype, jnp.float32)

        def of_queries(d_keys, i):
            (q_i, given_i), queries_i = _cut((q, given), i), _standing(queries, i)

            def with_keys(j, carry):
                d_q, d_k, d_v = carry
                k_j, v_j = _cut((k, v), j)
                mask = allowed(queries_i, _standing(keys, j), self.chunk)[:, None]
                weights = jnp.where(mask, jnp.exp(_scores(q_i, k_j) - given_i.log_total[..., None]), 0)
                d_weights = _product("kqgh,kth->kqgt", given_i.d_out, v_j)
                d_scores = (weights * (d_weights - given_i.mean[..., None])).astype(q.dtype)
                d_v = _with_block(d_v, j, _product("kqgt,kqgh->kth", weights.astype(v.dtype), given_i.d_out))
                d_k = _with_block(d_k, j, _product("kqgt,kqgh->kth", d_scores, q_i))
                return d_q + _product("kqgt,kth->kqgh", d_scores, k_j), d_k, d_v

            d_q, *d_keys = lax.fori_loop(*self._seen(queries_i, keys), with_keys, (jnp.zeros(q_i.shape, wide), *d_keys))
            return tuple(d_keys), d_q

        zeros = jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
        (d_k, d_v), d_q = lax.scan(of_queries, zeros, jnp.arange(q.shape[1] // min(Q, BLOCK)))
        return _joined(d_q)[:, :Q], d_k[:, :T], d_v[:, :T]

    def _seen(self, queries: Tokens, keys: Tokens) -> tuple[jax.Array, jax.Array]:
        """The blocks of keys that one of these queries could see: from which one on, and up to which."""
        back = queries.positions if self.chunk is None else queries.positions % self.chunk
        oldest, newest = jnp.min(queries.places - back) - keys.first, queries.places[-1] - keys.first
        size = keys.positions.shape[0]
        block = min(size, BLOCK)
        return jnp.clip(oldest // block, 0, size // block), jnp.clip(newest // block + 1, 0, size // block)


class Given(NamedTuple):
    """See `Blockwise.given`."""

    d_out: jax.Array
    """Gradient of the result, [B,K,Q,G,H]."""
    log_total: jax.Array
    """Logarithm of the softmax's denominator, [B,K,Q,G]."""
    mean: jax.Array
    """The gradient of a weight, averaged over the softmax, [B,K,Q,G]."""


def blockwise_attention(
    kernel: Blockwise, q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens
) -> jax.Array:
    """Attention of queries [B,K,Q,G,H] to keys and values [B,K,T,H] that are all here."""
    out: Any = _attention(kernel, q, k, v, queries, keys)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(kernel, q, k, v, queries, keys):
    return _forward(kernel, q, k, v, queries, keys)[0]


def _forward(kernel, q, k, v, queries, keys):
    out, log_total = kernel.finish(kernel.add(kernel.start(q), q, k, v, queries, keys), q.dtype)
    return out, (out, log_total, q, k, v, queries, keys)


def _backward(kernel, saved, d_out):
    out, log_total, q, k, v, queries, keys = saved
    d_qkv = kernel.gradient(kernel.given(d_out, out, log_total), q, k, v, queries, keys)
    return *(d.astype(x.dtype) for d, x in zip(d_qkv, (q, k, v), strict=True)), None, None


_attention.defvjp(_forward, _backward)


def _whole_blocks(tree: Any) -> Any:
    """Arrays [K,S,...], filled up with zeros to a multiple of the block."""

    def fill(array: jax.Array) -> jax.Array:
        size = array.shape[1]
        return jnp.pad(array, [(0, -size % min(size, BLOCK) if i == 1 else 0) for i in range(array.ndim)])

    return jax.tree.map(fill, tree)


def _cut(tree: Any, i: jax.Array) -> Any:
    """Block i of arrays [K,S,...]."""

    def cut(array: jax.Array) -> jax.Array:
        block = min(array.shape[1], BLOCK)
        return lax.dynamic_slice_in_dim(array, i * block, block, axis=1)

    return jax.tree.map(cut, tree)


def _standing(tokens: Tokens, i: jax.Array) -> Tokens:
    """Those of block i."""
    block = min(tokens.positions.shape[0], BLOCK)
    return tokens.part(i * block, block)


def _with_block(array: jax.Array, i: jax.Array, block: jax.Array) -> jax.Array:
    """The array [K,S,...] with a block added to block i."""
    return lax.dynamic_update_slice_in_dim(array, _cut(array, i) + block, i * block.shape[1], axis=1)


def _joined(blocks: jax.Array) -> jax.Array:
    """[blocks, K, b, ...] -> [K, blocks x b, ...]."""
    moved = jnp.moveaxis(blocks, 0, 1)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return _product("kqgh,kth->kqgt", q, k)
