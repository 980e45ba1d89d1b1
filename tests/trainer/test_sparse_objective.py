"""What a student minimises with sparse targets, against the formula on every logit at once."""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.place import Place
from tests.oracle_cases import FAST_COMPILE
from trainer.config import DistillConfig, ObjectiveConfig
from trainer.distillation import distillation_objective
from trainer.objective import extras_for

B, S, D, V, K = 2, 9, 5, 23, 4
SHARE = {"soft_weight": 0.6, "final_soft_weight": 0.2}
"""0.5 after a quarter of the run."""


class Student(SimpleNamespace):
    """A model without layers: its last hidden states and its head are what is learned."""

    place, config = Place(), SimpleNamespace(vocab_size=V)

    def __call__(self, batch: Any) -> Any:
        return SimpleNamespace(hidden_BSD=self.hidden, router=None)

    def head(self) -> Any:
        return self.weights


def said(top_k: bool) -> dict[str, Any]:
    """A batch with what a teacher said of it: of its first token nothing, of the others one id or more; padding at the end."""
    rng = np.random.default_rng(3)
    ids, weights = np.full((B, S, K), -1), rng.random((B, S, K))  # a weight without an id counts for nothing
    for row, place in itertools.product(range(B), range(S)):
        used = K if top_k else int(rng.integers(1, K + 1))
        ids[row, place, :used] = np.sort(rng.choice(V, used, replace=False))
        weights[row, place, :used] /= weights[row, place].sum() / (0.8 if top_k else 1.1)
    ids[0, 0] = -1
    loss_weights = rng.choice([0.25, 0.5, 1, 2], (B, S))
    loss_weights[:, -1] = 0
    return {
        "targets": rng.integers(0, V, (B, S)),
        "loss_weights": loss_weights,
        "segment_ids": (loss_weights > 0).astype(int),
        "source_ids": (loss_weights > 0).astype(int),
        "soft_ids": ids,
        "soft_weights": weights,
        "soft_log_prob": -rng.exponential(2, (B, S)),
        "soft_entropy": rng.exponential(1, (B, S)),
        "soft_correct": rng.random((B, S)) < 0.5,
    }


def formula(distill: DistillConfig, batch: dict[str, Any], hidden: Any, head: Any) -> Any:
    """(what is minimised, next-token loss)"""
    log_q, warm = (jax.nn.log_softmax(hidden @ head / t) for t in (1, distill.temperature))
    hard = -jnp.take_along_axis(log_q, batch["targets"][..., None], 2)[..., 0]
    whole: Any = np.zeros((B, S, V))
    for at in itertools.product(range(B), range(S), range(K)):
        if batch["soft_ids"][at] >= 0:
            whole[*at[:2], batch["soft_ids"][at]] = batch["soft_weights"][at]
    soft = -jnp.sum(whole * warm, 2)
    if distill.top_k:
        soft -= (1 - whole.sum(2)) * jnp.log(jnp.sum(jnp.where(whole > 0, 0, jnp.exp(warm)), 2))
    soft *= distill.temperature**2
    if distill.temperature == 1:
        soft -= batch["soft_entropy"]
    p, q = np.exp(batch["soft_log_prob"]), jnp.exp(-hard)
    factor = {
        "none": 1.0,
        "confidence": 1 - batch["soft_entropy"] / np.log(V),
        "correct": batch["soft_correct"] * 1.0,
        "gap": jax.lax.stop_gradient(p / (p + q)),
    }[distill.adapt]
    w = 0.5 * factor * whole.any(2)
    return tuple(jnp.average(loss, weights=batch["loss_weights"]) for loss in ((1 - w) * hard + w * soft, hard))


@pytest.mark.parametrize(("recipe", "adapt", "temperature"), [
    ("draws", "none", 1.7),
    ("draws", "confidence", 1.0),
    ("draws", "gap", 1.7),
    ("top_k", "correct", 1.7),
    ("top_k", "gap", 1.0),
])  # fmt: skip
def test_loss_and_gradient_are_those_of_the_formula(recipe: str, adapt: Any, temperature: float) -> None:
    given: Any = SHARE | {recipe: K}
    distill = DistillConfig(teacher="t", adapt=adapt, temperature=temperature, block_vocabulary=7, **given)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        batch = said(bool(distill.top_k))
        hidden, head = rng.normal(size=(B, S, D)), rng.normal(size=(D, V))
        objective = distillation_objective(ObjectiveConfig(), distill, 1)

        def shipped(hidden: Any, head: Any) -> Any:
            student: Any = Student(hidden=hidden, weights=head)
            loss, sums = objective(student, batch, extras_for(batch, 1, 0.25))
            return loss, sums["loss"]

        found, expected = (
            jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True), compiler_options=FAST_COMPILE)(hidden, head)
            for run in (shipped, functools.partial(formula, distill, batch))
        )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-13)
