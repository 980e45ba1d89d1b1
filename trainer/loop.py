"""A training run, top to bottom: directory, data, weights, compilation, loop, scores, report."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.filesize import decimal

from data.mixture import continued
from data.pipeline import Batch, Dataset, build_dataset
from data.questions import SOURCES
from sharding.config import written
from sharding.devices import peak_flops
from sharding.errors import UserError
from trainer.asked import Asked, AskedAhead
from trainer.checkpoint import Checkpoints
from trainer.config import RunConfig
from trainer.console import Console
from trainer.decode import Decoder
from trainer.distillation import objective_of
from trainer.evaluate import HeldOut, question_scores
from trainer.feeder import Fed, Feeder
from trainer.flops import flops_per_token, parameter_counts
from trainer.initialise import abstract_state, initialise
from trainer.memory import check_memory, device_bytes, tree_bytes
from trainer.metrics import Logger, MetricsLogger, NoLogger
from trainer.objective import SAMPLED, metrics, next_token_objective, without_empty_means
from trainer.placement import memory_line, place_student_and_teacher
from trainer.processes import anyone_says, check_same, is_leader, leader_says, wait_for_all
from trainer.progress import prepare_bar
from trainer.report import write_report
from trainer.report_text import duration, without_targets
from trainer.rollout import Rollout
from trainer.rundir import RunDirectory, read_json, write_json
from trainer.runtime import configure_jax
from trainer.sections import to_plain
from trainer.signals import TERMINATED, StopRequest
from trainer.step import Skeleton, Teacher, TrainState, make_eval_step, make_train_step
from trainer.targets import (
    OUTCOME,
    OUTCOMES,
    CachedSource,
    DrawKeys,
    abstract_batch,
    header_of,
    outcomes,
    teacher_digest,
)
from trainer.teacher import as_of_now, check_same_teacher, load_teacher

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "tokenizers")


def train(
    run: RunConfig,
    workdir: Path,
    *,
    allow_config_change: bool = False,
    reached: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains `run` in `workdir`, from its latest checkpoint if there is one, to the end or to a signal.

    `reached` is called with the number of every step that begins, and again within it when a held-out batch is read and
    when a save begins.

    Raises `UserError` for whatever the user can cure; `SystemExit` with 128 + signal after a signal.
    """
    started, leader = time.perf_counter(), is_leader()
    configure_jax(run, len(jax.devices()))
    directory = RunDirectory(workdir)
    with contextlib.ExitStack() as stack:
        # Before the lock tells that the run is here: a shell starts what is in its background with Ctrl-C ignored.
        stop = stack.enter_context(StopRequest(quiet=not leader).listening())
        if leader:
            directory.create()
            stack.enter_context(directory.locked())
            directory.check_config(run, allow_config_change)
        if finished(run, directory):
            return
        with Run(run, directory, stop, started, other_teacher=allow_config_change) as job:
            job.loop(reached)
            job.finish()


def finished(run: RunConfig, directory: RunDirectory) -> bool:
    """Whether there is nothing left to do; if so, shows the scores again. All processes have to ask."""
    if not leader_says(directory.evaluation.exists() and directory.report.exists() and directory.facts.exists()):
        return False
    evaluation = read_json(directory.evaluation, "held-out scores")
    # Only these weights and this config: a folder whose checkpoints were deleted starts afresh.
    done = Checkpoints(directory.checkpoints).latest() if directory.checkpoints.is_dir() else None
    if not evaluation["step"] == done == run.steps or directory.differences(run):
        return False
    if is_leader():
        console = Console(run, directory.root, read_json(directory.facts, "facts of the run"))
        console.scores(evaluation)
        console.message(f"{directory.root} has all its {run.steps} steps. report: {directory.report}")
    return True


@dataclasses.dataclass
class Pending:
    """A step that was handed to the device and may still run."""

    step: int
    metrics: dict[str, jax.Array]
    fed: Fed
    """Its batch, without the arrays."""


class Run:
    """What the phases of a run share. Entering it opens files, processes and threads; leaving it closes them."""

    def __init__(
        self, run: RunConfig, directory: RunDirectory, stop: StopRequest, started: float, *, other_teacher: bool = False
    ):
        """`other_teacher`: go on although the steps before were learned from another teacher."""
        self.run, self.directory, self.stop, self.started = run, directory, stop, started
        self.other_teacher = other_teacher
        self.saving: int | None = None
        self.cached: CachedSource | None = None
        self.rollout: Rollout | None = None
        self.leader, self.stopping = is_leader(), False

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    def _open(self, stack: contextlib.ExitStack) -> None:
        run = self.run
        self.mesh, self.teacher_mesh = mesh, teacher_mesh = place_student_and_teacher(run, jax.devices())
        self.skeleton = skeleton = Skeleton(run.model, mesh)
        state_shapes = abstract_state(run, skeleton)
        check_memory(state_shapes, mesh)
        device = mesh.devices[0]
        self.peak = peak_flops(device, run.model.dtype)  # now, while nothing else uses the processor
        self.checkpoints = Checkpoints(self.directory.checkpoints, run.checkpoint)
        stack.callback(self.checkpoints.close)
        start = self.checkpoints.latest() or 0
        saved = self.checkpoints.metadata(start) if start else {}
        self.looked_up = {name: saved.get("looked_up", {}).get(name, 0) for name in OUTCOMES}
        self.journal = continued(saved.get("journal", ()), run.data, start)
        self.dataset = self._dataset(saved.get("data_position"))
        # Opened before the compilation, so that the first batches are made meanwhile.
        rows = run.data.batch_size
        self.share = mesh.share(rows, run.optimizer.accumulate)
        batches = stack.enter_context(self.dataset.batches(start, run.steps, self.share.tolist()))
        self.lessons = self._lessons(stack)
        self.apart = teacher_mesh is not mesh

        def put(share: Batch) -> Any:
            lessons = self.lessons(share)
            if self.apart:
                return mesh.put(share, rows), teacher_mesh.put(lessons, rows)
            return mesh.put(lessons, rows)

        feeder = Feeder(batches, put)
        stack.callback(feeder.close)

        self.state, origin = initialise(
            run, skeleton, self.checkpoints, self._data_facts(), self.dataset.tokenizer.digest
        )
        self.start = start
        teacher_notes = self._load_teacher(state_shapes, saved.get("teacher"))
        taught_by = self.teacher_digest, self.cached and self.cached.header.digest.hex()
        check_same(
            "config, data, tokenizer, teacher or cache of targets",
            f"{to_plain(run)} {self._data_facts()} {start} {taught_by}",
        )
        if self.leader:  # not before: nothing is changed by a start that is refused
            self.directory.save(run, self.dataset.tokenizer)
        self._flags = {
            asked: jax.make_array_from_process_local_data(mesh.each, np.full(len(mesh.local), asked, np.int32))
            for asked in (False, True)
        }
        held_out = build_dataset(run.data, run.media, "heldout", journal=self.journal)
        self.notes = list(dict.fromkeys(self.dataset.notes + held_out.notes))
        self.flops = flops_per_token(run.model, run.data.sequence_length)
        self.teacher_flops = self.taught and flops_per_token(self.taught.model, run.data.sequence_length)
        self.facts = self._facts(origin)
        shown = None if self.leader else stack.enter_context(Path(os.devnull).open("w"))  # noqa: SIM115
        self.console = Console(run, self.directory.root, self.facts, file=shown)
        # Before the compilation: a run may end there, or in its first step, for want of memory.
        self.console.banner()
        for note in self.notes + teacher_notes:
            self.console.message(note)
        sources = len(self.dataset.source_names)
        compile_start = time.perf_counter()
        # What is held out is scored alike with a teacher and without.
        self.step_fn, eval_fn = self._compiled(
            make_train_step(run, skeleton, objective_of(run, sources)),
            make_eval_step(skeleton, next_token_objective(run.objective, sources)),
        )
        self.facts["compile_s"] = time.perf_counter() - compile_start
        wait_for_all("compiled")
        self.feeder = feeder
        if self.asked:
            self.feeder = AskedAhead(feeder, self.asked, lambda share: mesh.put(share, rows), run.steps - start)
        self.held_out = HeldOut(held_out, eval_fn, self.share.tolist(), self._put_held_out)
        stack.enter_context(self.console)
        self.logger: Logger = NoLogger()
        if self.leader:
            self.logger = MetricsLogger(self.directory.metrics, start, observers=[self.console.record])
            stack.enter_context(self.logger)

    def _dataset(self, position: dict[str, Any] | None) -> Dataset:
        """What is trained on, from a saved position on."""
        run = self.run
        with prepare_bar("preparing built-in data") as tell:
            dataset = build_dataset(run.data, run.media, "train", journal=self.journal, position=position, tell=tell)
        if dataset.tokenizer.size > run.model.vocab_size:
            raise UserError(
                f"model.vocab_size: found {run.model.vocab_size}, expected at least {dataset.tokenizer.size}, as "
                f"many ids as {dataset.tokenizer.source} has. Raise it, or choose a smaller tokenizer "
                "(data.tokenizer, data.tokenizer_size)."
            )
        return dataset

    def _put_held_out(self, share: Batch) -> dict[str, jax.Array]:
        self.reached(self.step)  # those who still read it are behind
        return self.mesh.put(share, self.run.data.batch_size)

    def _load_teacher(self, state: TrainState, before: str | None) -> list[str]:
        """The teacher that computes in this run, and what asks it or writes for it; returns what to tell about it.

        Args:
            state: shapes of the student's.
            before: digest of the teacher that the checkpoint learned from.
        """
        run, distill, tokenizer = self.run, self.run.distill, self.dataset.tokenizer
        self.taught = self.asked = self.teacher_digest = None
        if not distill:
            return []
        if distill.source != "cache":
            distill = as_of_now(distill)
        self.teacher_digest = teacher_digest(distill, self.cached)
        checkpoint = self.checkpoints.directory / str(self.start)
        notes = check_same_teacher(distill, checkpoint, before, self.teacher_digest, self.other_teacher)
        if distill.source != "cache":
            self.taught = load_teacher(run, distill, self.teacher_mesh, state, tokenizer.digest)
            if self.apart:
                self.asked = Asked(run, distill, self.taught.teacher)
            if distill.on_policy:
                self.rollout = Rollout(run, distill, self.mesh, tokenizer.special.values())
        return notes

    def _lessons(self, stack: contextlib.ExitStack) -> Callable[[Batch], Batch]:
        """What gives batches the targets of a teacher, or what it needs for them."""
        run, distill, tokenizer = self.run, self.run.distill, self.dataset.tokenizer
        if distill and distill.source == "cache":
            self.cached = CachedSource(run, distill, tokenizer.digest)
            stack.callback(self.cached.close)
            return self.cached
        if distill and distill.sparse:
            return DrawKeys(header_of(run, distill, tokenizer.digest, {}))
        return lambda batch: batch

    @property
    def teacher(self) -> Teacher | None:
        """That of the student's step."""
        return self.taught.teacher if self.taught and not self.apart else None

    def _compiled(self, train_step: Any, eval_step: Any) -> tuple[Any, Any]:
        """Both steps, before the first one runs: nothing is compiled in the middle of a run."""
        names = self.dataset.source_names

        def step(
            state: TrainState, batch: dict[str, jax.Array], stop_P: jax.Array, teacher: Teacher | None
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            state, sums = train_step(state, batch, teacher)
            found = {OUTCOME: outcomes(batch[OUTCOME])} if OUTCOME in batch else {}
            # Whether any process was asked to stop goes through the step, so that all learn it at the same one.
            return state, metrics(sums, names) | found | {"stop": jnp.sum(stop_P)}

        run, mesh = self.run, self.mesh
        batch, plain = abstract_batch(run, mesh), abstract_batch(dataclasses.replace(run, distill=None), mesh)
        if self.asked:
            self.asked.compile(abstract_batch(run, self.teacher_mesh, asked=True))
        if self.rollout:
            self.rollout.compile(self.state, batch)
            batch = self.rollout.shapes(batch)
        # Named, or the compiler might move what it gives back, which the next step could not take.
        outputs = jax.tree.map(lambda array: array.sharding, self.state), mesh.everywhere
        compiled_step = jax.jit(step, donate_argnums=0, out_shardings=outputs)
        compiled_step = compiled_step.lower(self.state, batch, self._flags[False], self.teacher).compile()
        weights = (self.state.params, self.state.router_bias)
        return compiled_step, jax.jit(eval_step, out_shardings=mesh.everywhere).lower(*weights, plain).compile()

    def _facts(self, origin: str) -> dict[str, Any]:
        counts, mesh, device = parameter_counts(self.run.model), self.mesh, self.mesh.devices[0]
        return {
            "command": shlex.join(sys.argv),
            "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})"
            + (f", {len(mesh.devices)} of them the student's" if self.apart else ""),
            "mesh": written(mesh.sizes),
            "mesh_memory": memory_line(self.state),
            "compiler_flags": " ".join(filter(None, map(os.environ.get, ("XLA_FLAGS", "LIBTPU_INIT_ARGS")))),
            "peak_flops": self.peak.flops_per_s,
            "peak_source": self.peak.source,
            "flops_per_token": self.flops.training,
            "mfu_formula": self.flops.formula + self._teacher_formula(),
            "parameters": counts.total,
            "active_parameters": counts.active,
            "expert_kernel": self.skeleton.config.expert_kernel,
            "data_digest": self.dataset.digest,
            "data_notes": self.notes,
            "initialised_from": origin,
            "teacher": self.taught.origin if self.taught else self.cached and self.cached.origin,
            "teacher_cache": self.cached and self.cached.facts,
            "teacher_parameters": self.taught and parameter_counts(self.taught.model).total,
            "teacher_flops_per_token": self.teacher_flops and self.teacher_flops.forward,
            "teacher_place": self.taught and self._teacher_place(self.taught.teacher),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
        }

    def _teacher_formula(self) -> str:
        if self.apart:
            return "; of the student and its devices; the teacher's forward pass on its own is time/teacher_mfu"
        own = "; so does the student's where it writes" if self.rollout else ""
        return f"; the teacher's forward pass counts too{own}" if self.taught else ""

    def _teacher_place(self, teacher: Teacher) -> str:
        mesh = self.teacher_mesh
        where = f"devices of its own ({written(mesh.sizes)})" if self.apart else "the student's mesh"
        weights = teacher.params, teacher.router_bias
        host = tree_bytes(weights) - device_bytes(weights)
        kept = f" and {decimal(host)} in the memory of its host" if host else ""
        return f"on {where}, its weights {decimal(device_bytes(weights))} a device{kept}"

    def loop(self, reached: Callable[[int], None]) -> None:
        """Steps until the last one or until asked to stop. `reached`: see `train`."""
        run, pending = self.run, None
        self.reached, self.step = reached, self.start
        self.last_done = time.perf_counter()
        for step in range(self.start + 1, run.steps + 1):
            fed = self.feeder.next(lambda: jax.block_until_ready(self.state))
            self.where, self.step = fed.where, step
            reached(step)
            self.stop.nothing_to_save = False
            batch = self.rollout(self.state, fed.batch, step) if self.rollout else fed.batch
            self.state, measured = self.step_fn(
                self.state, batch, self._flags[self.stop.requested.is_set()], self.teacher
            )
            if pending:
                self._done(pending)
            pending = Pending(step, measured, fed._replace(batch=None))
            first, last = step == self.start + 1, step == run.steps
            evaluating = last or step % run.eval.every_steps == 0
            saving = last or step % run.checkpoint.every_steps == 0
            if first or evaluating or saving or self.stopping:
                self._done(pending)
                pending = None
            self._tell_if_saved()
            if first:
                self._announce()
            for note in self.cached.take_notes() if self.cached else ():
                self.console.message(note)
            if evaluating:
                self._evaluate(step)
            stopping = pending is None and self.stopping
            if saving or stopping:
                self._save(step)
            if stopping:
                self._leave(step)

    def _announce(self) -> None:
        after = self.facts["time_to_first_step_s"] = time.perf_counter() - self.started
        if self.leader:
            write_json(self.directory.facts, self.facts)
        compiling = duration(self.facts["compile_s"])
        self.console.message(f"first step after {duration(after)}, {compiling} of it compiling")

    def _done(self, pending: Pending) -> None:
        """Waits for a step, times it, logs it, and stops the run where too many steps in a row were not finite."""
        values = jax.block_until_ready(pending.metrics)
        now = time.perf_counter()
        seconds, self.last_done = now - self.last_done, now
        in_a_row, self.stopping = int(values.pop("skipped_in_a_row")), bool(values.pop("stop"))
        if OUTCOME in values:
            for name, number in zip(OUTCOMES, np.asarray(values.pop(OUTCOME)).tolist(), strict=True):
                self.looked_up[name] += number
        if pending.step % self.run.log.every_steps == 0 or pending.step in (1, self.run.steps) or in_a_row:
            values = without_empty_means(values, self.dataset.source_names)
            amounts = float(values["tokens"]), float(values["tiles"]), float(values.get("audio_windows", 0))
            tokens, flops = amounts[0], self.flops.training_step(*amounts)
            flops += self.flops.forward_step(*amounts) if values.get(SAMPLED) else 0
            teachers = self.teacher_flops.forward_step(*amounts) if self.teacher_flops else 0.0
            peak = seconds * self.peak.flops_per_s
            clock = {
                "time/step": seconds,
                "time/tokens_per_s": tokens / seconds,
                "time/mfu": (flops + (0 if self.apart else teachers)) / peak / len(self.mesh.devices),
                "time/data_wait": pending.fed.data_wait / seconds,
                "time/elapsed": now - self.started,
            }
            if pending.fed.teacher_wait is not None:
                clock["time/teacher_wait"] = pending.fed.teacher_wait / seconds
                clock["time/teacher_mfu"] = teachers / peak / len(self.teacher_mesh.devices)
            slots = self.run.data.batch_size * self.run.data.sequence_length
            seen = {"packing": tokens / slots, "slots_seen": pending.step * slots}
            if teachers:
                seen |= {"flops": flops + teachers, "teacher_flops": teachers}
            seen |= self._cache_counts()
            seen |= {f"epochs/{name}": epochs for name, epochs in self.dataset.epochs(pending.fed.where).items()}
            self.logger.write({"kind": "train", "step": pending.step} | values | seen | clock)
        if in_a_row >= self.run.optimizer.max_skipped:
            raise UserError(
                f"step {pending.step}: the loss or the gradient was not finite {in_a_row} steps in a row "
                "(optimizer.max_skipped). Nothing was learned in these steps. Lower optimizer.peak_lr, set or lower "
                f"optimizer.clip_norm, or look at batches {pending.step - in_a_row} to {pending.step - 1}."
            )

    def _cache_counts(self) -> dict[str, int]:
        """Segments of the run so far that were looked up in the cache, by what came of it."""
        return {f"cache/{name}": number for name, number in self.looked_up.items()} if self.cached else {}

    def _evaluate(self, step: int) -> None:
        start = time.perf_counter()
        scores = self.held_out.score(self.state.params, self.state.router_bias, self.run.eval.batches)
        seconds = time.perf_counter() - start
        self.logger.write({"kind": "eval", "step": step} | scores | {"time/eval": seconds})
        self.last_done = time.perf_counter()

    def _save(self, step: int) -> None:
        # A checkpoint at step k implies that the metrics up to k are on disk: a resumed run has no gap.
        self.logger.flush()
        self.reached(step)
        self.checkpoints.save(self.state, self._metadata())
        self.saving = step
        self.last_done = time.perf_counter()

    def _tell_if_saved(self) -> None:
        """Notes a checkpoint that has arrived on disk, or raises why it has not."""
        if self.saving is not None and not self.checkpoints.busy():
            self.checkpoints.check()
            self.console.saved(self.saving)
            self.saving = None

    def _metadata(self) -> dict[str, Any]:
        return {
            "config": to_plain(self.run),
            "next_batch": int(self.state.step),
            "data_position": self.dataset.plain_position(self.where),
            "journal": self.journal,
            "looked_up": dict(self.looked_up),
            "tokenizer_digest": self.dataset.tokenizer.digest,
            "teacher": self.teacher_digest,
        } | self._data_facts()

    def _data_facts(self) -> dict[str, Any]:
        """What batches are made of, the mixture aside."""
        return {"data_digest": self.dataset.digest, "source_digests": self.dataset.digests}

    def _wait_for_checkpoints(self) -> None:
        self.checkpoints.wait()
        self._tell_if_saved()
        self.stop.nothing_to_save = True

    def _leave(self, step: int) -> None:
        self._wait_for_checkpoints()
        told = self.stop.signal_name or "another process was told to stop"
        self.console.message(f"{told}: saved step {step}. The same command goes on from there.")
        raise SystemExit(self.stop.exit_code or TERMINATED)

    def finish(self) -> None:
        """The last checkpoint on disk, held-out scores, report."""
        self._wait_for_checkpoints()
        if anyone_says(self.stop.requested.is_set()):
            self._leave(self.run.steps)
        run, params, bias = self.run, self.state.params, self.state.router_bias
        scores = self.held_out.score(params, bias, run.eval.final_batches)
        evaluation: dict[str, Any] = {
            "step": int(self.state.step),
            "text_bits_per_byte": scores.pop("text_bits_per_byte", None),
        }
        evaluation["loss"] = scores
        asked = [name for name in SOURCES if name in self.dataset.source_names] if run.eval.questions else []
        if asked:
            about = f" about each of {', '.join(asked)}" if len(asked) > 1 else ""
            self.console.message(f"asking {run.eval.questions} held-out questions{about}, three times")
            decoder = Decoder(Skeleton(run.model, self.mesh.outside()), params, bias)
            tokenizer = self.dataset.tokenizer
            evaluation |= question_scores(decoder, tokenizer, run.data, run.media, asked, run.eval.questions)
        if lacking := without_targets(self._cache_counts()):
            self.console.message(f"cache of targets: {lacking}")
        self.logger.flush()
        if self.leader:
            write_json(self.directory.evaluation, evaluation)
            self.console.scores(evaluation)
            self.console.message(f"report: {write_report(self.directory.root)}")
