"""Causal grouped-query attention over packed rows: chunked with rotary positions, or global without positions.

Letters: B rows, S sequence, Q queries of a block, T keys of a block, D width, N query heads, K key/value heads,
G = N/K query heads that share a key/value head, H head width, C chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from model.blockwise import Blockwise, Tokens, blockwise_attention
from model.cache import Cached, KeysValues, chunk_of, slot_of
from model.config import LayerKind, ModelConfig
from model.layers import at_least_float32, matrix, rms_normalize, rotate_pairs, text_rope
from sharding.context import from_the_left, ring_attention
from sharding.place import Place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each token of a packed row stands; shared by all layers."""

    tokens: Tokens
    """Those that are computed here."""
    row: Tokens
    """All tokens of the rows: the same ones, unless rows are split over devices."""
    temperature_positions_BS: jax.Array
    """Position that the temperature of global layers goes by."""
    cos: jax.Array
    """Rotary embedding of the positions, [B, S, 1, H/2]."""
    sin: jax.Array

    @classmethod
    def of(cls, segment_ids_BS: jax.Array, positions_BS: jax.Array, config: ModelConfig, place: Place) -> "Layout":
        """The layout of packed rows, or of this device's share of them."""
        B, S = positions_BS.shape
        row = Tokens(place.row(segment_ids_BS), place.row(positions_BS), jnp.zeros(B, positions_BS.dtype))
        tokens = row.part(place.first("context", S), S)
        temperature_BS = positions_BS if config.temperature_from == "document" else tokens.places
        return cls(tokens, row, temperature_BS, *text_rope(positions_BS, config))

    @classmethod
    def of_next(cls, positions_B: jax.Array, config: ModelConfig) -> "Layout":
        """The layout, [B,1], of one more token in rows of one document each, which begins where its row does."""
        positions_BS = positions_B[:, None]
        tokens = Tokens(jnp.ones_like(positions_BS), positions_BS, positions_B)
        return cls(tokens, tokens, positions_BS, *text_rope(positions_BS, config))


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


def packed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, layout: Layout, chunk: int | None, place: Place
) -> jax.Array:
    """Attention within documents and, where `chunk` is given, within their chunks: q [B,S,N,H], k and v [B,S,K,H].

    Where rows are split over devices, chunks fetch what they need from the left: a chunk, counted from the document's
    start, never begins more than chunk - 1 tokens before one of its tokens. The others pass all keys round.
    """
    S, kernel, row = q.shape[1], Blockwise(chunk), layout.row
    grouped = by_heads(q * q.shape[-1] ** -0.5, k.shape[2])
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if place.size("context") == 1:
        out = blockwise_attention(kernel, grouped, k, v, layout.tokens, row)
    elif chunk is None:
        out = ring_attention(kernel, place, grouped, k, v, row)
    else:
        reach = min(chunk - 1, row.positions.shape[1] - S) if place.straddle else 0
        k, v = (jnp.concatenate([from_the_left(place, share, reach), share], axis=2) for share in (k, v))
        keys = row.padded(reach, 0).part(place.first("context", S), reach + S)
        out = blockwise_attention(kernel, grouped, k, v, layout.tokens, keys)
    return out.swapaxes(1, 2).reshape(q.shape)


def by_heads(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B,S,N,H] -> [B,K,S,G,H]: consecutive query heads share a key/value head."""
    return q.reshape(*q.shape[:2], kv_heads, -1, q.shape[-1]).swapaxes(1, 2)


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

    def __init__(self, config: ModelConfig, kind: LayerKind, place: Place, rngs: nnx.Rngs):
        self.config, self.kind, self.place = config, kind, place
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
            heads = packed_attention(q, k, v, layout, chunk, self.place)
        else:
            slots_B = slot_of(layout.tokens.positions[:, 0], chunk)
            kept = cached.slots.put(kept, cached.repeat, slots_B)
            heads = cached_attention(q, kept.of(cached.repeat), slots_B)
        return jnp.einsum("bsnh,nhd->bsd", heads, self.o[...].astype(dtype)), kept
