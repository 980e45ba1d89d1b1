"""Decoding with a cache equals the uncached forward pass and the oracle in float64, at every position."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.cache import KeysValues, filled
from model.config import ModelConfig, RopeScaling, VisionConfig
from model.layers import pick
from tests import oracle
from tests.model.decoding import PROMPTS, TOTAL, compare, decoding, documents, float64, of_oracle, uncached
from tests.oracle_cases import AUDIO, FAST_COMPILE, TINY, VISION, random_bias, random_params
from trainer.step import Skeleton

CASES: dict[str, dict[str, Any]] = {
    "dense and experts in turn": {"moe_layer_step": 2, "router_bias_rate": 0.1},
    "scout": {"moe_layer_step": 1, "nope_layer_step": 2, "rope_scaling": RopeScaling(4.0, 1.0, 1.0, 60)},
    "irregular, top-2, tied": {
        "moe_layers": (0, 3),
        "nope_layers": (1,),
        "experts_per_token": 2,
        "tie_embeddings": True,
        "scan_layers": False,
    },
    "rotary, dense, one key head, no qk-norm": {
        "moe_layer_step": 0,
        "nope_layer_step": 0,
        "num_kv_heads": 1,
        "qk_norm": False,
        "num_layers": 3,
    },
    "global, by row": {"nope_layer_step": 1, "num_layers": 2, "num_kv_heads": 4, "temperature_from": "row"},
    "chunks of one, no temperature": {"chunk_size": 1, "temperature_tuning": False, "nope_layer_step": 2},
    "one chunk, blended scaling": {"chunk_size": 99, "rope_scaling": RopeScaling(4.0, 0.5, 4.0, 60), "remat": "full"},
    "images and sound": {
        "vision": VISION,
        "audio": AUDIO,
        "moe_layer_step": 1,
        "nope_layer_step": 2,
        "experts_per_token": 2,
    },
}


@functools.cache
def inputs(case: str) -> tuple[ModelConfig, Any, Any, Any]:
    config = float64(TINY, **CASES[case])
    with jax.enable_x64(True):
        params = oracle.as_float64(random_params(config, 7))
    return config, params, random_bias(config, 7), documents(config, 7)


@functools.cache
def cached(case: str) -> tuple[np.ndarray, np.ndarray]:
    config, *arguments = inputs(case)
    with jax.enable_x64(True):
        return jax.device_get(decoding(config, TOTAL - min(PROMPTS))(*arguments, np.array(PROMPTS, np.int32)))


@pytest.mark.parametrize("case", CASES)
def test_decoding_equals_the_uncached_forward_pass_at_every_position(case: str) -> None:
    config, *arguments = inputs(case)
    with jax.enable_x64(True):
        compare(cached(case), jax.device_get(uncached(config)(*arguments)), PROMPTS)


@pytest.mark.parametrize("case", CASES)
def test_decoding_equals_the_oracle_at_every_position(case: str) -> None:
    compare(cached(case), of_oracle(*inputs(case)), PROMPTS)


@pytest.mark.parametrize("chunk", [None, 4, 1, 50])
def test_the_cache_holds_what_the_next_token_sees_and_nothing_else(chunk: int | None) -> None:
    S, slots = 9, 12 if chunk is None else min(chunk, 12)
    lengths = np.arange(1, S + 1)
    k = np.random.default_rng(0).normal(size=(len(lengths), S, 2, 3)).astype(np.float32)
    for row, length in zip(k, lengths, strict=True):
        row[length:] = np.nan  # padding, should it get in, would show
    found = filled(KeysValues(jnp.asarray(k), jnp.asarray(-k)), jnp.asarray(lengths), slots, chunk)
    for b, length in enumerate(lengths):
        expected = np.zeros((slots, 2, 3), np.float32)
        for position in range(length):
            if chunk is None or position // chunk == length // chunk:
                expected[position if chunk is None else position % chunk] = k[b, position]
        np.testing.assert_array_equal(found.k[b].swapaxes(0, 1), expected)
        np.testing.assert_array_equal(found.v[b].swapaxes(0, 1), -expected)


SCOUT = ModelConfig(vision=VisionConfig(), rope_scaling=RopeScaling(), dtype="bfloat16")


def test_the_bytes_of_a_cache_are_those_of_its_arrays() -> None:
    skeleton, B, S, length = Skeleton(SCOUT), 3, 64, 20_000
    batch = {name: jax.ShapeDtypeStruct((B, S), np.int32) for name in ("tokens", "segment_ids", "positions")}
    _, cache = jax.eval_shape(
        lambda params, batch: skeleton.model(params, {}).prefill(batch, length), skeleton.abstract_params, batch
    )
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers)) == B * SCOUT.cache_bytes(
        length, 2
    )


def test_only_global_layers_keep_more_than_a_chunk() -> None:
    token = 4 * 2**10  # of one layer: keys and values of 8 heads of 128, 2 bytes each
    assert SCOUT.cache_bytes(8192, 2) == 8192 * 48 * token
    assert SCOUT.cache_bytes(1_000_000, 2) == 36 * 8192 * token + 12 * 1_000_000 * token
    assert dataclasses.replace(SCOUT, nope_layer_step=0).cache_bytes(10**6, 2) == 48 * 8192 * token


def temporaries(config: ModelConfig, weights: str, programs: tuple[str, ...], S: int = 16) -> dict[str, int]:
    """Bytes that the compiled programs need beside their inputs and outputs; and of the weights themselves in float32."""
    skeleton = Skeleton(config)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(weights)), skeleton.abstract_params)
    batch = {name: jax.ShapeDtypeStruct((1, S), np.int32) for name in ("tokens", "segment_ids", "positions")}
    token = jax.ShapeDtypeStruct((1,), np.int32)

    def prefill(params: Any, batch: Any) -> Any:
        return skeleton.model(params, {}).prefill(batch, S)

    def decode(params: Any, token: Any, cache: Any) -> Any:
        return skeleton.model(params, {}).decode(token, cache)

    def forward(params: Any, batch: Any) -> Any:
        return skeleton.model(params, {})(batch).hidden_BSD

    _, cache = jax.eval_shape(prefill, params, batch)
    lowered: dict[str, Any] = {
        "prefill": lambda: jax.jit(prefill).lower(params, batch),
        "decode": lambda: jax.jit(decode, donate_argnums=2).lower(params, token, cache),
        "forward": lambda: jax.jit(forward).lower(params, batch),
    }
    found = {"weights": sum(4 * leaf.size for leaf in jax.tree.leaves(params))}
    for name in programs:
        compiled = lowered[name]().compile(compiler_options=FAST_COMPILE)
        found[name] = compiled.memory_analysis().temp_size_in_bytes
    return found


DEEP = dataclasses.replace(
    TINY, num_layers=8, hidden_size=64, expert_ffn_size=64, dense_ffn_size=64, num_experts=8, nope_layer_step=2
)
"""Four repeats of a super-block; nearly all weights are those of experts."""


def test_a_decoded_token_copies_no_experts() -> None:
    found = temporaries(DEEP, "float32", ("decode",))
    one_layers_experts = 4 * 8 * 3 * 64 * 64
    assert found["decode"] < one_layers_experts
    assert found["weights"] > 4 * one_layers_experts


def test_bfloat16_weights_are_not_widened_as_a_whole() -> None:
    """An imported checkpoint: stored in bfloat16, computed in float32. Only what is being multiplied is widened."""
    found = temporaries(DEEP, "bfloat16", ("prefill", "decode"))
    assert found["decode"] < found["weights"] / 8
    assert found["prefill"] < found["weights"] / 2  # a super-block, copied as it is stored and one expert widened


def test_filling_the_cache_takes_no_more_memory_than_the_forward_pass() -> None:
    config = dataclasses.replace(TINY, num_layers=2, moe_layer_step=0, nope_layer_step=2)
    found = temporaries(config, "float32", ("prefill", "forward"), 1024)
    assert found["prefill"] < 1.1 * found["forward"]


def test_weights_that_are_picked_one_by_one_have_the_gradient_of_their_index() -> None:
    stacked = jnp.arange(12, dtype=jnp.bfloat16).reshape(4, 3)
    gradient = jax.grad(lambda w: jnp.sum(pick(w, jnp.array([1, 3, 1])).astype(jnp.float32) ** 2))(stacked)
    expected = np.zeros((4, 3))
    expected[1], expected[3] = 4 * np.arange(3, 6), 2 * np.arange(9, 12)
    np.testing.assert_array_equal(gradient.astype(np.float32), expected)
