"""Learning from a teacher: the objective of a student, and how much its teacher counts.

Letters: B rows, S sequence, T tokens, D width, K ids of a sparse target.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.distillation import Distilled, distillation_losses
from model.sampled_targets import Recipe, Targets, draw_targets, sparse_losses
from model.transformer import Batch, Transformer
from trainer.config import DistillConfig, ObjectiveConfig, RunConfig
from trainer.objective import SAMPLED, TAUGHT, Extras, Objective, TokenLosses, next_token_objective, token_objective

KEYS = "soft_keys"
"""Of a batch: the random key of each token's draws, uint32 [B, S, 2]."""


class CachedTargets(NamedTuple):
    """Sparse targets of the tokens of a batch, as arrays of it: from a cache, or of a teacher on devices of its own."""

    soft_ids: jax.Array
    """int32 [B, S, K], -1 where there is none."""
    soft_weights: jax.Array
    """float32 [B, S, K]."""
    soft_log_prob: jax.Array
    """float32 [B, S], the teacher's of the hard target."""
    soft_entropy: jax.Array
    """float32 [B, S]."""
    soft_correct: jax.Array
    """bool [B, S]."""


def recipe_of(distill: DistillConfig) -> Recipe:
    """How sparse targets are made."""
    return Recipe(distill.draws, distill.temperature, distill.proposal, distill.top_k)


def objective_of(run: RunConfig, num_sources: int) -> Objective:
    """What a run minimises."""
    if run.distill:
        return distillation_objective(run.objective, run.distill, num_sources)
    return next_token_objective(run.objective, num_sources)


def distillation_objective(config: ObjectiveConfig, distill: DistillConfig, num_sources: int) -> Objective:
    """(1 - w) x next-token loss + w x divergence from the teacher, in the weighted mean over the step's tokens, plus the
    router terms.

    The teacher is `Extras.teacher`, which reads the same batch; with draws the batch has the keys of these (`KEYS`). Or the
    batch has what a teacher said elsewhere (`CachedTargets`); tokens without such a target learn the next token alone. Targets
    that the student wrote (`SAMPLED`) have w = 1.

    Logged beside the next-token loss: `soft`, the divergence (with a sparse target an estimate, and at another temperature
    than 1 the cross-entropy, for want of the entropy there); `teacher_loss`, the teacher's next-token loss; `teacher_entropy`
    in nats; `teacher_correct`, how often its likeliest token is the target: all these are means over the tokens that have a
    target of the teacher's. `taught` is the share of the tokens that have one, and `soft_weight` the mean w over all of them.
    """

    def losses(model: Transformer, hidden_TD: jax.Array, batch: Batch, extras: Extras) -> TokenLosses:
        found, taught_T = _found(distill, model, hidden_TD, batch, extras)
        weight_T = soft_weight(distill, extras.progress) * adapted(distill, found, model.config.vocab_size) * taught_T
        hard_T = found.cross_entropy_T
        if SAMPLED in batch:  # the next token is no lesson where the student made it up
            weight_T = jnp.where(batch[SAMPLED].reshape(-1), 1, weight_T)
        return TokenLosses(
            hard_T + weight_T * (found.divergence_T - hard_T),
            hard_T,
            {
                "soft": found.divergence_T * taught_T,
                "soft_weight": weight_T,
                TAUGHT: taught_T,
                "teacher_loss": -found.target_log_prob_T * taught_T,
                "teacher_entropy": found.entropy_T * taught_T,
                "teacher_correct": found.correct_T * taught_T,
            },
        )

    return token_objective(config, num_sources, losses)


def _found(
    distill: DistillConfig, model: Transformer, hidden_TD: jax.Array, batch: Batch, extras: Extras
) -> tuple[Distilled, jax.Array]:
    """Losses, and 1 for the tokens that the teacher speaks of."""
    targets_T = batch["targets"].reshape(-1)
    if "soft_ids" in batch:
        cached = (batch[name].reshape(targets_T.size, *batch[name].shape[2:]) for name in CachedTargets._fields)
        ids_TK, weights_TK, *facts = cached
    else:
        teacher = extras.teacher
        assert teacher is not None
        if not distill.sparse:
            seen_BSE = jax.lax.stop_gradient(teacher(batch).hidden_BSD)
            found = distillation_losses(
                hidden_TD,
                model.head(),
                seen_BSE.reshape(-1, seen_BSE.shape[-1]),
                teacher.head(),
                targets_T,
                kind=distill.divergence,
                temperature=distill.temperature,
                block=distill.block_vocabulary,
                place=model.place,
            )
            return found, jnp.ones_like(found.cross_entropy_T)
        ids_TK, weights_TK, _, *facts = sparse_targets(distill, teacher, batch)
    hard_T, soft_T = sparse_losses(
        hidden_TD,
        model.head(),
        targets_T,
        ids_TK,
        weights_TK,
        temperature=distill.temperature,
        tail=distill.top_k > 0,
        block=distill.block_vocabulary,
        place=model.place,
    )
    log_prob_T, entropy_T, correct_T = facts
    if distill.temperature == 1:
        soft_T = soft_T - entropy_T
    return Distilled(hard_T, soft_T, log_prob_T, entropy_T, correct_T), (ids_TK[:, 0] >= 0).astype(hard_T.dtype)


def sparse_targets(distill: DistillConfig, teacher: Transformer, batch: Batch) -> Targets:
    """What the teacher says of the tokens [T] of a batch with the keys of their draws."""
    hidden_BSE = teacher(batch).hidden_BSD
    return draw_targets(
        hidden_BSE.reshape(-1, hidden_BSE.shape[-1]),
        teacher.head(),
        batch["targets"].reshape(-1),
        batch[KEYS].reshape(-1, 2),
        recipe_of(distill),
        block=distill.block_vocabulary,
        place=teacher.place,
    )


def soft_weight(config: DistillConfig, progress: jax.Array | float) -> jax.Array:
    """Weight of the divergence at a share of the run's steps, before what a token makes of it."""
    start, end = config.soft_weight, config.final_soft_weight
    if end is None:
        return jnp.asarray(start)
    done = (1 - jnp.cos(jnp.pi * progress)) / 2 if config.soft_schedule == "cosine" else progress
    return jnp.asarray(start + (end - start) * done)


def adapted(config: DistillConfig, found: Distilled, vocabulary: int) -> jax.Array:
    """What each token's weight is multiplied by, [T], 0 to 1; nothing is learned through it."""
    match config.adapt:
        case "confidence":
            factor_T = 1 - found.entropy_T / jnp.log(vocabulary)
        case "correct":
            factor_T = found.correct_T.astype(found.cross_entropy_T.dtype)
        case "gap":
            factor_T = jax.nn.sigmoid(found.target_log_prob_T + found.cross_entropy_T)
        case _:
            factor_T = jnp.ones_like(found.cross_entropy_T)
    return jax.lax.stop_gradient(factor_T)
