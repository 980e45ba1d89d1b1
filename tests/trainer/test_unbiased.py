"""Draws that were written, read back and learned from by a model: their mean gradient is that of the whole distribution."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from data.target_writer import TargetWriter
from model.sampled_targets import draw_targets
from tests import oracle
from tests.oracle_cases import FAST_COMPILE, SOURCES, TINY, random_batch, random_params
from tests.trainer.saved_run import nano
from trainer.config import DistillConfig, ObjectiveConfig
from trainer.distillation import KEYS, CachedTargets, distillation_objective, recipe_of
from trainer.step import Skeleton, Teacher, loss_and_gradient
from trainer.targets import CachedSource, DrawKeys, header_of
from trainer.teach import _record

MODEL = dataclasses.replace(
    TINY, num_layers=2, moe_layer_step=2, nope_layer_step=2, dtype="float64", param_dtype="float64"
)
V = MODEL.vocab_size
SAMPLES, SLOTS = 500, 16
"""How often the targets of the batch are drawn, and room for those of a token."""
DISTILL = DistillConfig(teacher="here", temperature=1.5, soft_weight=1.0, block_vocabulary=9)
fast = functools.partial(jax.jit, compiler_options=FAST_COMPILE)


class Lesson:
    """A teacher, a student that has learned from it for some steps, and the gradients of all the student's weights."""

    def __init__(self) -> None:
        self.skeleton, self.batch = Skeleton(MODEL), random_batch(MODEL, 1)
        ids = np.pad(self.batch["segment_ids"], ((0, 0), (0, 2)))
        ends = [(ids[:, :-2] > 0) & (ids[:, :-2] != ids[:, i : ids.shape[1] - 2 + i]) for i in (1, 2)]
        self.last, self.before = ends[0], ends[1] & ~ends[0]  # places in each segment
        self.batch["loss_weights"][self.last | self.before] = 0
        teacher = Teacher(self.skeleton, oracle.as_float64(random_params(MODEL, 1)), {})
        whole = fast(functools.partial(self.gradient, DISTILL))
        self.params: Any = oracle.as_float64(random_params(MODEL, 2))
        for _ in range(30):
            step = whole(self.params, self.batch, teacher)
            self.params = jax.tree.map(lambda p, g: p - 0.1 * g, self.params, step)
        self.full = jax.device_get(whole(self.params, self.batch, teacher))
        hidden, self.head = fast(self.said)(teacher.params, self.batch)
        self.hidden = np.asarray(hidden).reshape(-1, hidden.shape[-1])

    def said(self, params: Any, batch: Any) -> Any:
        """Hidden states and head."""
        model = self.skeleton.model(params, {})
        return model(batch).hidden_BSD, model.head()

    def gradient(self, distill: DistillConfig, params: Any, batch: Any, teacher: Teacher | None = None) -> Any:
        objective = distillation_objective(ObjectiveConfig(), distill, SOURCES)
        return loss_and_gradient(self.skeleton, objective, params, {}, batch, 1, 0.0, teacher)[2]

    def samples(self, number: int) -> dict[str, np.ndarray]:
        """The batch so many times; targets of no weight make the segments of each time others, with keys of their own."""
        batches = [{name: array.copy() for name, array in self.batch.items()} for _ in range(number)]
        for i, batch in enumerate(batches):
            batch["targets"][self.before], batch["targets"][self.last] = divmod(i, V)
        return {name: np.concatenate([batch[name] for batch in batches]) for name in self.batch}

    def stored(self, folder: Path, number: int = SAMPLES, **recipe: Any) -> dict[str, np.ndarray]:
        """What a student reads of targets that were drawn and kept: the arrays of `CachedTargets`, [number, B, S, ...]."""
        distill = dataclasses.replace(DISTILL, source="cache", cache=str(folder), teacher="", **recipe)
        run = dataclasses.replace(nano(), model=MODEL, distill=distill)
        header = header_of(run, distill, "", {})
        keyed, batch = DrawKeys(header), self.samples(number)
        segments = keyed.segments(batch)
        drawn = fast(draw_targets, static_argnames=("recipe", "block"))(
            np.concatenate([self.hidden] * number),
            self.head,
            batch["targets"].reshape(-1),
            keyed(batch, segments)[KEYS].reshape(-1, 2),
            recipe=recipe_of(distill),
            block=9,
        )
        drawn = jax.tree.map(lambda array: np.asarray(array).reshape(*batch["tokens"].shape, *array.shape[1:]), drawn)
        with TargetWriter(folder, header) as writer:
            names = [segment.digest for segment in segments]
            written = writer.add(names, [_record(distill, batch, drawn, *segment[:3]) for segment in segments])
        assert all(new or stop - start < 2 for new, (_, start, stop, _) in zip(written, segments, strict=True))
        with contextlib.closing(CachedSource(run, distill, "")) as source:
            found = source(batch)
        free = ((0, 0), (0, 0), (0, SLOTS - found["soft_ids"].shape[2]))  # so that all share what is compiled
        found["soft_ids"] = np.pad(found["soft_ids"], free, constant_values=-1)
        found["soft_weights"] = np.pad(found["soft_weights"], free)
        shape = number, *self.batch["tokens"].shape
        return {name: found[name].reshape(*shape, *found[name].shape[2:]) for name in CachedTargets._fields}

    def gradients(self, targets: dict[str, np.ndarray], tail: bool = False) -> Any:
        """Of each sample."""
        return jax.device_get(self.compiled(tail)(self.params, self.batch, targets))

    @functools.cache  # noqa: B019
    def compiled(self, tail: bool) -> Any:
        distill = dataclasses.replace(DISTILL, draws=1 - tail, top_k=int(tail))

        def run(params: Any, batch: Any, targets: Any) -> Any:
            return jax.lax.map(lambda one: self.gradient(distill, params, batch | one), targets)

        return fast(run)

    def distances(self, gradients: Any, errors: Any) -> list[float]:
        """From the full gradient to the mean gradient of each weight, in standard errors."""

        def distance(gradient: np.ndarray, full: np.ndarray, error: float) -> float:
            return float(np.linalg.norm(gradient.mean(axis=0) - full) / error)

        return jax.tree.leaves(jax.tree.map(distance, gradients, self.full, errors))

    def error(self, gradients: Any) -> float:
        """Of a sample, root mean square."""
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(self.full), strict=True)
        return float(np.sqrt(sum(np.sum((g - full) ** 2) for g, full in pairs) / SAMPLES))


def spread(gradients: Any) -> Any:
    """Standard error of the mean gradient, of each weight."""
    return jax.tree.map(lambda g: np.sqrt(g.var(axis=0).sum() / len(g)), gradients)


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    with jax.enable_x64(True):
        return Lesson()


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def renormalised(targets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    total = targets["soft_weights"].sum(axis=-1, keepdims=True)
    return targets | {"soft_weights": targets["soft_weights"] / np.where(total > 0, total, 1)}


def test_the_mean_gradient_is_that_of_the_whole_distribution(lesson: Lesson, tmp_path: Path) -> None:
    """To 4 standard errors, which halve with four times the draws; other targets of as many ids are off by more."""
    few, many = (lesson.gradients(lesson.stored(tmp_path / str(draws), draws=draws)) for draws in (4, 16))
    flatter = lesson.stored(tmp_path / "flatter", draws=4, proposal=0.25)
    errors = spread(many)
    for gradients in (few, many, lesson.gradients(flatter)):
        assert max(lesson.distances(gradients, spread(gradients))) < 4
    np.testing.assert_allclose(lesson.error(few) / lesson.error(many), 2, rtol=0.06)
    top = lesson.stored(tmp_path / "top", 1, top_k=4)
    for biased in (
        lesson.gradients(renormalised(flatter)),
        lesson.gradients(top),
        lesson.gradients(renormalised(top)),
        lesson.gradients(top, tail=True),
    ):
        assert max(lesson.distances(biased, errors)) > 6
