"""A teacher runs once over the batches of a student's run, and leaves what it says in a cache."""

import time
from pathlib import Path

import jax
import numpy as np

from data.pipeline import Batch, build_dataset
from data.target_records import LARGEST
from data.target_records import Targets as Record
from data.target_writer import SHARD_BYTES, TargetWriter
from model.sampled_targets import Targets
from sharding.config import written
from sharding.errors import UserError
from trainer.asked import Asked
from trainer.config import DistillConfig, RunConfig
from trainer.fingerprint import fingerprint
from trainer.placement import place_run
from trainer.progress import prepare_bar, work_bar
from trainer.runtime import configure_jax
from trainer.signals import StopRequest
from trainer.targets import DrawKeys, header_of
from trainer.teacher import identity, load_teacher


def teach(run: RunConfig, folder: Path, part: int = 0, parts: int = 1) -> None:
    """Writes the targets of every segment of the run's batches; what the folder has already is not done again.

    Part i of n takes the batches i, i + n, ..., and of these the segments that no earlier batch of the run has; so parts
    may run at the same time, on one machine or on many, and do nothing twice.

    Raises:
        UserError: the run has no teacher or no sparse targets; see `load_teacher` and `TargetWriter`.
        SystemExit: 128 + signal, after a signal; what was done by then counts.
    """
    distill = run.distill
    if distill is None or not distill.teacher or not distill.sparse:
        found = f"teacher={distill.teacher!r}, draws={distill.draws}, top_k={distill.top_k}" if distill else "None"
        raise UserError(
            f"distill: found {found}, expected a teacher, and draws (or top_k) of 1 or more: what is kept of it. Set "
            "--config.distill.teacher=DIR and --config.distill.draws=N."
        )
    configure_jax(run, len(jax.devices()))
    mesh = place_run(run, jax.devices())
    with prepare_bar("preparing built-in data") as tell:
        dataset = build_dataset(run.data, run.media, "train", tell=tell)
    digest = dataset.tokenizer.digest
    taught = load_teacher(run, distill, mesh, None, digest)
    weights = taught.teacher.params, taught.teacher.router_bias
    known = identity(Path(distill.teacher).expanduser()) | {"fingerprint": fingerprint(weights, mesh)}
    header = header_of(run, distill, digest, known)
    keyed, asked = DrawKeys(header), Asked(run, distill, taught.teacher)
    mine = range(part, run.steps, parts)
    began = counted = time.monotonic()
    with StopRequest().listening() as stop, TargetWriter(folder, header, part, parts, SHARD_BYTES) as writer:
        print(
            f"teacher {taught.origin}, mesh {written(mesh.sizes)}: batches {mine.start} to {run.steps - 1} of {run.name}"
        )
        with work_bar("teaching", len(mine)) as advance:
            for n, repeated in enumerate(dataset.repeated(run.steps)):
                if n not in mine:
                    continue
                batch = dataset.batch(n)
                segments = keyed.segments(batch)
                left = ~(repeated | writer.done([segment.digest for segment in segments]))
                if left.any():
                    stop.nothing_to_save = False
                    targets = asked.fetch(asked(asked.put(keyed(batch, segments))))
                    _check_kept(distill, n, batch, targets)
                    chosen = [segment for segment, new in zip(segments, left, strict=True) if new]
                    records = [_record(distill, batch, targets, *segment[:3]) for segment in chosen]
                    now = time.monotonic()
                    writer.add([segment.digest for segment in chosen], records, (now - counted) * mesh.count)
                    counted = now
                seconds, done = time.monotonic() - began, writer.written
                advance(f"{done.tokens / seconds:,.0f} tokens/s, {done.bytes_per_token:.1f} bytes/token")
                if stop.requested.is_set():
                    break
        writer.finish_shard()
        whole = writer.progress()
        print(
            f"{folder}: {whole.records:,} segments, {whole.tokens:,} tokens, {whole.bytes:,} bytes, "
            f"{whole.bytes_per_token:.1f} a token; {writer.written.tokens:,} tokens of them now"
        )
        if stop.requested.is_set():
            print(f"{stop.signal_name}: the same command goes on from here.")
            raise SystemExit(stop.exit_code)


def _check_kept(distill: DistillConfig, n: int, batch: Batch, targets: Targets) -> None:
    """Refuses a batch of which the teacher says what is no number, or none that a record holds; nothing of it is kept."""
    for values, says, cure in (
        (
            np.stack([targets.target_log_prob_T, targets.entropy_T], axis=-1),
            "gives no finite distribution for",
            f"Compute in distill.teacher_dtype=float32 (found {distill.teacher_dtype}), or take another checkpoint.",
        ),
        (
            np.asarray(targets.weights_TK),
            f"gives draws of a weight above {LARGEST:,.0f}, the most that a cache holds, to",
            f"Take distill.proposal nearer to 1 (found {distill.proposal}).",
        ),
    ):
        wrong = ~(np.abs(values) <= LARGEST).all(axis=-1) & (batch["loss_weights"] > 0)
        if wrong.any():
            row, place = np.argwhere(wrong)[0]
            raise UserError(
                f"distill.teacher: {distill.teacher} {says} {wrong.sum():,} of {wrong.size:,} tokens of batch {n}, first in "
                f"row {row} at {place}. Nothing of this batch was kept. {cure}"
            )


def _record(distill: DistillConfig, batch: Batch, targets: Targets, row: int, start: int, stop: int) -> Record:
    """The targets of a segment; a token whose target has no weight has none."""
    here = row, slice(start, stop)
    learned = (batch["loss_weights"][here] > 0)[:, None]
    weighted = distill.top_k > 0 or distill.proposal != 1
    facts = (np.where(learned[:, 0], np.asarray(array)[here], 0) for array in targets[3:])
    return Record.of(
        np.asarray(targets.ids_TK)[here],
        np.asarray(targets.counts_TK)[here] * learned,
        np.asarray(targets.weights_TK)[here] if weighted else None,
        *facts,
    )
