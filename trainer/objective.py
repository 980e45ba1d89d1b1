"""Objectives: (model, batch, extras) -> (loss, sums). The next-token loss with the router's auxiliary terms.

Every value in `sums` is additive over micro-batches and devices, and the loss of a step is the sum of their losses.
Letters: B rows, S sequence, T tokens, L mixture-of-experts layers, E experts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from model.moe import RouterStats
from model.transformer import Batch, Medium, Transformer, here
from model.vocab_loss import token_losses
from sharding.place import Place
from trainer.config import ObjectiveConfig

Sums = dict[str, jax.Array]
OTHER = "other/"
"""Begins the names of sums by source that an objective adds to those of the next-token loss."""
SAMPLED = "sampled"
"""Of a batch: which targets the model has written itself, bool [B,S]; they count in no mean over the targets of the data."""
OF_SAMPLED = f"{SAMPLED}/"
"""Begins the names of what is told of those targets."""
TAUGHT = "taught"
"""Of an objective that learns from a teacher: the share of the tokens of which the teacher speaks."""
OVER_TAUGHT = ("soft", "teacher_loss", "teacher_entropy", "teacher_correct")
"""What is a mean over those tokens, not over all."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extras:
    """What a micro-batch has to know of the step that it belongs to."""

    weight_total: jax.Array
    """Sum of the loss weights over the whole batch of the step, all micro-batches and devices."""
    shares: int = dataclasses.field(metadata={"static": True})
    """Micro-batches of the step times parts of their rows: what comes from a micro-batch's totals counts so many times."""
    progress: jax.Array | float = 0.0
    """Share of the run's steps that are done."""
    teacher: Transformer | None = None
    """A model to learn from, for an objective that does."""


Objective = Callable[[Transformer, Batch, Extras], tuple[jax.Array, Sums]]


def extras_for(batch: Mapping[str, jax.Array], shares: int, progress: jax.Array | float = 0.0) -> Extras:
    """Extras of a step on `batch`; a batch without any weighted target has a loss of zero, not of 0/0."""
    total = jnp.sum(batch["loss_weights"])
    return Extras(jnp.where(total > 0, total, 1), shares, progress)


def load_balance(stats: RouterStats, top_k: int) -> jax.Array:
    """Load-balance loss (arXiv 2101.03961, eq. 4), mean over layers: E x sum_e f_e P_e.

    f_e is the share of the assignments that go to expert e, P_e the mean router probability: 1.0 when balanced. Both
    are over all tokens of the micro-batch, padding aside.
    """
    tokens = jnp.maximum(stats.tokens, 1)[:, None]
    share_LE, probability_LE = stats.assignments_E / (top_k * tokens), stats.probability_E / tokens
    return jnp.mean(share_LE.shape[1] * jnp.sum(share_LE * probability_LE, axis=1))


def router_z(stats: RouterStats) -> jax.Array:
    """Router z-loss (arXiv 2202.08906, eq. 5), mean over layers and tokens: logsumexp(router logits)^2."""
    return jnp.mean(stats.z / jnp.maximum(stats.tokens, 1))


def used(batch: Batch, medium: Medium, place: Place) -> jax.Array:
    """Tiles or windows of sound whose first token is here: unless rows are split, all of them but empty slots."""
    return jnp.sum(here(batch, medium, place)[:, :, 0] >= 0)


def media_sums(batch: Batch, place: Place) -> Sums:
    """`tiles`, 0 where the batch has none, and, only where it has sound, `audio_windows`."""
    none = jnp.zeros((), jnp.int32)
    sums = {"tiles": used(batch, "image", place) if "image_positions" in batch else none}
    return sums | ({"audio_windows": used(batch, "audio", place)} if "audio_positions" in batch else {})


def by_source(values_T: jax.Array, sources_T: jax.Array, num_sources: int) -> jax.Array:
    """Sums [N] of the values of each source; sources count from 1, and 0 is padding.

    Not `segment_sum`: a scatter adds in float32 one value after another, 1e-6 off at a thousand tokens, and on a GPU in
    any order.
    """
    return jnp.sum(jnp.where(sources_T == 1 + jnp.arange(num_sources)[:, None], values_T, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """What an objective makes of the tokens [T] of a micro-batch, before weights."""

    minimised_T: jax.Array
    """What the step lowers, in the mean over the weights of the targets."""
    next_token_T: jax.Array
    """-log probability of the target."""
    others: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    """More to log, by name, each [T]."""


TokenLoss = Callable[[Transformer, jax.Array, Batch, Extras], TokenLosses]
"""(model, hidden_TD, batch, extras) -> losses of the tokens"""


def next_token_objective(config: ObjectiveConfig, num_sources: int) -> Objective:
    """Weighted mean of the next-token losses over the whole step, plus the router terms, mean over micro-batches."""

    def losses(model: Transformer, hidden_TD: jax.Array, batch: Batch, _: Extras) -> TokenLosses:
        losses_T = token_losses(hidden_TD, model.head(), batch["targets"].reshape(-1), config.block_tokens, model.place)
        return TokenLosses(losses_T, losses_T)

    return token_objective(config, num_sources, losses)


def token_objective(config: ObjectiveConfig, num_sources: int, token_loss: TokenLoss) -> Objective:
    """Weighted mean of what is minimised of each token over the whole step, plus the router terms, mean over
    micro-batches."""

    def objective(model: Transformer, batch: Batch, extras: Extras) -> tuple[jax.Array, Sums]:
        output = model(batch)
        hidden_TD = output.hidden_BSD.reshape(-1, output.hidden_BSD.shape[-1])
        losses = token_loss(model, hidden_TD, batch, extras)
        weights_T = batch["loss_weights"].reshape(-1).astype(losses.minimised_T.dtype)
        weight_total = extras.weight_total.astype(weights_T.dtype)
        sources_T = batch["source_ids"].reshape(-1)
        real_T = batch["segment_ids"].reshape(-1) > 0
        given_T = jnp.where(batch[SAMPLED].reshape(-1), 0, weights_T) if SAMPLED in batch else weights_T

        def totals(values_T: jax.Array) -> jax.Array:
            return by_source(values_T * given_T, sources_T, num_sources)

        sums = {
            "tokens": jnp.sum(real_T),
            **media_sums(batch, model.place),
            "source_tokens": by_source(real_T.astype(jnp.int32), sources_T, num_sources),
            "source_loss": totals(losses.next_token_T),
            "source_weight": by_source(given_T, sources_T, num_sources),
            "loss": jnp.sum(losses.next_token_T * given_T) / weight_total,
            **{f"{OTHER}{name}": totals(values_T) for name, values_T in losses.others.items()},
        }
        if SAMPLED in batch:
            sampled_T = weights_T - given_T
            told = {"loss": losses.next_token_T, **losses.others}
            sums |= {f"{OF_SAMPLED}{name}": jnp.sum(values_T * sampled_T) for name, values_T in told.items()}
            sums[SAMPLED] = jnp.sum(sampled_T)
        loss = jnp.sum(losses.minimised_T * weights_T) / weight_total
        if output.router is not None:
            everywhere = model.place.total(output.router)
            sums["load_balance"] = load_balance(everywhere, model.config.experts_per_token) / extras.shares
            sums["router_z"] = router_z(everywhere) / extras.shares
            sums["assignments"] = output.router.assignments_E
            if model.config.capacity_factor:
                sums["dropped"] = output.router.dropped
            loss += config.load_balance_coef * sums["load_balance"] + config.router_z_coef * sums["router_z"]
        return loss, jax.lax.stop_gradient(sums)

    return objective


def metrics(sums: Sums, source_names: Sequence[str]) -> dict[str, jax.Array]:
    """What is logged of a step: losses, means by source, auxiliary terms, the experts' load.

    `tokens/<source>` are its tokens, `targets/<source>` is the weight of its targets; without any, its means are NaN.
    `experts/load` [L, E] are shares of the layer's assignments; `experts/imbalance` is the largest load over the mean one,
    in the worst layer. With a capacity factor, `experts/dropped` [L] counts the assignments that found no room.
    Of targets that the model has written itself, `sampled` is their share, and `sampled/<name>` a mean over them; all other
    means are over the targets of the data. Those of `OVER_TAUGHT` are over the ones that are `taught`. A mean over none is
    NaN; `without_empty_means` takes it out.
    """
    named = {"source_tokens", "source_loss", "source_weight", "load_balance", "router_z", "assignments", "dropped"}
    others = {name.removeprefix(OTHER): value for name, value in sums.items() if name.startswith(OTHER)}
    logged = {name: value for name, value in sums.items() if name not in named and not name.startswith(OTHER)}
    mean_N = sums["source_loss"] / sums["source_weight"]
    for i, name in enumerate(source_names):
        logged |= {
            f"loss/{name}": mean_N[i],
            f"targets/{name}": sums["source_weight"][i],
            f"tokens/{name}": sums["source_tokens"][i],
        }
    for other, total_N in others.items():
        weight_N = others[TAUGHT] if other in OVER_TAUGHT else sums["source_weight"]
        logged[other] = jnp.sum(total_N) / jnp.sum(weight_N)
        mean_N = total_N / weight_N
        logged |= {f"{other}/{name}": mean_N[i] for i, name in enumerate(source_names)}
    if SAMPLED in sums:
        own, given = sums[SAMPLED], jnp.sum(sums["source_weight"])
        for name in (name for name in sums if name.startswith(OF_SAMPLED)):
            over_taught = name.removeprefix(OF_SAMPLED) in OVER_TAUGHT
            logged[name] = sums[name] / (sums[f"{OF_SAMPLED}{TAUGHT}"] if over_taught else own)
        logged |= {SAMPLED: own / (own + given), "loss": jnp.sum(sums["source_loss"]) / given}
    if "assignments" in sums:
        load_LE = sums["assignments"] / jnp.maximum(jnp.sum(sums["assignments"], axis=1, keepdims=True), 1)
        logged |= {
            "aux/load_balance": sums["load_balance"],
            "aux/router_z": sums["router_z"],
            "experts/load": load_LE,
            "experts/imbalance": jnp.max(load_LE) * load_LE.shape[1],
        }
    if "dropped" in sums:
        logged["experts/dropped"] = sums["dropped"]
    return logged


def without_empty_means(values: Mapping[str, Any], source_names: Sequence[str]) -> dict[str, Any]:
    """What `metrics` tells of a step, without the means over tokens of which its batch has none."""
    amounts = {f"{{}}/{name}": float(values[f"targets/{name}"]) for name in source_names}
    amounts |= {"{}": sum(amounts.values()), f"{OF_SAMPLED}{{}}": float(values.get(SAMPLED, 0))}
    empty = set()
    for written, amount in amounts.items():
        if not amount:
            empty |= {written.format(name) for name in ("loss", "soft_weight", TAUGHT, *OVER_TAUGHT)}
        elif not values.get(written.format(TAUGHT), 1):
            empty |= {written.format(name) for name in OVER_TAUGHT}
    return {name: value for name, value in values.items() if name not in empty}
