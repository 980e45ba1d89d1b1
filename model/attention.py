"""Causal grouped-query attention over packed rows: chunked with rotary positions, or global without positions.

Letters: B rows, S sequence, Q queries of a block, T keys of a block, D width, N query heads, K key/value heads,
G = N/K query heads that share a key/value head, H head width, C chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from model.cache import Cached, KeysValues, chunk_of, slot_of
from model.config import LayerKind, ModelConfig
from model.layers import at_least_float32, matrix, rms_normalize, rotate_pairs, text_rope

MAX_QUERY_BLOCKS = 8
MIN_QUERY_BLOCK = 128
SAVED_SCORES_LENGTH = 1024
"""Rows longer than this recompute their attention scores in the backward pass instead of keeping them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each token of a packed row stands; shared by all layers."""

    segment_ids_BS: jax.Array
    """Document of each token; 0 is padding."""
    positions_BS: jax.Array
    """Position in the document."""
    temperature_positions_BS: jax.Array
    """Position that the temperature of global layers goes by."""
    cos: jax.Array
    """Rotary embedding of the positions, [B, S, 1, H/2]."""
    sin: jax.Array

    @classmethod
    def of(cls, segment_ids_BS: jax.Array, positions_BS: jax.Array, config: ModelConfig) -> "Layout":
        """The layout of packed rows."""
        temperature_BS = positions_BS
        if config.temperature_from == "row":
            temperature_BS = jnp.broadcast_to(jnp.arange(positions_BS.shape[1]), positions_BS.shape)
        return cls(segment_ids_BS, positions_BS, temperature_BS, *text_rope(positions_BS, config))

    @classmethod
    def of_next(cls, positions_B: jax.Array, config: ModelConfig) -> "Layout":
        """The layout, [B,1], of one more token in rows of one document each, which begins where its row does."""
        positions_BS = positions_B[:, None]
        return cls(jnp.ones_like(positions_BS), positions_BS, positions_BS, *text_rope(positions_BS, config))


def allowed(layout: Layout, queries: slice, keys: slice, chunk: int | None) -> jax.Array:
    """Which keys each query sees, [B, Q, T]: its own document, not the future, and its own chunk of that document."""
    segment, position = layout.segment_ids_BS, layout.positions_BS
    index = jnp.arange(segment.shape[1])
    mask = (segment[:, queries, None] == segment[:, None, keys]) & (index[queries, None] >= index[None, keys])
    if chunk is not None:
        mask &= (position[:, queries, None] // chunk) == (position[:, None, keys] // chunk)
    return mask


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of one block of queries: q [B,Q,N,H], k and v [B,T,K,H], mask [B,Q,T] -> [B,Q,N,H].

    Scores and softmax are in at least float32. Every query sees at least itself, so no row of the mask is empty.
    """
    B, Q, N, H = q.shape
    K = k.shape[2]
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    q = (q * H**-0.5).reshape(B, Q, K, N // K, H)
    scores = jnp.einsum("bqkgh,btkh->bkgqt", q, k, preferred_element_type=accumulate)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(accumulate).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqt,btkh->bqkgh", probabilities, v).reshape(B, Q, N, H)


def packed_attention(q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout, chunk: int | None) -> jax.Array:
    """Attention within documents (and, where `chunk` is given, within their chunks), in blocks of queries.

    A block reads only keys that one of its queries could see: none after it, none further back than a chunk reaches.
    That is exact, since a chunk counted from a document's start never begins more than chunk - 1 tokens before a token.
    """
    S = q.shape[1]
    block = max(MIN_QUERY_BLOCK, -(-S // MAX_QUERY_BLOCKS))
    outputs = []
    for start in range(0, S, block):
        queries = slice(start, min(start + block, S))
        keys = slice(0 if chunk is None else max(0, start - chunk + 1), queries.stop)
        mask = allowed(layout, queries, keys, chunk)
        one = jax.checkpoint(attend) if S > SAVED_SCORES_LENGTH else attend
        outputs.append(one(q[:, queries], k[:, keys], v[:, keys], mask))
    return jnp.concatenate(outputs, axis=1)


def cached_attention(q: jax.Array, seen: KeysValues, slots_B: jax.Array) -> jax.Array:
    """Attention of one token of each row, q [B,1,N,H], to the slots [B,L,K,H] up to its own."""
    # Slots behind its own hold nothing yet, or what is left of the chunk before.
    mask_BL = jnp.arange(seen.k.shape[1]) <= slots_B[:, None]
    return attend(q, seen.k, seen.v, mask_BL[:, None])


def temperature(positions_BS: jax.Array, config: ModelConfig) -> jax.Array:
    """Factor on the queries of global layers, [B, S]: 1 + scale x log(1 + floor((position + 1) / floor))."""
    wide = (positions_BS + 1).astype(jnp.promote_types(config.dtype, jnp.float32))
    return 1 + config.temperature_scale * jnp.log1p(jnp.floor(wide / config.temperature_floor))


class Attention(nnx.Module):
    """One attention layer: q [D,N,H], k and v [D,K,H], o [N,H,D]; no biases."""

    def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs):
        self.config, self.kind = config, kind
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q = matrix(rngs, (D, N, H), "width heads head", D, config)
        self.k = matrix(rngs, (D, K, H), "width kv_heads head", D, config)
        self.v = matrix(rngs, (D, K, H), "width kv_heads head", D, config)
        self.o = matrix(rngs, (N, H, D), "heads head width", N * H, config)

    def __call__(self, x_BSD: jax.Array, layout: Layout, cached: Cached | None = None) -> tuple[jax.Array, KeysValues]:
        """Attention of packed rows, and their keys and values.

        With `cached`: attention of one more token of each row, [B,1,D], and the slots with that token in them.
        """
        config, dtype = self.config, x_BSD.dtype
        q, k, v = (jnp.einsum("bsd,dnh->bsnh", x_BSD, w[...].astype(dtype)) for w in (self.q, self.k, self.v))
        if self.kind.rope:
            q, k = rotate_pairs(q, layout.cos, layout.sin), rotate_pairs(k, layout.cos, layout.sin)
            if config.qk_norm:
                q, k = rms_normalize(q, config.norm_eps), rms_normalize(k, config.norm_eps)
        elif config.temperature_tuning:
            factor = temperature(layout.temperature_positions_BS, config)
            q = (at_least_float32(q) * factor[..., None, None]).astype(dtype)
        chunk, kept = chunk_of(self.kind, config), KeysValues(k, v)
        if cached is None:
            heads = packed_attention(q, k, v, layout, chunk)
        else:
            slots_B = slot_of(layout.positions_BS[:, 0], chunk)
            kept = cached.slots.put(kept, cached.repeat, slots_B)
            heads = cached_attention(q, kept.of(cached.repeat), slots_B)
        return jnp.einsum("bsnh,nhd->bsd", heads, self.o[...].astype(dtype)), kept
