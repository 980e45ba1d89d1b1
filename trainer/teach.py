"""A teacher runs once over the batches of a student's run, and leaves what it says in a cache."""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from data.pipeline import Batch, Dataset, build_dataset
from data.target_cache import Header
from data.target_index import Progress
from data.target_records import LARGEST
from data.target_records import Targets as Record
from data.target_writer import SHARD_BYTES, TargetWriter
from model.sampled_targets import Targets
from sharding.config import written
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from trainer.asked import Asked
from trainer.config import DistillConfig, RunConfig
from trainer.fingerprint import fingerprint
from trainer.placement import place_run
from trainer.processes import anyone_says, check_same, is_leader, sum_of_all, wait_for_all
from trainer.progress import prepare_bar, work_bar
from trainer.runtime import configure_jax
from trainer.sections import to_plain
from trainer.signals import TERMINATED, StopRequest
from trainer.step import Teacher
from trainer.targets import DrawKeys, header_of
from trainer.teacher import as_of_now, identity, load_teacher


def teach(
    run: RunConfig, folder: Path, part: int = 0, parts: int = 1, *, reached: Callable[[int], None] = lambda batch: None
) -> None:
    """Writes the targets of every segment of the run's batches; what the folder has already is not done again.

    Part i of n takes the batches i, i + n, ..., and of these the segments that no earlier batch of the run has; so parts
    may run at the same time, on one machine or on many, and do nothing twice. The processes of a part, which have the
    teacher together, write the segments of their own rows each.

    `reached` is called with the number of every batch once it is read, from 1, and again when what the teacher said of it is
    written.

    Raises:
        UserError: the run has no teacher or no sparse targets; rows are shared by processes; see `load_teacher` and
            `TargetWriter`.
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
    rows = _own_rows(run, mesh)
    with prepare_bar("preparing built-in data") as tell:
        dataset = build_dataset(run.data, run.media, "train", tell=tell)
    digest = dataset.tokenizer.digest
    check_same(
        "config, data or --part (parts are commands of their own, which know nothing of each other)",
        f"{to_plain(run)} {dataset.digest} {dataset.digests} {part}/{parts}",
    )
    distill = as_of_now(distill)
    taught = load_teacher(run, distill, mesh, None, digest)
    weights = taught.teacher.params, taught.teacher.router_bias
    known = identity(Path(distill.teacher).expanduser()) | {"fingerprint": fingerprint(weights, mesh)}
    header = header_of(run, distill, digest, known)
    check_same("teacher", str(header))
    teaching = _Teaching(run, distill, taught.teacher, header, mesh, reached)
    mine, leader = range(part, run.steps, parts), is_leader()
    process, processes, stopping = jax.process_index(), jax.process_count(), False
    with (
        StopRequest(quiet=not leader).listening() as stop,
        TargetWriter(folder, header, part * processes + process, parts * processes, SHARD_BYTES) as writer,
    ):
        if leader:
            print(
                f"teacher {taught.origin}, mesh {written(mesh.sizes)}: batches {mine.start} to {run.steps - 1} of {run.name}"
            )
        with work_bar("teaching", len(mine), quiet=not leader) as advance:
            for n, repeated in enumerate(dataset.repeated(run.steps)):
                if n not in mine:
                    continue
                if not all(of_row.all() for of_row in repeated):
                    stop.nothing_to_save = False
                    teaching.ask(n, dataset, rows, np.concatenate([repeated[row] for row in rows]), writer)
                done = writer.written
                speed = processes * done.tokens / max(teaching.seconds, 1e-9)
                advance(f"{speed:,.0f} tokens/s, {done.bytes_per_token:.1f} bytes/token")
                if stopping := anyone_says(stop.requested.is_set()):
                    break
        writer.finish_shard()
        now = Progress(*sum_of_all(writer.written))
        whole = Progress(*(found + new for found, new in zip(writer.found, now, strict=True)))
        if leader:
            print(
                f"{folder}: {whole.records:,} segments, {whole.tokens:,} tokens, {whole.bytes:,} bytes, "
                f"{whole.bytes_per_token:.1f} a token; {now.tokens:,} tokens of them now"
            )
        if stopping:
            if leader:
                print(f"{stop.signal_name or 'another process was told to stop'}: the same command goes on from here.")
            raise SystemExit(stop.exit_code or TERMINATED)


def _own_rows(run: RunConfig, mesh: DeviceMesh) -> np.ndarray:
    """The rows of a batch that this process asks about.

    Raises:
        UserError: others have them as well.
    """
    rows, processes = np.sort(mesh.share(run.data.batch_size, run.optimizer.accumulate)), jax.process_count()
    if len(rows) * processes > run.data.batch_size:
        raise UserError(
            f"mesh: found {written(mesh.sizes)} on {processes} processes, several of which have a part of one row; expected "
            "rows of its own for each. Let tensor and context be at most the devices of a process, and give the rest to "
            "expert or fsdp."
        )
    return rows


class _Teaching:
    """The teacher, and how long it took."""

    def __init__(
        self,
        run: RunConfig,
        distill: DistillConfig,
        teacher: Teacher,
        header: Header,
        mesh: DeviceMesh,
        reached: Callable[[int], None],
    ):
        self.seconds = 0.0
        self._distill, self._devices, self._reached = distill, mesh.count, reached
        self._keyed, self._asked, self._compiled = DrawKeys(header), Asked(run, distill, teacher), False

    def ask(self, n: int, dataset: Dataset, rows: np.ndarray, repeated: np.ndarray, writer: TargetWriter) -> None:
        """Writes what it says of these rows of batch n, but for segments that are `repeated` or that the folder has."""
        began = time.monotonic()
        try:
            batch = dataset.batch(n, rows.tolist())
            segments = self._keyed.segments(batch)
            left = ~(repeated | writer.done([segment.digest for segment in segments]))
            self._reached(n + 1)  # those who still read it are behind
            (asking,) = sum_of_all([int(left.any())])
            if not asking:
                return
            placed = self._asked.put(self._keyed(batch, segments))
            if not self._compiled:
                self._asked.compile(placed)
                wait_for_all("compiled")
                self._compiled = True
            targets = self._asked.fetch(self._asked(placed))
            _check_kept(self._distill, n, rows, batch, targets)
        except UserError:
            writer.finish_shard()  # what it said of the batches before stays
            raise
        chosen = [segment for segment, new in zip(segments, left, strict=True) if new]
        records = [_record(self._distill, batch, targets, *segment[:3]) for segment in chosen]
        seconds = time.monotonic() - began
        writer.add([segment.digest for segment in chosen], records, seconds * self._devices / asking)
        self._reached(n + 1)
        self.seconds += seconds


def _check_kept(distill: DistillConfig, n: int, rows: np.ndarray, batch: Batch, targets: Targets) -> None:
    """Refuses these rows of batch n if the teacher says of them what is no number, or none that a record holds."""
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
                f"distill.teacher: {distill.teacher} {says} {wrong.sum():,} of {wrong.size:,} tokens of "
                f"{len(rows)} rows of batch {n}, first in row {rows[row]} at {place}. Nothing was kept of these rows. {cure}"
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
