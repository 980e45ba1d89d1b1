"""Documents of many chunks, with Scout's scaling of the rotary embedding and temperature, against the float64 oracle.

Letters: B rows, S sequence, V vocabulary, Z decoding steps.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import temperature
from model.config import ModelConfig, RopeScaling
from model.layers import rope_frequencies
from tests import oracle
from tests.model.decoding import decoding, float64, of_oracle, uncached
from tests.oracle_cases import TINY, random_params

TOLERANCE = 1e-10

SMALL = float64(
    TINY,
    chunk_size=8,
    rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_length=32),
    temperature_floor=8.0,
    temperature_scale=0.1,
)
"""Scout's lengths divided by a thousand."""

REAL = float64(
    ModelConfig(
        vocab_size=11,
        hidden_size=4,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        dense_ffn_size=4,
        moe_layer_step=0,
        nope_layer_step=2,
        rope_scaling=RopeScaling(),
    )
)
"""Scout's own lengths, in a rotary and a global layer as narrow as can be."""


def rows(config: ModelConfig, lengths: list[list[int]]) -> dict[str, np.ndarray]:
    """Packed rows of documents of these lengths, the shorter ones beginnings of the longer; then padding."""
    B, S = len(lengths), max(map(sum, lengths))
    batch = {name: np.zeros((B, S), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for b, row in enumerate(lengths):
        start = 0
        for segment, length in enumerate(row):
            where = slice(start, start + length)
            batch["tokens"][b, where] = np.random.default_rng(0).integers(0, config.vocab_size, length)
            batch["segment_ids"][b, where], batch["positions"][b, where] = segment + 1, np.arange(length)
            start += length
    return batch


def close(found: Any, expected: Any, message: str = "") -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=message)


def test_the_scaling_that_is_tested_stretches_some_frequencies_and_leaves_others() -> None:
    for config in (SMALL, REAL):
        scaled, plain = (
            rope_frequencies(config.head_dim, config.rope_theta, scaling) for scaling in (config.rope_scaling, None)
        )
        assert set(np.round(plain / scaled, 9)) == {1.0, 16.0}


def test_past_several_chunks_packed_rows_and_decoding_agree_with_the_oracle() -> None:
    batch = rows(SMALL, [[61], [19, 42]])
    with jax.enable_x64(True):
        params = oracle.as_float64(random_params(SMALL, 1))
        expected_BSV = of_oracle(SMALL, params, {}, batch)
        close(expected_BSV[1, 19:], expected_BSV[0, :42], "a document's beginning")
        close(uncached(SMALL)(params, {}, batch), expected_BSV)
        alone = rows(SMALL, [[61], [61], [61]])
        prompts = np.array([1, 30, 40], np.int32)
        _, decoded_ZBV = decoding(SMALL, 60)(params, {}, alone, prompts)
    for b, prompt in enumerate(prompts):
        close(decoded_ZBV[: 61 - prompt, b], expected_BSV[0, prompt:], f"prompt of {prompt}")


def test_past_three_real_chunks_packed_rows_and_decoding_agree_with_the_oracle() -> None:
    chunk = REAL.chunk_size
    assert chunk == REAL.temperature_floor == 8192
    short, long, prompt = 2 * chunk + 30, 3 * chunk + 12, 3 * chunk - 6
    packed, alone = rows(REAL, [[100, short]]), rows(REAL, [[long]])
    with jax.enable_x64(True):
        params = oracle.as_float64(random_params(REAL, 2))
        expected_SV = of_oracle(REAL, params, {}, alone)[0]
        packed_SV = np.asarray(uncached(REAL)(params, {}, packed))[0]
        prompt_BSV, decoded_ZBV = decoding(REAL, long - prompt)(params, {}, alone, np.array([prompt], np.int32))
    close(packed_SV[:100], expected_SV[:100], "packed, first document")
    close(packed_SV[100:], expected_SV[:short], "packed, second document")
    close(prompt_BSV[0, :prompt], expected_SV[:prompt], "alone, the prompt")
    close(decoded_ZBV[:, 0], expected_SV[prompt:], "alone, decoded over the third boundary")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_temperature_first_changes_the_position_before_its_floor(dtype: Any) -> None:
    with jax.enable_x64(True):
        positions = np.array([[0, 8190, 8191, 8192, 16382, 16383, 10_000_000]])
        factor = np.asarray(temperature(jnp.asarray(positions), dataclasses.replace(ModelConfig(), dtype=dtype))[0])
    steps = [0, 0, 1, 1, 1, 2, 1220]
    np.testing.assert_allclose(factor, [1 + 0.1 * math.log(1 + n) for n in steps], rtol=1e-6)
    assert factor[1] == 1 < factor[2]


def test_the_answer_first_changes_at_the_position_before_the_floor() -> None:
    """End to end, in a model of one global layer: with temperature tuning and without."""
    on = dataclasses.replace(REAL, num_layers=1, nope_layer_step=1)
    off = dataclasses.replace(on, temperature_tuning=False)
    batch = rows(on, [[8192]])
    with jax.enable_x64(True):
        params = oracle.as_float64(random_params(on, 3))
        with_SV, without_SV = (np.asarray(uncached(config)(params, {}, batch))[0] for config in (on, off))
    np.testing.assert_array_equal(with_SV[:8191], without_SV[:8191])
    assert np.abs(with_SV[8191] - without_SV[8191]).max() > 1e-6
