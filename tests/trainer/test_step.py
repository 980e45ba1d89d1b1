"""The shipped step: accumulation, skipped steps, router bias, schedules, decay."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.config import DataConfig
from model.config import ModelConfig
from tests.oracle_cases import FAST_COMPILE, SOURCES, TINY, random_batch
from trainer.config import ObjectiveConfig, OptimizerConfig, RunConfig
from trainer.objective import by_source, metrics, next_token_objective
from trainer.optimizer import adamw, decay_mask, learning_rate
from trainer.step import Skeleton, init_state, make_train_step

MODEL = dataclasses.replace(
    TINY, num_layers=2, moe_layer_step=2, nope_layer_step=2, dtype="float64", param_dtype="float64"
)
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=1, schedule="constant")


def run_config(model: ModelConfig = MODEL, accumulate: int = 1) -> RunConfig:
    optimizer = dataclasses.replace(OPTIMIZER, accumulate=accumulate)
    return RunConfig(steps=10, model=model, data=DataConfig(batch_size=4), optimizer=optimizer)


def doubled(batch: dict) -> dict:
    """Four rows out of two."""
    return {name: np.concatenate([array, array[::-1]]) for name, array in batch.items()}


@functools.cache
def step_of(model: ModelConfig = MODEL, accumulate: int = 1, load_balance: float = 0.01, router_z: float = 0.001):
    """The shipped step, compiled once for all tests that use it."""
    run = run_config(model, accumulate)
    objective = next_token_objective(ObjectiveConfig(load_balance, router_z), SOURCES)
    return jax.jit(make_train_step(run, Skeleton(run.model), objective), compiler_options=FAST_COMPILE)


@pytest.fixture
def batch() -> dict:
    batch = doubled(random_batch(MODEL, 3))
    batch["loss_weights"][0] *= 0.25  # micro-batches of unequal weight: a mean of means would not do
    return batch


def test_accumulated_micro_batches_equal_the_whole_batch(batch: dict) -> None:
    with jax.enable_x64(True):
        state = init_state(run_config())
        whole, sums = step_of(load_balance=0, router_z=0)(state, batch)
        parts, part_sums = step_of(accumulate=2, load_balance=0, router_z=0)(state, batch)
    for name in ("loss", "grad_norm", "source_loss", "source_weight", "tokens", "assignments"):
        np.testing.assert_allclose(part_sums[name], sums[name], rtol=1e-12, err_msg=name)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(batch: dict) -> None:
    broken = batch | {"loss_weights": np.where(batch["loss_weights"] > 0, np.inf, 0).astype(np.float32)}
    with jax.enable_x64(True):
        step = step_of()
        first, _ = step(init_state(run_config()), batch)
        second, sums = step(first, broken)
        third, after = step(second, batch)
    for name in ("params", "optimizer"):
        pairs = zip(jax.tree.leaves(getattr(first, name)), jax.tree.leaves(getattr(second, name)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert (int(second.step), int(sums["skipped"]), int(sums["skipped_in_a_row"])) == (2, 1, 1)
    assert (int(third.step), int(after["skipped"]), int(after["skipped_in_a_row"])) == (3, 1, 0)


def test_a_batch_without_targets_has_a_loss_of_zero(batch: dict) -> None:
    empty = batch | {"loss_weights": np.zeros_like(batch["loss_weights"])}
    with jax.enable_x64(True):
        _, sums = step_of()(init_state(run_config()), empty)
    assert float(sums["loss"]) == 0
    assert int(sums["skipped"]) == 0


def test_the_router_bias_moves_against_the_load_and_changes_the_choice(batch: dict) -> None:
    # Layers 1 and 3 are mixtures: two repeats of a super-block of two layers, one bias each.
    model = dataclasses.replace(MODEL, num_layers=4, router_bias_rate=0.5)
    with jax.enable_x64(True):
        step, state = step_of(model), init_state(run_config(model))
        after, sums = step(state, batch)
        _, moved = step(dataclasses.replace(after, params=state.params), batch)
    bias_RE = np.asarray(after.router_bias["blocks"][1]["ffn"]["router_bias"])
    load_LE = np.asarray(sums["assignments"])
    expected = -0.5 * np.sign(load_LE - load_LE.mean(axis=1, keepdims=True))
    np.testing.assert_array_equal(bias_RE, expected.astype(np.float32))
    # Half of the sigmoid's range is more than the scores differ by: the busiest expert is left.
    busiest = load_LE.argmax(axis=1)
    assert all(np.asarray(moved["assignments"])[i, e] < load_LE[i, e] for i, e in enumerate(busiest))


@pytest.mark.parametrize("term", ["load_balance", "router_z"])
def test_each_auxiliary_term_has_a_gradient(batch: dict, term: str) -> None:
    def router_moment(coefficient: float) -> np.ndarray:
        step = step_of(**({"load_balance": 0, "router_z": 0} | {term: coefficient}))
        after, _ = step(init_state(run_config()), batch)
        return np.asarray(after.optimizer[1].mu["blocks"][1]["ffn"]["router"])

    with jax.enable_x64(True):
        assert np.abs(router_moment(1.0) - router_moment(0)).max() > 1e-6


def test_losses_and_tokens_of_each_source_are_those_of_its_tokens_alone(batch: dict) -> None:
    """The loss of a source is the whole loss where the targets of all others weigh nothing."""
    names = ["first", "second", "third"]
    with jax.enable_x64(True):
        step, state = step_of(load_balance=0, router_z=0), init_state(run_config())
        logged = metrics(step(state, batch)[1], names)
        for i, name in enumerate(names, start=1):
            own = batch["source_ids"] == i
            alone = batch | {"loss_weights": np.where(own, batch["loss_weights"], 0)}
            np.testing.assert_allclose(logged[f"loss/{name}"], step(state, alone)[1]["loss"], rtol=1e-12)
            assert logged[f"tokens/{name}"] == own.sum() > 0
            assert logged[f"targets/{name}"] == alone["loss_weights"].sum() > 0
    assert len({float(logged[f"loss/{name}"]) for name in names}) == 3


def rates(config: OptimizerConfig, steps: int = 20) -> np.ndarray:
    return np.array([learning_rate(config, steps)(step) for step in range(steps)])


def test_sums_by_source_are_those_of_float64() -> None:
    random = np.random.default_rng(0)
    values, sources = random.uniform(4, 7, 1 << 17).astype(np.float32), random.integers(0, 4, 1 << 17)
    expected = [values[sources == source].sum(dtype=np.float64) for source in (1, 2, 3)]
    np.testing.assert_allclose(jax.jit(by_source, static_argnums=2)(values, sources, 3), expected, rtol=3e-7)


def test_schedules() -> None:
    config = OptimizerConfig(peak_lr=1.0, warmup_steps=4, final_lr_fraction=0.1)
    cosine = rates(config)
    np.testing.assert_allclose(cosine[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(cosine[11], 0.1 + 0.9 * 0.5, rtol=1e-6)  # half way down
    np.testing.assert_allclose(cosine[19], 0.1, rtol=1e-6)
    wsd = dataclasses.replace(config, schedule="wsd", decay_steps=5)
    np.testing.assert_allclose(rates(wsd)[3:14], 1.0, rtol=1e-6)
    np.testing.assert_allclose(rates(wsd)[14:], [1 - 0.18 * i for i in range(6)], rtol=1e-5)
    constant = dataclasses.replace(config, schedule="constant")
    assert rates(constant)[19] == 1.0


def test_decay_touches_matrices_alone() -> None:
    params = Skeleton(dataclasses.replace(MODEL, param_dtype="float32")).abstract_params
    mask = decay_mask(params)
    assert mask["blocks"][1]["ffn"]["router"] and mask["embed"] and mask["lm_head"]
    assert not (mask["final_norm"] or mask["blocks"][0]["attn_norm"] or mask["blocks"][0]["ffn_norm"])


def test_the_update_is_adamw_of_optax(batch: dict) -> None:
    """Against optax's own composition, with the learning rate inside."""
    config = dataclasses.replace(OPTIMIZER, clip_norm=0.5, peak_lr=1e-2)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    gradient = jax.tree.map(lambda p: 2 * p, params)
    direction, _ = adamw(config).update(gradient, adamw(config).init(params), params)
    reference = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(1e-2, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=decay_mask),
    )
    updates, _ = reference.update(gradient, reference.init(params), params)
    for got, want in zip(jax.tree.leaves(direction), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(-1e-2 * got, want, rtol=1e-6)
