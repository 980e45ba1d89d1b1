"""The comparison with the oracle notices when the decoder or the objective is broken: each mutation must be caught."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import attention, blockwise, moe, transformer
from model.blockwise import Tokens
from model.config import ModelConfig
from sharding.place import Place
from tests import oracle_cases
from tests.model.mutations import BASES, SMALL, Mutation, Patch, check, compare, half_split
from trainer import objective, step


@pytest.mark.parametrize(("base", "with_gradient"), [(base, base == "text") for base in BASES])
def test_unbroken_code_agrees_with_the_oracle(base: str, with_gradient: bool) -> None:
    compare(base, with_gradient)


# ------------------------------------------------------------------------------------------------------------ attention


def mask_with(condition: Callable[..., jax.Array]) -> Callable[[Patch], None]:
    """Replaces the mask by causal and `condition(segments and positions of query and key, their indices, chunk)`."""

    def allowed(queries: Tokens, keys: Tokens, chunk: int | None) -> jax.Array:
        standing = [(tokens.segment_ids, tokens.positions, tokens.places) for tokens in (queries, keys)]
        pairs = [(query[:, None], key[None]) for query, key in zip(*standing, strict=True)]
        return (pairs[2][0] >= pairs[2][1]) & condition(*pairs, chunk)

    return lambda patch: patch.setattr(blockwise, "allowed", allowed)


def same(pair: tuple[jax.Array, jax.Array], divisor: int | None = 1) -> jax.Array:
    return pair[0] // divisor == pair[1] // divisor if divisor else jnp.ones_like(pair[0] == pair[1])


leak_across_segments = mask_with(lambda segment, position, index, chunk: same(position, chunk))
chunk_from_the_rows_start = mask_with(lambda segment, position, index, chunk: same(segment) & same(index, chunk))
sliding_window = mask_with(
    lambda segment, position, index, chunk: same(segment) & (position[0] - position[1] < (chunk or 999))
)
no_chunks = mask_with(lambda segment, position, index, chunk: same(segment))


def half_split_rope(patch: Patch) -> None:
    patch.setattr(attention, "rotate_pairs", half_split)


def rope_scaled_to_unit_norm(patch: Patch) -> None:
    patch.setattr(attention, "rms_normalize", lambda x, eps: x / jnp.linalg.norm(x, axis=-1, keepdims=True))


def no_qk_norm(patch: Patch) -> None:
    patch.setattr(attention, "rms_normalize", lambda x, eps: x)


def around_attention(change: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[[Patch], None]:
    """Replaces queries and keys by `change(q, k, layout, chunk)` just before they meet."""
    original = attention.packed_attention

    def packed(
        q: jax.Array, k: jax.Array, v: jax.Array, layout: attention.Layout, chunk: int | None, place: Place
    ) -> jax.Array:
        return original(*change(q, k, layout, chunk), v, layout, chunk, place)

    return lambda patch: patch.setattr(attention, "packed_attention", packed)


@around_attention
def qk_norm_on_nope_layers(
    q: jax.Array, k: jax.Array, layout: attention.Layout, chunk: int | None
) -> tuple[jax.Array, jax.Array]:
    return (q, k) if chunk else (attention.rms_normalize(q, 1e-5), attention.rms_normalize(k, 1e-5))


@around_attention
def temperature_on_rope_layers(
    q: jax.Array, k: jax.Array, layout: attention.Layout, chunk: int | None
) -> tuple[jax.Array, jax.Array]:
    return (q * attention.temperature(layout.temperature_positions_BS, SMALL)[..., None, None] if chunk else q), k


def temperature_with(factor: Callable[[jax.Array, ModelConfig], jax.Array]) -> Callable[[Patch], None]:
    def temperature(positions: jax.Array, config: ModelConfig) -> jax.Array:
        return 1 + config.temperature_scale * factor(positions, config)

    return lambda patch: patch.setattr(attention, "temperature", temperature)


no_temperature = temperature_with(lambda p, c: jnp.zeros(p.shape))
temperature_from_zero = temperature_with(lambda p, c: jnp.log1p(jnp.floor(p / c.temperature_floor)))
temperature_without_floor = temperature_with(lambda p, c: jnp.log1p((p + 1) / c.temperature_floor))


def temperature_counted_from_the(start: str) -> Callable[[Patch], None]:
    """Whatever the config says."""
    original = attention.Layout.of

    def of(segment_ids: jax.Array, positions: jax.Array, config: ModelConfig, place: Place) -> Any:
        return original(segment_ids, positions, dataclasses.replace(config, temperature_from=start), place)

    return lambda patch: patch.setattr(attention.Layout, "of", of)


def interleaved_query_groups(patch: Patch) -> None:
    original = attention.packed_attention

    def packed(q: jax.Array, k: jax.Array, *others: Any) -> jax.Array:
        by_group = np.argsort(np.arange(q.shape[2]) % k.shape[2], kind="stable")
        return original(q[:, :, by_group], k, *others)[:, :, np.argsort(by_group)]

    patch.setattr(attention, "packed_attention", packed)


# ---------------------------------------------------------------------------------------------- feed-forward and router


def score_on_the_expert_output(patch: Patch) -> None:
    original = moe.MoE.routed

    def routed(self: Any, x_TD: jax.Array, choice_TK: jax.Array, score_TK: jax.Array, repeat: None) -> jax.Array:
        each = range(choice_TK.shape[1])
        one = jnp.ones_like(score_TK[:, :1])
        parts = [score_TK[:, i : i + 1] * original(self, x_TD, choice_TK[:, i : i + 1], one) for i in each]
        return jnp.sum(jnp.stack(parts), axis=0)

    patch.setattr(moe.MoE, "routed", routed)


def route_with(score: Callable[..., jax.Array]) -> Callable[[Patch], None]:
    """Replaces the scores [T,K] by `score(all logits, logits of the chosen, bias of the chosen)`."""
    original = moe.route

    def route(logits: jax.Array, top_k: int, real: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        choice, _ = original(logits, top_k, real, bias)
        inside = jnp.minimum(choice, logits.shape[1] - 1)
        chosen = jnp.take_along_axis(logits, inside, axis=1)
        return choice, score(logits, chosen, 0 if bias is None else bias[inside])

    return lambda patch: patch.setattr(moe, "route", route)


softmax_scores = route_with(
    lambda logits, chosen, bias: jnp.exp(chosen - jax.nn.logsumexp(logits, axis=1, keepdims=True))
)
renormalised_scores = route_with(
    lambda logits, chosen, bias: jax.nn.sigmoid(chosen) / jnp.sum(jax.nn.sigmoid(chosen), axis=1, keepdims=True)
)
bias_in_the_score = route_with(lambda logits, chosen, bias: jax.nn.sigmoid(chosen) + bias)
scores_without_gradient = route_with(lambda logits, chosen, bias: jax.lax.stop_gradient(jax.nn.sigmoid(chosen)))


def bias_ignored(patch: Patch) -> None:
    original = moe.route
    patch.setattr(moe, "route", lambda logits, top_k, real, bias: original(logits, top_k, real, None))


def padding_counted_in_the_balance(patch: Patch) -> None:
    original = moe.router_stats
    patch.setattr(
        moe, "router_stats", lambda logits, choice, real, kept: original(logits, choice, jnp.ones_like(real), kept)
    )


def tokens_over_capacity_dropped(patch: Patch) -> None:
    original = moe.grouped_ffn

    def dropping(name: str) -> Callable[..., jax.Array]:
        def kernel(x_AD: jax.Array, *weights_and_sizes: jax.Array) -> jax.Array:
            sizes_E = weights_and_sizes[-1]
            ends_E, row = jnp.cumsum(sizes_E), jnp.arange(x_AD.shape[0])
            expert = jnp.minimum(jnp.searchsorted(ends_E, row, side="right"), len(sizes_E) - 1)
            kept = row - (ends_E - sizes_E)[expert] < 1.25 * x_AD.shape[0] / len(sizes_E)
            return jnp.where(kept[:, None], original(name)(x_AD, *weights_and_sizes), 0)

        return kernel

    patch.setattr(moe, "grouped_ffn", dropping)


def gate_and_up_swapped(patch: Patch) -> None:
    def call(self: Any, x: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ self.up[...]) * (x @ self.gate[...])) @ self.down[...]

    patch.setattr(moe.SwiGLU, "__call__", call)


def no_shared_expert(patch: Patch) -> None:
    patch.setattr(moe.SwiGLU, "__call__", lambda self, x: jnp.zeros_like(x))


def norm_weight_plus_one(patch: Patch) -> None:
    original = transformer.rms_norm
    patch.setattr(
        transformer, "rms_norm", lambda x, scale, eps: original(x, scale, eps) + original(x, 1 + 0 * scale, eps)
    )


# ------------------------------------------------------------------------------------------------------------ objective


def dropped(term: str) -> Callable[[Patch], None]:
    """The term is reported, but not in what is minimised."""
    original = objective.next_token_objective

    def build(config: Any, sources: int) -> Any:
        return original(dataclasses.replace(config, **{f"{term}_coef": 0.0}), sources)

    return lambda patch: patch.setattr(oracle_cases, "next_token_objective", build)


def without_gradient(term: str) -> Callable[[Patch], None]:
    """The term is in the loss, and teaches nothing."""
    original = getattr(objective, term)
    return lambda patch: patch.setattr(objective, term, lambda *stats: jax.lax.stop_gradient(original(*stats)))


def top_k_not_divided_out(patch: Patch) -> None:
    original = objective.load_balance
    patch.setattr(objective, "load_balance", lambda stats, top_k: original(stats, 1))


def objective_sees(change: Callable[..., tuple[Any, Any]]) -> Callable[[Patch], None]:
    """Replaces the batch and extras that the objective reads by `change(batch, extras)`."""
    original = objective.next_token_objective

    def build(config: Any, sources: int) -> Any:
        unbroken = original(config, sources)
        return lambda model, batch, extras: unbroken(model, *change(batch, extras))

    return lambda patch: patch.setattr(oracle_cases, "next_token_objective", build)


loss_weights_ignored = objective_sees(
    lambda batch, extras: (batch | {"loss_weights": (batch["loss_weights"] > 0).astype(jnp.float32)}, extras)
)
targets_not_shifted = objective_sees(lambda batch, extras: (batch | {"targets": batch["tokens"]}, extras))
mean_of_each_micro_batch = objective_sees(
    lambda batch, extras: (batch, dataclasses.replace(extras, weight_total=2 * jnp.sum(batch["loss_weights"])))
)
balance_summed_over_micro_batches = objective_sees(lambda batch, extras: (batch, dataclasses.replace(extras, shares=1)))


def loss_over_tokens_instead_of_weights(patch: Patch) -> None:
    original = step.extras_for

    def extras(batch: Any, shares: int) -> Any:
        return dataclasses.replace(original(batch, shares), weight_total=jnp.sum(batch["loss_weights"] > 0))

    patch.setattr(step, "extras_for", extras)


# ------------------------------------------------------------------------------------------------------------- the test


MUTATIONS: dict[str, Mutation] = {
    "a leak across segments": Mutation("text", leak_across_segments),
    "chunks counted from the row's start": Mutation("text", chunk_from_the_rows_start),
    "a sliding window instead of chunks": Mutation("text", sliding_window),
    "no chunks": Mutation("text", no_chunks),
    "half-split RoPE": Mutation("text", half_split_rope),
    "queries and keys of norm 1": Mutation("text", rope_scaled_to_unit_norm),
    "no qk-norm": Mutation("text", no_qk_norm),
    "qk-norm on NoPE layers": Mutation("text", qk_norm_on_nope_layers),
    "temperature on RoPE layers": Mutation("text", temperature_on_rope_layers),
    "no temperature": Mutation("text", no_temperature),
    "temperature from position 0": Mutation("text", temperature_from_zero),
    "temperature without the floor": Mutation("text", temperature_without_floor),
    "temperature from the row's start": Mutation("text", temperature_counted_from_the("row")),
    "temperature from the document's start": Mutation("temperature by row", temperature_counted_from_the("document")),
    "interleaved query groups": Mutation("text", interleaved_query_groups),
    "the score on the expert's output": Mutation("text", score_on_the_expert_output),
    "softmax scores": Mutation("text", softmax_scores),
    "renormalised scores": Mutation("text", renormalised_scores),
    "scores without gradient": Mutation("text", scores_without_gradient, gradient=True),
    "the bias in the score": Mutation("router bias", bias_in_the_score),
    "the bias ignored": Mutation("router bias", bias_ignored),
    "padding counted in the balance": Mutation("text", padding_counted_in_the_balance),
    "tokens over capacity dropped": Mutation("text", tokens_over_capacity_dropped),
    "gate and up swapped": Mutation("text", gate_and_up_swapped),
    "no shared expert": Mutation("text", no_shared_expert),
    "norms that add one to the weight": Mutation("text", norm_weight_plus_one),
    "load balance reported only": Mutation("text", dropped("load_balance")),
    "z-loss reported only": Mutation("text", dropped("router_z")),
    "load balance without gradient": Mutation("text", without_gradient("load_balance"), gradient=True),
    "z-loss without gradient": Mutation("text", without_gradient("router_z"), gradient=True),
    "load balance not divided by top-k": Mutation("text", top_k_not_divided_out),
    "loss weights ignored": Mutation("text", loss_weights_ignored),
    "targets not shifted": Mutation("text", targets_not_shifted),
    "the loss divided by tokens": Mutation("text", loss_over_tokens_instead_of_weights),
    "a mean of each micro-batch": Mutation("two micro-batches", mean_of_each_micro_batch),
    "balance summed over micro-batches": Mutation("two micro-batches", balance_summed_over_micro_batches),
}


UNBROKEN: dict[str, Mutation] = {
    "mask": Mutation("text", mask_with(lambda segment, position, index, chunk: same(segment) & same(position, chunk))),
    "queries and keys": Mutation("text", around_attention(lambda q, k, layout, chunk: (q, k))),
    "temperature": Mutation("text", temperature_with(lambda p, c: jnp.log1p(jnp.floor((p + 1) / c.temperature_floor)))),
    "scores": Mutation("router bias", route_with(lambda logits, chosen, bias: jax.nn.sigmoid(chosen))),
    "objective": Mutation("text", objective_sees(lambda batch, extras: (batch, extras))),
}
"""What builds the mutations, given the right formula: else a mutation might be caught for a mistake of its own."""


@pytest.mark.parametrize("name", UNBROKEN)
def test_what_builds_the_mutations_breaks_nothing_by_itself(name: str, monkeypatch: Patch) -> None:
    check(UNBROKEN[name], monkeypatch, caught=False)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str, monkeypatch: Patch) -> None:
    check(MUTATIONS[name], monkeypatch, caught=True)
