"""The comparison of decoding with the oracle notices when the cache is broken: each mutation must be caught."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import attention, moe, transformer
from model.attention import Layout
from model.cache import KeysValues
from model.config import ModelConfig
from tests import oracle
from tests.model.decoding import PROMPTS, TOTAL, compare, decoding, documents, float64, of_oracle
from tests.oracle_cases import TINY, VISION, random_params

Patch = pytest.MonkeyPatch

TEXT = float64(TINY, moe_layer_step=2, nope_layer_step=2)
"""Two repeats of a rotary layer with qk-norm and a global one with temperature and experts."""
IMAGES = dataclasses.replace(TEXT, vision=VISION)


@functools.cache
def prepared(config: ModelConfig) -> tuple[Any, Any, np.ndarray]:
    """Weights, documents and the oracle's logits."""
    with jax.enable_x64(True):
        params = oracle.as_float64(random_params(config, 8))
    batch = documents(config, 8)
    return params, batch, of_oracle(config, params, {}, batch)


def compare_with_oracle(config: ModelConfig) -> None:
    """As `test_cache.py` does, on the code as it is now."""
    params, batch, expected_BSV = prepared(config)
    with jax.enable_x64(True):
        run = decoding(config, TOTAL - min(PROMPTS))
        found = jax.device_get(run(params, {}, batch, np.array(PROMPTS, np.int32)))
    compare(found, expected_BSV, PROMPTS)


def slot(change: Callable[[jax.Array], jax.Array]) -> Callable[[Patch], None]:
    """Tokens are put, and seen, in the slots of `change(positions)`."""
    original = attention.slot_of
    return lambda patch: patch.setattr(attention, "slot_of", lambda p, chunk: original(change(p), chunk))


def mask(condition: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[Patch], None]:
    """A token sees the slots of which `condition(slot, its own slot)` holds."""

    def cached_attention(q: jax.Array, seen: KeysValues, slots_B: jax.Array) -> jax.Array:
        allowed_BL = condition(jnp.arange(seen.k.shape[1])[None], slots_B[:, None])
        return attention.attend(q, seen.k, seen.v, jnp.broadcast_to(allowed_BL, seen.k.shape[:2])[:, None])

    return lambda patch: patch.setattr(attention, "cached_attention", cached_attention)


def next_layout(
    change: Callable[[jax.Array], jax.Array], **replaced: Callable[[Layout], Any]
) -> Callable[[Patch], None]:
    """The token's layout is that of `change(positions)`, with fields replaced."""
    original = Layout.of_next

    def of_next(positions_B: jax.Array, config: Any) -> Layout:
        layout = original(change(positions_B), config)
        return dataclasses.replace(layout, **{name: make(layout) for name, make in replaced.items()})

    return lambda patch: patch.setattr(Layout, "of_next", of_next)


def filled(change: Callable[..., tuple[Any, ...]]) -> Callable[[Patch], None]:
    """The prompt fills the slots as if the arguments were `change(lengths, chunk)`."""
    original = transformer.filled

    def broken(tokens: KeysValues, lengths_B: jax.Array, slots: int, chunk: int | None) -> KeysValues:
        lengths_B, chunk = change(lengths_B, chunk)
        return original(tokens, lengths_B, slots, chunk)

    return lambda patch: patch.setattr(transformer, "filled", broken)


def slots_of_the_first_repeat(patch: Patch) -> None:
    original = KeysValues.of
    patch.setattr(KeysValues, "of", lambda self, repeat: original(self, 0 * repeat))


def experts_of_the_first_repeat(patch: Patch) -> None:
    original = moe.MoE.__call__

    def call(self: Any, x_TD: Any, real_T: Any, rows: Any, capture: bool, repeat: Any) -> Any:
        return original(self, x_TD, real_T, rows, capture, None if repeat is None else 0 * repeat)

    patch.setattr(moe.MoE, "__call__", call)


def token_put_into_the_next_row(patch: Patch) -> None:
    original = KeysValues.put

    def put(self: KeysValues, tokens: KeysValues, repeat: jax.Array, slots_B: jax.Array) -> KeysValues:
        return original(self, jax.tree.map(lambda new: jnp.roll(new, 1, axis=0), tokens), repeat, slots_B)

    patch.setattr(KeysValues, "put", put)


def images_dropped(patch: Patch) -> None:
    original = transformer.Transformer.prefill

    def prefill(self: Any, batch: Any, length: int) -> Any:
        return original(self, {name: value for name, value in batch.items() if "image" not in name}, length)

    patch.setattr(transformer.Transformer, "prefill", prefill)


MUTATIONS: dict[str, Callable[[Patch], None]] = {
    "slots off by one": slot(lambda p: p + 1),
    "slots of a window instead of a chunk": mask(lambda slot, own: slot < 99),
    "its own slot is not seen": mask(lambda slot, own: slot < own),
    "the slot after is seen": mask(lambda slot, own: slot <= own + 1),
    "positions off by one": next_layout(lambda p: p + 1),
    "no temperature while decoding": next_layout(
        lambda p: p, temperature_positions_BS=lambda layout: 0 * layout.tokens.positions
    ),
    "no rotation while decoding": next_layout(
        lambda p: p, cos=lambda layout: 1 + 0 * layout.cos, sin=lambda layout: 0 * layout.sin
    ),
    "lengths of the next row": next_layout(lambda p: jnp.roll(p, 1)),
    "slots filled by the next row's length": filled(lambda lengths, chunk: (jnp.roll(lengths, 1), chunk)),
    "the first chunk kept instead of the last": filled(lambda lengths, chunk: (lengths, None)),
    "global layers keep a chunk": filled(lambda lengths, chunk: (lengths, TEXT.chunk_size)),
    "the last token not kept": filled(lambda lengths, chunk: (lengths - 1, chunk)),
    "the first repeat's slots": slots_of_the_first_repeat,
    "the first repeat's experts": experts_of_the_first_repeat,
    "the next row's token": token_put_into_the_next_row,
    "images dropped": images_dropped,
}

UNBROKEN = (
    slot(lambda p: p),
    mask(lambda slot, own: slot <= own),
    next_layout(lambda p: p, cos=lambda layout: layout.cos),
    filled(lambda lengths, chunk: (lengths, chunk)),
)
"""What builds the mutations, given the right formula: else a mutation might be caught for a mistake of its own."""


@pytest.mark.parametrize("config", [TEXT, IMAGES], ids=["text", "images"])
def test_what_builds_the_mutations_breaks_nothing_by_itself(config: ModelConfig, monkeypatch: Patch) -> None:
    for unbroken in UNBROKEN:
        unbroken(monkeypatch)
    compare_with_oracle(config)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str, monkeypatch: Patch) -> None:
    config = IMAGES if MUTATIONS[name] is images_dropped else TEXT
    prepared(config)  # before the code is broken
    MUTATIONS[name](monkeypatch)
    with pytest.raises(AssertionError, match="prompt of"):
        compare_with_oracle(config)
