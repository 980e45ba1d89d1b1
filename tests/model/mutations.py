"""What mutations of the model and the objective share: the comparison with the oracle that each of them must fail.

A mutation replaces one function of the shipped code by a plausible mistake. The unbroken code passes the same
comparison, so a mutation that is not caught means that a feature is not tested.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from model.config import ModelConfig
from tests import oracle
from tests.oracle_cases import (
    AUDIO,
    TINY,
    VISION,
    assert_same_gradient,
    assert_same_values,
    expected,
    random_batch,
    random_bias,
    random_params,
    shipped,
)

TOLERANCE = 1e-10
SEED = 4

Patch = pytest.MonkeyPatch

SMALL = dataclasses.replace(
    TINY,
    num_layers=2,
    moe_layer_step=1,
    nope_layer_step=2,
    experts_per_token=2,
    dtype="float64",
    param_dtype="float64",
)

BASES: dict[str, tuple[ModelConfig, int]] = {
    "text": (SMALL, 1),
    "two micro-batches": (SMALL, 2),
    "router bias": (dataclasses.replace(SMALL, router_bias_rate=0.1), 1),
    "temperature by row": (dataclasses.replace(SMALL, temperature_from="row"), 1),
    "images": (dataclasses.replace(SMALL, vision=VISION), 1),
    "sound": (dataclasses.replace(SMALL, audio=AUDIO), 1),
}
"""Model and micro-batches that the mutations are made in."""


@functools.cache
def prepared(base: str) -> tuple[Any, ...]:
    """Weights, biases and batch of a base, and the oracle's answers."""
    config, micro_batches = BASES[base]
    with jax.enable_x64(True):
        params, bias = oracle.as_float64(random_params(config, SEED)), random_bias(config, SEED)
    batch = random_batch(config, SEED, tiles=5)
    if config.vision:
        used = (batch["image_positions"] >= 0).all(axis=2)
        assert used.sum() > 2, "several images"
        assert used.all(axis=-1).sum() == 0, "an unused slot in each row"
    if config.audio:
        tokens = (batch["audio_positions"] >= 0).sum(axis=2)
        assert (tokens > 0).sum() > AUDIO.windows_per_block, "several blocks of windows"
        assert set(tokens.reshape(-1)) >= {0, 1, 3}, "an unused window, one that is used in part, a full one"
    return params, bias, batch, expected(config, params, bias, batch, micro_batches)


def compare(base: str, with_gradient: bool) -> None:
    """The comparison of `test_against_oracle.py`, on the code as it is now."""
    config, micro_batches = BASES[base]
    params, bias, batch, (total, parts, expected_gradient) = prepared(base)
    with jax.enable_x64(True):
        run = shipped(config, micro_batches, with_gradient)
        loss, sums, *gradient = jax.device_get(run(params, bias, batch))
    assert_same_values(sums, loss, parts, total, TOLERANCE)
    if with_gradient:
        assert_same_gradient(gradient[0], expected_gradient, TOLERANCE)


class Mutation(NamedTuple):
    base: str
    apply: Callable[[Patch], None]
    gradient: bool = False
    """Only the gradient shows it."""


def check(mutation: Mutation, monkeypatch: Patch, caught: bool) -> None:
    """That the comparison sees the mutation, or, where it is none, nothing."""
    prepared(mutation.base)  # before the code is broken
    mutation.apply(monkeypatch)
    if not caught:
        compare(mutation.base, with_gradient=False)
        return
    with pytest.raises(AssertionError):
        compare(mutation.base, mutation.gradient)


def half_split(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
