"""What decoding keeps of the tokens before, their keys and values, so that a new token does not compute them again.

Rotary layers attend within chunks counted from the document's start, so they need the tokens of the current chunk alone:
position p is in slot p % chunk, and a new chunk writes over the last one. Global layers keep every token, in order.

Letters: B rows, S sequence, L slots, K key/value heads, H head width, R repeats of the super-block.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.config import LayerKind, ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Keys, after rotary embedding and qk-norm, and values of one layer."""

    k: jax.Array
    """Of a batch's tokens [B,S,K,H]; of slots [B,K,L,H], or [R,B,K,L,H] for the layer in every super-block."""
    v: jax.Array
    """Of the same shape."""

    def put(self, tokens: "KeysValues", repeat: jax.Array, slots_B: jax.Array) -> "KeysValues":
        """These slots [R,B,K,L,H] with one token of each row, [B,1,K,H], in its slot of one repeat."""
        rows_B = jnp.arange(slots_B.shape[0])
        return jax.tree.map(lambda old, new: old.at[repeat, rows_B, :, slots_B].set(new[:, 0]), self, tokens)

    def of(self, repeat: jax.Array) -> "KeysValues":
        """What these slots [R,B,K,L,H] hold of one repeat, as tokens [B,L,K,H]."""
        # Heads come before slots in memory, as the products of attention read them.
        return jax.tree.map(lambda slots: slots[repeat].swapaxes(1, 2), self)


class Cached(NamedTuple):
    """What a layer is given to decode with."""

    slots: KeysValues
    """[R,B,K,L,H]."""
    repeat: jax.Array
    """Which repeat of the super-block the layer is in."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of a batch whose rows hold one document each."""

    layers: tuple[KeysValues, ...]
    """Slots of each layer of the super-block, stacked over its repeats: [R,B,K,L,H]."""
    lengths_B: jax.Array
    """Tokens of each row so far, which is the position of its next one."""


def chunk_of(kind: LayerKind, config: ModelConfig) -> int | None:
    """The chunk that layers of this kind attend within; None for the whole document."""
    return config.chunk_size if kind.rope else None


def slot_of(positions_B: jax.Array, chunk: int | None) -> jax.Array:
    """Where a layer keeps the token at each position."""
    return positions_B if chunk is None else positions_B % chunk


def empty(config: ModelConfig, rows: int, length: int) -> Cache:
    """The cache of so many rows before their first token, for documents of up to `length` tokens."""
    kinds = config.super_block()
    repeats, heads = config.num_layers // len(kinds), (config.num_kv_heads, config.head_dim)

    def slots(kind: LayerKind) -> jax.Array:
        return jnp.zeros((repeats, rows, heads[0], config.cache_slots(kind, length), heads[1]), config.dtype)

    return Cache(tuple(KeysValues(slots(kind), slots(kind)) for kind in kinds), jnp.zeros(rows, jnp.int32))


def filled(tokens: KeysValues, lengths_B: jax.Array, slots: int, chunk: int | None) -> KeysValues:
    """The slots [B,K,L,H] after rows of tokens [B,S,K,H], of which the first `lengths_B` are real.

    Only what the next token of the row can see: in rotary layers, nothing after the last token of a chunk. The other
    slots are zeros, so that no padding and no earlier chunk is in the cache.
    """
    first_B = jnp.zeros_like(lengths_B) if chunk is None else lengths_B - lengths_B % chunk
    index_BL = first_B[:, None] + jnp.arange(slots)
    inside_BL11 = (index_BL < lengths_B[:, None])[..., None, None]

    def gather(tokens_BSKH: jax.Array) -> jax.Array:
        index_BL11 = jnp.minimum(index_BL, tokens_BSKH.shape[1] - 1)[..., None, None]
        slots_BLKH = jnp.where(inside_BL11, jnp.take_along_axis(tokens_BSKH, index_BL11, axis=1), 0)
        return slots_BLKH.swapaxes(1, 2)

    return jax.tree.map(gather, tokens)
