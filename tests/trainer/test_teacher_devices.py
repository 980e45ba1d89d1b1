"""A teacher on devices of its own: what it says, when it is asked, and whole runs that learn from it."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.filesize import decimal

from data.pipeline import build_dataset
from model.config import ModelConfig
from sharding.config import MeshConfig
from sharding.mesh import DeviceMesh
from tests import oracle
from tests.oracle_cases import COEFFICIENTS, FAST_COMPILE, SOURCES, random_batch, random_bias, random_params
from tests.sharding.sameness import CASES, LENGTH
from tests.trainer.processes import finish, metrics, start
from tests.trainer.saved_run import nano, save_run
from trainer.asked import Asked, AskedAhead
from trainer.checkpoint import Checkpoints
from trainer.config import DistillConfig, OptimizerConfig, RunConfig
from trainer.distillation import KEYS, CachedTargets, distillation_objective, sparse_targets
from trainer.feeder import Fed
from trainer.loop import Run, train
from trainer.memory import tree_bytes
from trainer.placement import place_student_and_teacher
from trainer.step import Skeleton, Teacher, loss_and_gradient
from trainer.targets import CachedSource, DrawKeys, header_of
from trainer.teach import teach
from trainer.teacher import LoadedTeacher

BESIDE = DistillConfig(teacher="another run", draws=5, block_vocabulary=7)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled in this process is compiled fast."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))


# What it says


STUDENT = dataclasses.replace(
    CASES[next(iter(CASES))][0],
    num_layers=2,
    nope_layer_step=0,
    audio=None,
    remat="none",
    router_bias_rate=0.0,
    hidden_size=24,
    dtype="float64",
    param_dtype="float64",
)
TEACHER = dataclasses.replace(STUDENT, num_layers=4, hidden_size=32, num_experts=4, router_bias_rate=0.1)
ROWS = 12


def keyed(batch: dict[str, Any]) -> dict[str, Any]:
    keys = np.random.default_rng(8).integers(0, 2**32, (*batch["tokens"].shape, 2), np.uint32)
    return batch | {KEYS: keys}


def teacher_on(mesh: DeviceMesh) -> Teacher:
    skeleton = Skeleton(TEACHER, mesh)
    params = jax.device_put(oracle.as_float64(random_params(TEACHER, 7)), skeleton.shardings)
    return Teacher(skeleton, params, jax.device_put(random_bias(TEACHER, 7), mesh.everywhere))


def gradient(
    student: ModelConfig, mesh: DeviceMesh, batch: Any, distill: DistillConfig, teacher: Teacher | None
) -> Any:
    """Loss, sums and gradient of two micro-batches."""
    skeleton, objective = Skeleton(student, mesh), distillation_objective(COEFFICIENTS, distill, SOURCES)
    params = jax.device_put(oracle.as_float64(random_params(student, 6)), skeleton.shardings)

    @jax.jit
    def run(params: Any, batch: Any, teacher: Teacher | None) -> Any:
        return loss_and_gradient(skeleton, objective, params, {}, batch, 2, 0.0, teacher)

    return jax.device_get(run(params, placed_rows(mesh, batch), teacher))


def placed_rows(mesh: DeviceMesh, batch: dict[str, Any]) -> dict[str, jax.Array]:
    order = mesh.row_order(ROWS, 2)
    return jax.device_put({name: array[order] for name, array in batch.items()}, mesh.batch(batch))


@functools.cache
def beside() -> Any:
    """(what a teacher in the student's step draws, and the gradient of that student), all on one device."""
    mesh = DeviceMesh.alone()
    batch, distill = keyed(random_batch(STUDENT, 6, rows=ROWS, length=LENGTH)), BESIDE
    teacher = teacher_on(mesh)
    drawn = jax.jit(lambda teacher, batch: sparse_targets(
        distill, teacher.skeleton.model(teacher.params, teacher.router_bias), batch
    ))(teacher, batch)  # fmt: skip
    return jax.device_get(drawn), gradient(STUDENT, mesh, batch, distill, teacher)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(("student", "teacher"), [
    ({"data": 3, "fsdp": 2}, {"tensor": 2}),
    pytest.param({"fsdp": 2, "context": 2}, {"fsdp": 2, "context": 2}, marks=pytest.mark.slow),
    pytest.param({"expert": 2, "tensor": 2}, {"stage": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 6}, {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_targets_and_gradients_are_those_of_a_teacher_beside_the_student(
    student: dict[str, int], teacher: dict[str, int]
) -> None:
    with jax.enable_x64(True):
        drawn, expected = beside()
        run = RunConfig(
            model=STUDENT,
            data=dataclasses.replace(nano().data, batch_size=ROWS, sequence_length=LENGTH),
            optimizer=OptimizerConfig(accumulate=2),
            mesh=MeshConfig(**{"fsdp": 1} | student),
            distill=dataclasses.replace(BESIDE, source="devices", teacher_mesh=MeshConfig(**{"fsdp": 1} | teacher)),
        )
        assert run.distill
        count = math.prod(student.values()) + math.prod(teacher.values())
        ours, theirs = place_student_and_teacher(run, jax.devices()[:count])
        batch = random_batch(STUDENT, 6, rows=ROWS, length=LENGTH)
        order = ours.row_order(ROWS, 2)
        asked = Asked(run, run.distill, teacher_on(theirs))
        share = asked.put({name: array[order] for name, array in keyed(batch).items()})
        shapes = asked.shapes(share)
        asked.compile(share)
        feeder: Any = SimpleNamespace(next=lambda _: Fed(({}, share), np.zeros(1), 0.0))
        fed = AskedAhead(feeder, asked, lambda rows: rows, 1).next(lambda: None)
        targets = {name: array[np.argsort(order)] for name, array in fed.batch.items()}
        ids, weights, _, *facts = drawn
        for name, theirs_T in CachedTargets(ids, weights, *facts)._asdict().items():
            found = targets[name]
            assert (shapes[name].shape, shapes[name].dtype) == (found.shape, found.dtype)
            assert found.dtype == theirs_T.dtype
            exact = found.dtype != np.float64
            np.testing.assert_allclose(
                found.reshape(theirs_T.shape), theirs_T, rtol=0 if exact else 1e-11, atol=0 if exact else 1e-13
            )
        found = gradient(STUDENT, ours, batch | targets, run.distill, None)
    for mine, theirs_ in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(mine - theirs_) <= 1e-10 * max(np.linalg.norm(theirs_), 1e-30)


# When it is asked


class Array:
    """On a device; waited for where it is not ready."""

    def __init__(self, name: str, log: list[str], ready: bool):
        self.name, self.log, self.ready = name, log, ready

    def is_ready(self) -> bool:
        return self.ready

    def block_until_ready(self) -> None:
        self.log.append(f"wait {self.name}")

    def copy_to_host_async(self) -> None:
        self.log.append(f"send {self.name}")


class Script:
    """Stands in for the feeder and the teacher, and notes what is asked of them."""

    def __init__(self, late: set[int]):
        self.log: list[str] = []
        self.late, self.batch = late, 0

    def next(self, device_idle: Any) -> Fed:
        self.batch += 1
        return Fed(({"tokens": self.batch}, self.batch), np.array([10 * self.batch]), 0.5 * self.batch)

    def __call__(self, batch: int) -> Any:
        self.log.append(f"ask {batch}")
        return [Array(str(batch), self.log, batch not in self.late)] * 6

    def fetch(self, answer: Any) -> Any:
        self.log.append(f"fetch {answer['soft_ids'].name}")
        return {"soft_ids": int(answer["soft_ids"].name)}


def test_the_teacher_is_asked_about_the_next_batch_before_a_batch_is_handed_out() -> None:
    script: Any = Script(late={2})
    feeder = AskedAhead(script, script, lambda targets: targets, 3)
    for n in (1, 2, 3):
        fed = feeder.next(lambda: script.log.append("student idle"))
        assert fed.batch == {"tokens": n, "soft_ids": n}
        assert fed.where == [10 * n] and fed.data_wait == 0.5 * n
        assert (fed.teacher_wait or 0) > 0 if n == 2 else fed.teacher_wait == 0
        script.log.append(f"step {n}")
    assert [line for line, _ in itertools.groupby(script.log) if not line.startswith("send")] == [
        "ask 1", "ask 2", "fetch 1", "step 1", "ask 3", "student idle", "wait 2", "fetch 2", "step 2", "fetch 3", "step 3",
    ]  # fmt: skip
    assert "send 1" in script.log[: script.log.index("ask 2")]


# Whole runs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    run = nano()
    save_run(folder, dataclasses.replace(run, model=dataclasses.replace(run.model, hidden_size=32)))
    return folder


def student(teacher: Path, **distill: Any) -> RunConfig:
    """A run of six steps."""
    given = {"teacher": str(teacher), "teacher_dtype": "float32", "draws": 12} | distill
    return nano(mesh=MeshConfig(data=2), distill=DistillConfig(**given))


FOUR = {"source": "devices", "teacher_mesh": MeshConfig(fsdp=2, expert=2)}


@pytest.mark.usefixtures("fast")
def test_the_teacher_is_ahead_and_a_run_that_was_stopped_goes_on_bit_for_bit(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    ask, done = Asked.__call__, Run._done

    def asked(self: Asked, batch: Any) -> Any:
        log.append("ask")
        return ask(self, batch)

    def waited(self: Run, pending: Any) -> None:
        log.append(f"wait {pending.step}")
        done(self, pending)
        if self.directory.root.name == "stopped" and self.start == 0 and pending.step == 1:
            self.stop.requested.set()

    monkeypatch.setattr(Asked, "__call__", asked)
    monkeypatch.setattr(Run, "_done", waited)
    run = student(teacher, **FOUR)
    train(run, tmp_path / "whole")
    for n in range(1, 6):  # the teacher is asked about n + 1 batches before step n is waited for
        assert log[: log.index(f"wait {n}")].count("ask") >= n + 1
    assert log.count("ask") == 6

    with pytest.raises(SystemExit):
        train(run, tmp_path / "stopped")
    (saved,) = (int(path.name) for path in (tmp_path / "stopped" / "checkpoints").iterdir() if path.name.isdigit())
    assert 1 < saved < 6
    facts = Checkpoints(tmp_path / "stopped" / "checkpoints").metadata(saved)
    assert facts["next_batch"] == saved  # and not one that the teacher has been asked about
    train(run, tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")

    dataset = build_dataset(run.data, run.media, "train")
    facts = json.loads((tmp_path / "whole" / "run.json").read_text())
    for line in (tmp_path / "whole" / "metrics" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "train":
            assert record["epochs/text"] == dataset.epochs(dataset.where(record["step"] - 1))["text"]
            rate = record["time/tokens_per_s"] / facts["peak_flops"] / 4
            assert record["time/mfu"] == pytest.approx(rate * facts["flops_per_token"])
            assert record["time/teacher_mfu"] == pytest.approx(rate * facts["teacher_flops_per_token"])
            assert 0 <= record["time/teacher_wait"] < 1 and record["taught"] == 1
    output = capsys.readouterr().out
    assert "8 x cpu (cpu), 4 of them the student's" in output
    wide = dataclasses.replace(run.model, hidden_size=32)
    _, theirs = place_student_and_teacher(run, jax.devices())
    weights = decimal(tree_bytes(Skeleton(wide, theirs).abstract_weights))
    assert f"on devices of its own (fsdp=2, expert=2), its weights {weights} a device" in " ".join(output.split())
    assert "time/teacher_mfu" in output
    report = (tmp_path / "whole" / "report.html").read_text()
    assert "on devices of its own" in report and "Wait for the teacher" in report


@pytest.mark.slow
@pytest.mark.usefixtures("fast")
def test_on_the_mesh_on_its_own_devices_and_from_a_cache_it_says_the_same(teacher: Path, tmp_path: Path) -> None:
    train(student(teacher, **FOUR), tmp_path / "own")
    train(student(teacher), tmp_path / "mesh")
    teach(student(teacher), tmp_path / "cache")
    train(student(teacher, source="cache", cache=str(tmp_path / "cache")), tmp_path / "cached")
    own, mesh, cached = (metrics(tmp_path / name) for name in ("own", "mesh", "cached"))
    assert [r["step"] for r in own] == [r["step"] for r in mesh] == [r["step"] for r in cached]
    for ours, *others in zip(own, mesh, cached, strict=True):
        for name in ("loss", "grad_norm", "soft", "soft_weight", "taught", "teacher_loss", "teacher_entropy"):
            if name in ours:
                assert [other[name] for other in others] == pytest.approx([ours[name]] * 2, rel=1e-3), name


@pytest.mark.slow
@pytest.mark.usefixtures("fast")
def test_in_8_bits_and_from_the_memory_of_the_host_it_says_the_same_on_its_own_devices(
    teacher: Path, tmp_path: Path
) -> None:
    small = {"teacher_dtype": "int8", "teacher_memory": "host"}
    train(student(teacher, **FOUR, **small), tmp_path / "own")
    train(student(teacher, **small), tmp_path / "mesh")
    for ours, theirs in zip(metrics(tmp_path / "own"), metrics(tmp_path / "mesh"), strict=True):
        for name in ("loss", "soft", "teacher_loss", "teacher_entropy"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3), name


@pytest.mark.usefixtures("fast")
def test_a_cache_keeps_the_very_ids_that_a_teacher_on_its_own_devices_draws(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, in which no mesh moves a draw over the edge between two ids."""
    run = student(teacher, **FOUR)
    run = dataclasses.replace(run, steps=1, optimizer=dataclasses.replace(run.optimizer, warmup_steps=0))
    assert run.distill
    model = dataclasses.replace(run.model, hidden_size=32, dtype="float64", param_dtype="float64")

    def loaded(_run: Any, _distill: Any, mesh: DeviceMesh, *_: Any) -> LoadedTeacher:
        skeleton = Skeleton(model, mesh)
        params = jax.device_put(oracle.as_float64(random_params(model, 0)), skeleton.shardings)
        return LoadedTeacher(Teacher(skeleton, params, {}), model, "in float64")

    monkeypatch.setattr("trainer.teach.load_teacher", loaded)
    digest = json.loads((teacher / "checkpoints/0/run/metadata").read_text())["tokenizer_digest"]
    _, theirs = place_student_and_teacher(run, jax.devices())
    batch = build_dataset(run.data, run.media, "train").batch(0)
    with jax.enable_x64(True):
        teach(dataclasses.replace(run, mesh=MeshConfig()), tmp_path)
        asked = Asked(run, run.distill, loaded(run, run.distill, theirs).teacher)
        answer = asked.fetch(asked(asked.put(DrawKeys(header_of(run, run.distill, digest, {}))(batch))))
    source = CachedSource(run, dataclasses.replace(run.distill, cache=str(tmp_path)), digest)
    kept, real = source(batch), batch["loss_weights"] > 0
    source.close()
    assert real.mean() > 0.9
    np.testing.assert_array_equal(kept["soft_ids"][real], answer.ids_TK[real])
    np.testing.assert_allclose(kept["soft_weights"][real], answer.weights_TK[real], rtol=1e-6)
    np.testing.assert_array_equal(kept["soft_correct"][real], answer.correct_T[real])
    for name, exact in (("soft_log_prob", answer.target_log_prob_T), ("soft_entropy", answer.entropy_T)):
        np.testing.assert_allclose(kept[name][real], exact[real], rtol=1e-3)  # float16


@pytest.mark.slow
def test_two_processes_with_two_devices_each_learn_what_one_device_does(teacher: Path, tmp_path: Path) -> None:
    options = ("--config.distill={}", f"--config.distill.teacher={teacher}", "--config.distill.teacher_dtype=float32")
    options += ("--config.distill.draws=12",)
    finish(start(tmp_path / "alone", *options, config="tests/nano.py", steps=6))
    own = ("--processes=2", "--config.distill.source=devices", "--config.distill.teacher_mesh={}")
    own += ("--config.distill.teacher_mesh.fsdp=2",)
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    output = finish(start(tmp_path / "own", *options, *own, config="tests/nano.py", steps=6, environment=devices))
    assert "4 x cpu (cpu), 2 of them the student's" in output
    for ours, theirs in zip(metrics(tmp_path / "own"), metrics(tmp_path / "alone"), strict=True):
        for name in ("loss", "grad_norm", "soft", "teacher_loss"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
