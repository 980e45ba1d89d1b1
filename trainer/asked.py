"""A teacher on a mesh of its own, asked for sparse targets: for a cache, or by a student, one batch ahead.

Letters: B rows, S sequence, K ids of a sparse target.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from data.pipeline import Batch
from model.sampled_targets import Targets
from trainer.config import DistillConfig, RunConfig
from trainer.distillation import CachedTargets, sparse_targets
from trainer.feeder import Fed, Feeder
from trainer.step import Teacher, split_batch

Tree = TypeVar("Tree")


class Asked:
    """A teacher on its mesh. Each process puts in and fetches its own rows."""

    def __init__(self, run: RunConfig, distill: DistillConfig, teacher: Teacher):
        self._mesh, self._rows, self._teacher = teacher.skeleton.mesh, run.data.batch_size, teacher
        mesh, parts = self._mesh, run.optimizer.accumulate

        def on_one(weights: Any, biases: Any, batch: dict[str, jax.Array]) -> Targets:
            model = teacher.skeleton.model(weights, biases)

            def of_part(part: dict[str, jax.Array]) -> Targets:
                found = sparse_targets(distill, model, part)
                return jax.tree.map(lambda array: array.reshape(*part["tokens"].shape, *array.shape[1:]), found)

            if parts == 1:
                return of_part(batch)
            found = jax.lax.map(of_part, split_batch(batch, parts))
            return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found)

        def run_on(weights: Any, biases: Any, batch: dict[str, jax.Array]) -> Targets:
            tokens = mesh.batch(["tokens"])["tokens"]
            outputs = Targets(*[tokens] * len(Targets._fields))  # pyright: ignore[reportArgumentType]
            inputs = (teacher.skeleton.shardings, mesh.everywhere, mesh.batch(batch))
            return mesh.on_all(on_one, inputs, outputs)(weights, biases, batch)

        self._run: Any = jax.jit(run_on)

    def shapes(self, batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """Traces the teacher over a batch of these shapes; returns those of what a student gets."""
        return _learned(jax.eval_shape(self._run, self._teacher.params, self._teacher.router_bias, batch))

    def compile(self, batch: Mapping[str, Any]) -> None:
        """Compiles for whole batches like this one, of which shapes, dtypes and shardings count, with the keys of draws."""
        self._run = self._run.lower(self._teacher.params, self._teacher.router_bias, dict(batch)).compile()

    def put(self, share: Batch) -> dict[str, jax.Array]:
        """This process's rows of a batch, with the keys of their draws, on the teacher's devices."""
        return self._mesh.put(share, self._rows)

    def __call__(self, batch: Mapping[str, jax.Array]) -> Targets:
        """What the teacher says of the batch, arrays [B, S, ...] on its devices. Does not wait for it."""
        return self._run(self._teacher.params, self._teacher.router_bias, dict(batch))

    def fetch(self, answer: Tree) -> Tree:
        """This process's rows of an answer, or of some of its arrays, on the host. Waits for them."""
        return jax.tree.map(self._mesh.fetch, answer)


class AskedAhead:
    """Batches with what the teacher says of them, which it is asked one batch ahead: while the student learns from a batch,
    the teacher is at the next one.

    The thread that starts the student's steps asks, and not the feeder's: processes have to start what they compute
    together in one order.
    """

    def __init__(
        self,
        feeder: Feeder,
        asked: Asked,
        put: Callable[[Batch], dict[str, Any]],
        batches: int,
    ):
        """`feeder` gives pairs, of what the student is given of a batch and of what the teacher is; `put` moves targets to
        the student; `batches` are left of the run."""
        self._feeder, self._asked, self._put, self._left = feeder, asked, put, batches
        self._ahead: _Ahead | None = None

    def next(self, device_idle: Callable[[], Any]) -> Fed:
        """As `Feeder.next`."""
        now = self._ahead or self._ask(device_idle)
        self._ahead = self._ask(device_idle) if self._left else None
        waited = 0.0
        if not all(array.is_ready() for array in now.answer.values()):
            device_idle()
            start = time.perf_counter()
            jax.block_until_ready(now.answer)
            waited = time.perf_counter() - start
        targets = self._put(self._asked.fetch(now.answer))
        return now.fed._replace(batch=now.fed.batch | targets, teacher_wait=waited)

    def _ask(self, device_idle: Callable[[], Any]) -> "_Ahead":
        self._left -= 1
        fed = self._feeder.next(device_idle)
        ours, theirs = fed.batch
        answer = _learned(self._asked(theirs))
        for array in answer.values():  # to the host as soon as it is there
            array.copy_to_host_async()
        return _Ahead(fed._replace(batch=ours), answer)


class _Ahead(NamedTuple):
    """A batch and what the teacher was asked about it."""

    fed: Fed
    answer: dict[str, Any]


def _learned(targets: Targets) -> dict[str, Any]:
    """What a student needs of the targets: the arrays of `CachedTargets`."""
    ids, weights, _, *facts = targets
    return CachedTargets(ids, weights, *facts)._asdict()
