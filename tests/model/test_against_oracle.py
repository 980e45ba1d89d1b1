"""The shipped objective, its gradient and the whole training step against the float64 oracle, feature by feature.

Every pair of feature values meets in at least one case; `-m slow` draws many more combinations at random.
"""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import blockwise, grouped_ffn
from model.config import ModelConfig, RopeScaling
from tests import oracle
from tests.oracle_cases import (
    AUDIO,
    COEFFICIENTS,
    SOURCES,
    TINY,
    VISION,
    assert_same_gradient,
    assert_same_values,
    bias_of_layers,
    expected,
    random_batch,
    random_bias,
    random_params,
    routing_margin,
    shipped,
    with_clip,
)
from trainer.config import OptimizerConfig, RunConfig
from trainer.objective import next_token_objective
from trainer.optimizer import NOT_DECAYED, adamw
from trainer.step import Skeleton, TrainState, make_train_step

FLOAT64 = 1e-10
FLOAT32 = 1e-4
BFLOAT16 = 0.2
"""Of gradients, leaf by leaf. bfloat16 keeps 8 bits, and a router's gradient is a small difference of large terms."""

FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "layers": {
        "dense": {"moe_layer_step": 0},
        "scout": {"moe_layer_step": 1},
        "maverick": {"moe_layer_step": 2},
        "irregular": {"moe_layers": (0, 3), "nope_layers": (1,)},
    },
    "positions": {
        "4": {"nope_layer_step": 4},
        "2": {"nope_layer_step": 2},
        "all rotary": {"nope_layer_step": 0},
    },
    "top-k": {"1": {"experts_per_token": 1}, "2": {"experts_per_token": 2}},
    "chunk": {"3": {"chunk_size": 3}, "8": {"chunk_size": 8}, "whole row": {"chunk_size": 99}},
    "rope": {
        "plain": {},
        "scout": {"rope_scaling": RopeScaling(4.0, 1.0, 1.0, 60)},
        "blended": {"rope_scaling": RopeScaling(4.0, 0.5, 4.0, 60)},
    },
    "qk-norm": {"on": {"qk_norm": True}, "off": {"qk_norm": False}},
    "temperature": {
        "on": {"temperature_tuning": True},
        "off": {"temperature_tuning": False},
        "by row": {"temperature_from": "row"},
    },
    "heads": {"4/2": {}, "4/1": {"num_kv_heads": 1}, "4/4": {"num_kv_heads": 4}},
    "output": {"own": {}, "tied": {"tie_embeddings": True}},
    "images": {"no": {}, "yes": {"vision": VISION}},
    "audio": {"no": {}, "yes": {"audio": AUDIO}},
    "bias": {"no": {}, "yes": {"router_bias_rate": 0.1}},
    "remat": {"none": {"remat": "none"}, "dots": {"remat": "dots"}, "full": {"remat": "full"}},
    "scan": {"yes": {"scan_layers": True}, "no": {"scan_layers": False}},
    "kernel": {"blocks": {"expert_kernel": "blocks"}, "ragged_dot": {"expert_kernel": "ragged_dot"}},
    "micro-batches": {"1": {}, "2": {}},
    "blocks": {"as shipped": {}, "small": {}},
}
"""Feature -> value -> what it sets in the model's config. The last two are read by `run_case`."""

Case = dict[str, str]
DEFAULT: Case = {feature: next(iter(values)) for feature, values in FEATURES.items()}


def all_pairs() -> list[Case]:
    """Cases in which every pair of values of any two features occurs, greedily few; always the same ones."""
    names = list(FEATURES)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in FEATURES[a] for y in FEATURES[b]}
    rng, cases = np.random.default_rng(0), []

    def pairs(case: Case) -> set[tuple]:
        return set(itertools.combinations(case.items(), 2))

    while missing:
        candidates = [{name: str(rng.choice(list(FEATURES[name]))) for name in names} for _ in range(60)]
        for candidate in candidates:
            for name in names:  # one pass of improvement, feature by feature
                candidate[name] = max(FEATURES[name], key=lambda value: len(pairs(candidate | {name: value}) & missing))
        best = max(candidates, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(best)
    return cases


def config_of(case: Case, dtype: str) -> ModelConfig:
    changes: dict[str, Any] = {"dtype": dtype, "param_dtype": "float64" if dtype == "float64" else "float32"}
    for feature, value in case.items():
        changes |= FEATURES[feature][value]
    return dataclasses.replace(TINY, **changes)


def run_case(case: Case, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    """Two batches of one shape through one compilation, in float64; with images, one has a clip."""
    config, micro_batches = config_of(case, "float64"), int(case["micro-batches"])
    assert not list(config.problems())
    if case["blocks"] == "small":  # several blocks of queries, of keys and of expert rows
        monkeypatch.setattr(blockwise, "BLOCK", 5)
        monkeypatch.setattr(grouped_ffn, "BLOCK_ROWS", 4)
    with jax.enable_x64(True):
        run = shipped(config, micro_batches)
        for draw in (2 * seed, 2 * seed + 1):
            params, bias = oracle.as_float64(random_params(config, draw)), random_bias(config, draw)
            batch = random_batch(config, draw, tiles=3)
            if config.vision and draw % 2:
                batch = with_clip(config, batch, draw)
            loss, sums, gradient = jax.device_get(run(params, bias, batch))
            total, parts, expected_gradient = expected(config, params, bias, batch, micro_batches)
            assert_same_values(sums, loss, parts, total, FLOAT64)
            assert_same_gradient(gradient, expected_gradient, FLOAT64)
            assert sums["tokens"] == (batch["segment_ids"] > 0).sum()
            if config.audio:
                assert sums["audio_windows"] == (batch["audio_positions"] >= 0).any(axis=2).sum()
            else:
                assert "audio_windows" not in sums


@pytest.mark.parametrize("case", all_pairs(), ids=lambda case: "|".join(case.values()))
def test_objective_and_gradient_are_those_of_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run_case(case, monkeypatch)


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
@given(
    case=st.fixed_dictionaries({name: st.sampled_from(list(values)) for name, values in FEATURES.items()}),
    seed=st.integers(0, 1000),
)
def test_any_combination_of_features_agrees_with_the_oracle(case: Case, seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_case(case, monkeypatch, seed)


def test_a_row_of_several_query_blocks_and_full_expert_blocks_agrees_with_the_oracle() -> None:
    config = dataclasses.replace(TINY, dtype="float64", param_dtype="float64", chunk_size=50, num_experts=2)
    batch = random_batch(config, 3, rows=1, length=300, longest=120)
    with jax.enable_x64(True):
        params = oracle.as_float64(random_params(config, 3))
        loss, sums, gradient = jax.device_get(shipped(config)(params, {}, batch))
        total, parts, expected_gradient = expected(config, params, {}, batch)
    assert max(count.max() for count in parts["counts"].values()) > grouped_ffn.BLOCK_ROWS
    assert_same_values(sums, loss, parts, total, FLOAT64)
    assert_same_gradient(gradient, expected_gradient, FLOAT64)


LOWER_PRECISION = {
    "text": DEFAULT | {"layers": "maverick"},
    "images and sound": DEFAULT
    | {"layers": "scout", "images": "yes", "audio": "yes", "top-k": "2", "positions": "2", "output": "tied"},
    "recomputed": DEFAULT | {"layers": "scout", "remat": "full", "micro-batches": "2", "rope": "scout"},
}


@pytest.mark.parametrize("name", LOWER_PRECISION)
@pytest.mark.parametrize(("dtype", "margin", "loss_tolerance", "tolerance"), [
    ("float32", 1e-3, 2e-5, FLOAT32),
    ("bfloat16", 0.05, 2e-2, BFLOAT16),
])  # fmt: skip
def test_lower_precision_stays_close_to_the_oracle(
    name: str, dtype: str, margin: float, loss_tolerance: float, tolerance: float
) -> None:
    case = LOWER_PRECISION[name]
    config = dataclasses.replace(config_of(case, dtype), num_layers=2)
    micro_batches = int(case["micro-batches"])
    # Data on which rounding cannot change an expert's choice: a flipped choice is another function.
    for seed in range(400):
        params, batch = random_params(config, seed), random_batch(config, seed, length=9)
        if routing_margin(config, params, {}, batch) > margin:
            break
    else:
        raise AssertionError("no seed with this margin")
    loss, sums, gradient = jax.device_get(shipped(config, micro_batches)(params, {}, batch))
    total, parts, expected_gradient = expected(config, params, {}, batch, micro_batches)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(gradient))
    assert_same_values(sums, loss, parts, total, loss_tolerance)
    assert_same_gradient(gradient, expected_gradient, tolerance)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_training_steps_are_those_of_the_oracle(micro_batches: int) -> None:
    """Three steps of AdamW with warmup, cosine, clipping, decay mask and router bias, from the oracle's gradients."""
    model = dataclasses.replace(
        TINY, num_layers=2, nope_layer_step=2, dtype="float64", param_dtype="float64", router_bias_rate=0.05
    )
    run = RunConfig(
        steps=6,
        model=model,
        optimizer=OptimizerConfig(peak_lr=0.02, warmup_steps=2, clip_norm=0.5, accumulate=micro_batches),
    )
    options = run.optimizer
    with jax.enable_x64(True):
        params, bias = oracle.as_float64(random_params(model, 5)), random_bias(model, 5)
        step = jax.jit(make_train_step(run, Skeleton(model), next_token_objective(COEFFICIENTS, SOURCES)))
        zero: Any = np.zeros((), np.int32)
        bias = jax.tree.map(np.float64, bias)
        state = TrainState(zero, params, bias, adamw(options).init(params), zero, zero)
        first, second = (oracle.map_leaves(np.zeros_like, params) for _ in range(2))
        for t in range(3):
            batch = random_batch(model, 10 + t)
            state, sums = step(state, batch)
            _, parts, gradient = expected(model, params, bias, batch, micro_batches)
            norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
            assert norm > options.clip_norm
            rate = options.peak_lr * (t + 1) / 2
            if t + 1 > 2:
                progress, final = (t + 1 - 2) / (run.steps - 2), options.final_lr_fraction
                rate = options.peak_lr * (final + (1 - final) * (1 + np.cos(np.pi * progress)) / 2)
            np.testing.assert_allclose(sums["grad_norm"], norm, rtol=1e-12)
            np.testing.assert_allclose(sums["learning_rate"], rate, rtol=1e-6)
            rate = float(sums["learning_rate"])
            params, first, second = adamw_step(params, gradient, first, second, t + 1, options, rate, norm)
            for i, layer_bias in (bias_of_layers(model, bias) or {}).items():
                excess = parts["counts"][i] - parts["counts"][i].mean()
                layer_bias -= model.router_bias_rate * np.sign(excess)  # a view: moves `bias` itself
    for found, wanted in ((state.params, params), (state.router_bias, bias)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), jax.device_get(found), wanted)
    assert (int(state.step), int(state.skipped)) == (3, 0)


def adamw_step(
    params: Any, gradient: Any, first: Any, second: Any, t: int, options: OptimizerConfig, rate: float, norm: float
) -> tuple[Any, Any, Any]:
    """AdamW (arXiv 1711.05101, algorithm 2) on gradients clipped to a global norm; returns weights and both moments."""
    clipped = oracle.map_leaves(lambda g: g * min(1, options.clip_norm / norm), gradient)
    first = jax.tree.map(lambda m, g: options.beta1 * m + (1 - options.beta1) * g, first, clipped)
    second = jax.tree.map(lambda v, g: options.beta2 * v + (1 - options.beta2) * g**2, second, clipped)

    def moved(path: Any, p: np.ndarray, m: np.ndarray, v: np.ndarray) -> np.ndarray:
        adam = m / (1 - options.beta1**t) / (np.sqrt(v / (1 - options.beta2**t)) + options.eps)
        decay = 0 if path[-1].key in NOT_DECAYED else options.weight_decay
        return p - rate * (adam + decay * p)

    return jax.tree_util.tree_map_with_path(moved, params, first, second), first, second
