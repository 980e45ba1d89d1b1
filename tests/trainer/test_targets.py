"""What a teacher said of pictures and sound, kept and found again: in other batches than it read, and the very same."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import trainer.asked
import trainer.teach
from data.pipeline import Dataset, build_dataset
from model.config import AudioConfig
from tests import oracle
from tests.oracle_cases import COEFFICIENTS, FAST_COMPILE, random_params
from tests.trainer.saved_run import micro, save_run
from trainer.config import DistillConfig, RunConfig
from trainer.distillation import KEYS, distillation_objective
from trainer.hf.exporter import export_checkpoint
from trainer.objective import extras_for, metrics
from trainer.step import Skeleton
from trainer.targets import CachedSource, DrawKeys

AUDIO = AudioConfig(mel_bins=8, window_frames=48, hidden_size=8, num_layers=1, num_heads=2, ffn_size=16)


class Asked(trainer.asked.Asked):
    """Keeps what was asked and answered."""

    answers: list[Any]

    def put(self, share: Any) -> Any:
        self.share = share
        return super().put(share)

    def fetch(self, answer: Any) -> Any:
        found = super().fetch(answer)
        self.answers.append((self.share, found))
        return found


class Taught:
    """A run whose teacher has left targets in a cache, and what it said while it did."""

    def __init__(self, run: RunConfig, folder: Path, patch: pytest.MonkeyPatch, **distill: Any):
        patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))
        Asked.answers = answers = []
        patch.setattr(trainer.teach, "Asked", Asked)
        self.cache = folder / "cache"
        self.distill = DistillConfig(source="cache", cache=str(self.cache), **distill)
        self.run = dataclasses.replace(run, distill=self.distill)
        trainer.teach.teach(self.run, self.cache)
        self.digest = build_dataset(run.data, run.media, "train").tokenizer.digest
        with contextlib.closing(self.source()) as source:
            self.keyed = DrawKeys(source.header)
        self.said = {
            segment.digest: (batch[KEYS][here], *(array[here] for array in targets))
            for batch, targets in reversed(answers)  # of what was said twice the first is kept
            for segment in reversed(self.keyed.segments(batch))
            for here in [(segment.row, slice(segment.start, segment.stop))]
        }

    def source(self) -> CachedSource:
        return CachedSource(self.run, self.distill, self.digest)

    def dataset(self, **layout: Any) -> Dataset:
        return build_dataset(dataclasses.replace(self.run.data, **layout), self.run.media, "train")

    def compare(self, batch: Any) -> int:
        """Holds what a student reads for a batch against what the teacher said; the number of segments."""
        with contextlib.closing(self.source()) as source:
            found = source(batch)
        keys, segments = self.keyed(batch)[KEYS], self.keyed.segments(batch)
        for row, start, stop, digest in segments:
            here = row, slice(start, stop)
            own, ids, weights, _, *facts = self.said[digest]
            np.testing.assert_array_equal(keys[here], own)
            learned = batch["loss_weights"][here] > 0
            np.testing.assert_array_equal(found["soft_ids"][here], np.where(learned[:, None], ids, -1))
            np.testing.assert_allclose(found["soft_weights"][here][learned], weights[learned], rtol=2**-11, atol=3e-8)
            for name, fact in zip(("soft_log_prob", "soft_entropy", "soft_correct"), facts, strict=True):
                np.testing.assert_allclose(found[name][here][learned], fact[learned], rtol=2**-11, atol=3e-8)
        assert (found["soft_ids"][batch["loss_weights"] == 0] == -1).all()
        return len(segments)

    def off(self, documents: int = 2) -> float:
        """How far the kept log-probabilities of some documents are from those of the oracle, on average."""
        batch, params = self.dataset().batch(0), oracle.as_float64(random_params(self.run.model, 0))
        with contextlib.closing(self.source()) as source:
            found = source(batch)
        wrong = []
        for row, where, document in list(oracle.documents(batch))[:documents]:
            logits = oracle.forward(params, document, self.run.model).logits
            logits = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
            learned = np.flatnonzero(batch["loss_weights"][row, where] > 0)
            exact = logits[learned, batch["targets"][row, where][learned]]
            wrong += np.abs(found["soft_log_prob"][row, where][learned] - exact).tolist()
        assert len(wrong) > 100
        return float(np.mean(wrong))


def run_of(mixture: dict[str, float], **model: Any) -> RunConfig:
    """A run that sees each of a few pictures, and sounds."""
    run, sizes = (
        micro(**model),
        {"scenes": 12, "tones": 8, "batch_size": 8, "sequence_length": 448, "windows_per_row": 24},
    )
    data = dataclasses.replace(run.data, mixture=mixture, **sizes)
    return dataclasses.replace(run, steps=8, data=data, optimizer=dataclasses.replace(run.optimizer, warmup_steps=0))


@pytest.fixture(scope="module")
def seen_and_heard(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """The likeliest ids of a teacher that reads pictures and sound, in float32."""
    folder = tmp_path_factory.mktemp("seen")
    run = run_of({"scenes": 0.7, "tones": 0.3}, audio=AUDIO)
    save_run(folder / "teacher", run)
    with pytest.MonkeyPatch.context() as patch:
        given = {"teacher": str(folder / "teacher"), "teacher_dtype": "float32", "top_k": 5}
        return Taught(run, folder, patch, **given)


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"batch_size": 4},
    {"window": 5},
    {"tiles_per_row": 7, "windows_per_row": 30},
    {"sequence_length": 512},
]


def test_other_batches_find_what_the_teacher_said(seen_and_heard: Taught) -> None:
    for layout in LAYOUTS:
        dataset = seen_and_heard.dataset(**layout)
        assert sum(seen_and_heard.compare(dataset.batch(n)) for n in range(2)) > 10
    dataset = seen_and_heard.dataset()
    batch, shares = dataset.batch(1), ((0, 3, 5, 6), (7, 1, 4, 2))
    assert (batch["image_positions"] >= 0).any() and (batch["audio_positions"] >= 0).any()
    with contextlib.closing(seen_and_heard.source()) as source:
        whole = source(batch)
        for rows in shares:  # of two processes
            for name, array in source(dataset.batch(1, rows)).items():
                np.testing.assert_array_equal(array, whole[name][list(rows)], err_msg=name)


def test_what_is_kept_is_what_the_model_says(seen_and_heard: Taught) -> None:
    assert seen_and_heard.off() < 2e-3


def test_sources_have_metrics_of_their_own(seen_and_heard: Taught) -> None:
    taught, dataset = seen_and_heard, seen_and_heard.dataset()
    with contextlib.closing(taught.source()) as source:
        batch = source(dataset.batch(0))
    skeleton = Skeleton(taught.run.model)
    objective = distillation_objective(COEFFICIENTS, taught.distill, len(dataset.source_names))

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params: Any, batch: Any) -> Any:
        return objective(skeleton.model(params, {}), batch, extras_for(batch, 1))[1]

    found = metrics(run(random_params(taught.run.model, 1), batch), dataset.source_names)
    assert dataset.source_names == ("scenes", "tones")
    for i, name in enumerate(dataset.source_names, start=1):
        weights = np.where(batch["source_ids"] == i, batch["loss_weights"], 0)
        assert found[f"teacher_loss/{name}"] == pytest.approx(
            np.average(-batch["soft_log_prob"], weights=weights), 1e-4
        )
        assert found[f"taught/{name}"] == 1 and np.isfinite(found[f"soft/{name}"])
    targets = [float(found[f"targets/{name}"]) for name in dataset.source_names]
    soft = [float(found[f"soft/{name}"]) for name in dataset.source_names]
    assert float(found["soft"]) == pytest.approx(np.average(soft, weights=targets), 1e-4)


def test_a_hugging_face_teacher_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures, and draws with importance weights at another temperature."""
    run = dataclasses.replace(run_of({"scenes": 1.0}), steps=1)
    save_run(tmp_path / "run", run)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", None, 10**9, lambda _: None)
    given: Any = {"teacher": str(tmp_path / "hf"), "draws": 6, "proposal": 0.5, "temperature": 2.0}
    taught = Taught(run, tmp_path, monkeypatch, **given)
    assert taught.distill.teacher_dtype == "bfloat16"
    batch = taught.dataset().batch(0)
    assert (batch["image_positions"] >= 0).any() and taught.compare(batch) > 5
    assert 2e-3 < taught.off() < 0.2
