"""Experts of limited capacity: who is dropped, who is counted, and that decoding drops nobody."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.moe import within_capacity
from sharding.place import Place
from tests.oracle_cases import (
    COEFFICIENTS,
    FAST_COMPILE,
    SOURCES,
    TINY,
    random_batch,
    random_params,
    shipped,
)
from trainer.objective import metrics, next_token_objective
from trainer.step import Skeleton, extras_for

ROWS, E = 3, 4
CONFIG = dataclasses.replace(TINY, num_experts=E, experts_per_token=2, moe_layer_step=1, nope_layer_step=2)


@functools.cache
def sums(capacity_factor: float) -> tuple[float, dict[str, Any]]:
    config = dataclasses.replace(CONFIG, capacity_factor=capacity_factor)
    loss, found = shipped(config, with_gradient=False)(random_params(config, 1), {}, random_batch(config, 1, rows=ROWS))
    return float(loss), jax.device_get(found)


@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
def test_the_first_tokens_of_a_row_find_room(capacity: int) -> None:
    choice = np.random.default_rng(0).integers(0, E + 1, (ROWS * 20, 2))  # E stands for padding
    found = within_capacity(jnp.asarray(choice), ROWS, E, capacity, Place())
    expected = choice.copy()
    for row in range(ROWS):
        taken = np.zeros(E + 1, int)
        for t in range(row * 20, (row + 1) * 20):
            for k in range(2):
                expert = choice[t, k]
                expected[t, k] = expert if taken[expert] < capacity else E
                taken[expert] += 1
    np.testing.assert_array_equal(found, expected)


def test_room_for_all_is_no_limit() -> None:
    free, roomy = sums(0.0), sums(float(E))
    assert "dropped" not in free[1] and roomy[1]["dropped"].sum() == 0
    assert free[0] == roomy[0]


def test_what_is_dropped_is_counted_in_every_layer_and_changes_the_loss() -> None:
    loss, found = sums(0.5)
    assert found["dropped"].shape == (CONFIG.num_layers,) and (found["dropped"] > 0).all()
    assert loss != sums(0.0)[0]
    # The router's balance is that of its choices, whether they found room or not.
    assert found["assignments"][0].sum() == sums(0.0)[1]["assignments"][0].sum()
    shown = metrics({name: jnp.asarray(value) for name, value in found.items()}, ["a", "b", "c"])
    np.testing.assert_array_equal(shown["experts/dropped"], found["dropped"])


def test_a_row_does_not_take_the_room_of_another() -> None:
    config = dataclasses.replace(CONFIG, capacity_factor=0.5)
    params, batch = jax.device_put(random_params(config, 1)), random_batch(config, 1, rows=ROWS)
    skeleton, objective = Skeleton(config), next_token_objective(COEFFICIENTS, SOURCES)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def dropped(batch: Any) -> Any:
        return objective(skeleton.model(params, {}), batch, extras_for(batch, 1))[1]["dropped"]

    rows = [dropped({name: array[[b] * ROWS] for name, array in batch.items()}) / ROWS for b in range(ROWS)]
    np.testing.assert_array_equal(dropped(batch), np.sum(rows, axis=0))


def test_decoding_drops_nobody() -> None:
    config = dataclasses.replace(CONFIG, capacity_factor=0.25)
    params = jax.device_put(random_params(config, 1))
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 12)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape),
    }

    def hidden(config: Any, prefill: bool) -> Any:
        skeleton = Skeleton(config)

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def run(batch: Any) -> Any:
            model = skeleton.model(params, {})
            return model.prefill(batch, 16)[0] if prefill else model(batch).hidden_BSD

        return run(batch)

    free = hidden(dataclasses.replace(config, capacity_factor=0.0), prefill=False)
    np.testing.assert_array_equal(hidden(config, prefill=True), free)
    assert not np.array_equal(hidden(config, prefill=False), free)
