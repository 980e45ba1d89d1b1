"""What a student learns from a teacher on its mesh: the objective, its weights, whole runs, and what is refused."""

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from tests import oracle
from tests.oracle_cases import (
    COEFFICIENTS,
    FAST_COMPILE,
    SOURCES,
    TINY,
    VISION,
    random_batch,
    random_bias,
    random_params,
)
from tests.sharding.sameness import CASES, DEVICES, LENGTH, ROWS, placed
from tests.trainer.processes import finish, metrics, start
from tests.trainer.saved_run import micro, nano, save_run
from trainer import memory
from trainer.checkpoint import Checkpoints
from trainer.config import DistillConfig, InitConfig, RunConfig
from trainer.distillation import CachedTargets, distillation_objective, soft_weight
from trainer.initialise import abstract_state
from trainer.loop import train
from trainer.memory import tree_bytes
from trainer.objective import SAMPLED, extras_for, next_token_objective, without_empty_means
from trainer.objective import metrics as metrics_of
from trainer.sections import from_plain, to_plain
from trainer.step import Skeleton, Teacher, loss_and_gradient
from trainer.teacher import as_of_now, identity, load_teacher

FLOAT64 = {"dtype": "float64", "param_dtype": "float64"}
STUDENT = dataclasses.replace(TINY, num_layers=2, moe_layer_step=2, nope_layer_step=2, vision=VISION, **FLOAT64)
TEACHER = dataclasses.replace(
    STUDENT,
    num_layers=4,
    hidden_size=20,
    num_experts=3,
    vision=dataclasses.replace(VISION, hidden_size=16, num_layers=1),
)
CONSTANT = ("--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=1")
DISTILL = DistillConfig(teacher="another run", block_vocabulary=7)


def taught(distill: DistillConfig, progress: float = 0.0) -> tuple[Any, dict[str, Any]]:
    """(loss, sums, gradient) of the shipped objective, and what its reference needs."""
    batch = random_batch(STUDENT, 3)
    params, teacher = (oracle.as_float64(random_params(model, 3)) for model in (STUDENT, TEACHER))
    students, teachers = Skeleton(STUDENT), Skeleton(TEACHER)
    objective = distillation_objective(COEFFICIENTS, distill, SOURCES)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params: Any, teacher: Any, batch: Any) -> Any:
        return loss_and_gradient(students, objective, params, {}, batch, 1, progress, Teacher(teachers, teacher, {}))

    return run(params, teacher, batch), {"params": params, "teacher": teacher, "batch": batch}


def reference(distill: DistillConfig, weight: float, given: dict[str, Any]) -> Any:
    """The same with every logit of both models at once."""
    skeletons = Skeleton(STUDENT), Skeleton(TEACHER)
    plain = next_token_objective(COEFFICIENTS, SOURCES)

    def logits(skeleton: Skeleton, params: Any, batch: Any) -> jax.Array:
        model = skeleton.model(params, {})
        hidden = model(batch).hidden_BSD
        return hidden.reshape(-1, hidden.shape[-1]) @ model.head()

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params: Any, teacher: Any, batch: Any) -> Any:
        return jax.value_and_grad(loss)(params, teacher, batch)

    def loss(params: Any, teacher_params: Any, batch: Any) -> jax.Array:
        whole, _ = plain(skeletons[0].model(params, {}), batch, extras_for(batch, 1))
        student, teacher = logits(skeletons[0], params, batch), logits(skeletons[1], teacher_params, batch)
        p, q = (jax.nn.log_softmax(z / distill.temperature) for z in (teacher, student))
        m = jnp.log((jnp.exp(p) + jnp.exp(q)) / 2)
        soft = {
            "forward": jnp.sum(jnp.exp(p) * (p - q), 1),
            "reverse": jnp.sum(jnp.exp(q) * (q - p), 1),
            "jensen_shannon": jnp.sum(jnp.exp(p) * (p - m) + jnp.exp(q) * (q - m), 1) / 2,
        }[distill.divergence] * distill.temperature**2
        targets = batch["targets"].reshape(-1)
        rows = jnp.arange(len(targets))
        log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
        factor = {
            "none": 1.0,
            "confidence": 1 + jnp.sum(jnp.exp(log_p) * log_p, 1) / np.log(STUDENT.vocab_size),
            "correct": 1.0 * (jnp.argmax(teacher, 1) == targets),
            "gap": jnp.exp(log_p[rows, targets]) / jnp.exp(jnp.logaddexp(log_p[rows, targets], log_q[rows, targets])),
        }[distill.adapt]
        w = weight * jax.lax.stop_gradient(factor)
        hard, weights = -log_q[rows, targets], batch["loss_weights"].reshape(-1).astype(jnp.float64)
        return whole + jnp.sum(weights * w * (soft - hard)) / jnp.sum(weights)

    return run(given["params"], given["teacher"], given["batch"])


@pytest.mark.parametrize(("divergence", "adapt", "temperature"), [
    ("forward", "gap", 1.0),
    ("jensen_shannon", "correct", 0.7),
    pytest.param("reverse", "confidence", 2.0, marks=pytest.mark.slow),
    pytest.param("forward", "none", 1.0, marks=pytest.mark.slow),
])  # fmt: skip
def test_loss_and_gradient_are_those_of_the_whole_distributions(
    divergence: Any, adapt: Any, temperature: float
) -> None:
    distill = dataclasses.replace(DISTILL, divergence=divergence, adapt=adapt, temperature=temperature, soft_weight=0.6)
    with jax.enable_x64(True):
        (loss, sums, gradient), given = taught(distill)
        expected, expected_gradient = reference(distill, 0.6, given)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12 * np.abs(theirs).max())
    assert sums["loss"] != loss  # what is logged as the loss is that of the next token


def test_what_is_logged_of_a_batch_that_is_partly_taught_is_of_the_tokens_that_are() -> None:
    """From a cache that lacks some of the segments; some targets were written by the student."""
    model = dataclasses.replace(STUDENT, num_layers=1, moe_layer_step=0, nope_layer_step=0, vision=None)
    distill = DistillConfig(source="cache", cache="a cache", draws=4, soft_weight=0.3, adapt="confidence")
    batch: dict[str, Any] = random_batch(model, 8, rows=4, length=32)
    rng, K, V = np.random.default_rng(8), 4, model.vocab_size
    shape = batch["tokens"].shape
    own, there = rng.random(shape) < 0.3, rng.random(shape) < 0.5
    there &= batch["source_ids"] != 2  # of which the cache has nothing
    own &= batch["loss_weights"] > 0
    batch["loss_weights"][batch["source_ids"] == 3] = 0  # of which the batch has no target
    ids = np.sort(rng.permuted(np.tile(np.arange(V), (*shape, 1)), axis=-1)[..., :K])
    arrays = (
        np.where(there[..., None], ids, -1),
        np.where(there[..., None], rng.dirichlet(np.ones(K), shape), 0),
        np.where(there, -rng.exponential(size=shape), 0),
        np.where(there, rng.uniform(0, np.log(V), shape), 0),
        there & (rng.random(shape) < 0.5),
    )
    batch |= dict(zip(CachedTargets._fields, arrays, strict=True)) | {SAMPLED: own}
    objective = distillation_objective(COEFFICIENTS, distill, SOURCES)
    with jax.enable_x64(True):
        skeleton = Skeleton(model)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params: Any, part: Any, extras: Any) -> Any:
        found = skeleton.model(params, {})
        hidden = found(part).hidden_BSD
        return objective(found, part, extras), hidden @ found.head()

    names = [f"source{i}" for i in range(SOURCES)]
    with jax.enable_x64(True):
        params = oracle.as_float64(random_params(model, 8))
        halves = [{name: array[rows] for name, array in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
        found = jax.device_get([run(params, half, extras_for(batch, 2)) for half in halves])
        told = jax.device_get(metrics_of(jax.tree.map(jnp.add, *(sums for (_, sums), _ in found)), names))
    log_q = np.concatenate([logits for _, logits in found])
    log_q -= np.log(np.exp(log_q).sum(-1, keepdims=True))

    totals: dict[str, Any] = {}
    loss = 0.0
    for place in np.ndindex(shape):  # each token by itself
        weight, taught = float(batch["loss_weights"][place]), bool(there[place])
        hard = -log_q[(*place, batch["targets"][place])]
        entropy = arrays[3][place]
        soft = -float(np.sum(arrays[1][place] * log_q[place][ids[place]])) - entropy
        w = 0.3 * (1 - entropy / np.log(V)) if taught else 0.0
        w = 1.0 if own[place] else w
        loss += weight * ((1 - w) * hard + w * soft)
        of_all = {"loss": hard, "soft_weight": w, "taught": taught}
        of_taught = {"soft": soft, "teacher_loss": -arrays[2][place], "teacher_entropy": entropy}
        of_taught["teacher_correct"] = arrays[4][place]
        source = batch["source_ids"][place]
        for name, value in (of_all | (of_taught if taught else {})).items():
            where = [f"sampled/{name}"] if own[place] else [name, f"{name}/source{source - 1}"]
            for key in where if weight else []:
                totals.setdefault(key, [0.0, 0.0])
                totals[key][0] += weight * value
                totals[key][1] += weight
    np.testing.assert_allclose(sum(one for (one, _), _ in found), loss / batch["loss_weights"].sum(), rtol=1e-12)
    given = without_empty_means(told, names)
    means = {name for name in given if not name.startswith(("tokens", "targets")) and name not in ("tiles", SAMPLED)}
    assert means == set(totals)
    for name, (total, weight) in totals.items():
        np.testing.assert_allclose(given[name], total / weight, rtol=1e-12, err_msg=name)
    assert 0 < told["taught/source0"] < 1 and "soft/source1" not in given and given["taught/source1"] == 0
    assert "loss/source1" in given and "loss/source2" not in given and told["targets/source2"] == 0


def test_means_over_nothing_are_not_logged() -> None:
    values = {"loss": 1.0, "soft": 2.0, "sampled/loss": 3.0, "sampled/soft": 4.0, "grad_norm": 5.0, "taught": 1.0}
    of_data, of_own = {"loss", "soft", "taught"}, {"sampled/loss", "sampled/soft"}
    for sampled, targets, gone in ((0.0, 8, of_own), (0.5, 8, set()), (1.0, 0, of_data)):
        given = values | {SAMPLED: sampled, "targets/text": targets}
        assert without_empty_means(given, ["text"]).keys() == given.keys() - gone
    given = values | {"taught": 0.0, "targets/text": 8, SAMPLED: 0.5, "sampled/taught": 0.0}
    assert without_empty_means(given, ["text"]).keys() == given.keys() - {"soft", "sampled/soft"}
    of_source = {"loss/load": math.nan, "experts/load": [[1.0]], "tokens/load": 3, "targets/load": 0, "targets/text": 8}
    assert without_empty_means(of_source, ["load", "text"]).keys() == of_source.keys() - {"loss/load"}


def test_the_weight_moves_over_the_run() -> None:
    steady = dataclasses.replace(DISTILL, soft_weight=0.8)
    line = dataclasses.replace(steady, final_soft_weight=0.2)
    wave = dataclasses.replace(line, soft_schedule="cosine")
    for progress, *expected in (
        (0.0, 0.8, 0.8, 0.8),
        (0.25, 0.8, 0.65, 0.8 - 0.3 * (1 - 0.5**0.5)),
        (1.0, 0.8, 0.2, 0.2),
    ):
        np.testing.assert_allclose([soft_weight(c, progress) for c in (steady, line, wave)], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"stage": 2, "context": 2, "data": 2}]
)
def test_a_mesh_changes_nothing(sizes: dict[str, int]) -> None:
    case = next(iter(CASES))
    student = dataclasses.replace(
        CASES[case][0], num_layers=4, audio=None, remat="none", router_bias_rate=0.0, **FLOAT64
    )
    teacher = dataclasses.replace(student, num_layers=8, hidden_size=32, num_experts=16, router_bias_rate=0.1)
    found = _gradient(DeviceMesh.of(jax.devices()[:DEVICES], sizes), student, teacher)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(_alone(student, teacher)), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-10 * max(np.linalg.norm(theirs), 1e-30)


@functools.cache
def _alone(student: ModelConfig, teacher: ModelConfig) -> Any:
    return _gradient(DeviceMesh.alone(), student, teacher)


def _gradient(mesh: DeviceMesh, student: ModelConfig, teacher: ModelConfig) -> Any:
    with jax.enable_x64(True):
        students, teachers = Skeleton(student, mesh), Skeleton(teacher, mesh)
        batch = random_batch(student, 6, rows=ROWS, length=LENGTH)
        params = jax.device_put(oracle.as_float64(random_params(student, 6)), students.shardings)
        frozen = jax.device_put(oracle.as_float64(random_params(teacher, 7)), teachers.shardings)
        bias = jax.device_put(random_bias(teacher, 7), mesh.everywhere)
        objective = distillation_objective(COEFFICIENTS, DISTILL, SOURCES)

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def run(params: Any, batch: Any, frozen: Any, bias: Any) -> Any:
            return loss_and_gradient(students, objective, params, {}, batch, 2, 0.0, Teacher(teachers, frozen, bias))

        return jax.device_get(run(params, placed(mesh, batch, 2), frozen, bias))


# Whole runs


def records(workdir: Path) -> list[dict[str, Any]]:
    clock = ("time/", "epochs")
    return [{k: v for k, v in record.items() if not k.startswith(clock)} for record in metrics(workdir)]


@pytest.mark.slow
def test_a_run_learns_from_another_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    finish(start(tmp_path / "teacher", "--config.model.hidden_size=32", config="tests/nano.py", steps=6))
    options = (
        "--config.distill={}",
        f"--config.distill.teacher={tmp_path / 'teacher'}",
        "--config.distill.teacher_dtype=float32",
        *CONSTANT,
    )
    once, twice = tmp_path / "once", tmp_path / "twice"
    output = finish(start(once, *options, config="tests/nano.py", steps=6))
    assert f"{tmp_path / 'teacher'}, step 6" in output and "from teacher" in output
    finish(start(twice, *options, config="tests/nano.py", steps=3))
    finish(start(twice, *options, "--allow-config-change", config="tests/nano.py", steps=6))
    last = [record for record in records(once) if record["kind"] == "train"][-1]
    assert last == [record for record in records(twice) if record["kind"] == "train"][-1]
    assert last["soft_weight"] == 0.5 and 0 < last["soft"] < 5 and last["teacher_loss/text"] == last["teacher_loss"]
    assert "from the teacher" in (once / "report.html").read_text()
    plain = tmp_path / "plain"
    finish(start(plain, *CONSTANT, config="tests/nano.py", steps=6))
    saved, taught = (folder / "checkpoints" / "6" for folder in (plain, once))
    assert sorted(path.name for path in saved.iterdir()) == sorted(path.name for path in taught.iterdir())
    arrays = [(folder / "state" / "_METADATA").read_text() for folder in (saved, taught)]  # names and shapes
    assert arrays[0] == arrays[1]  # the teacher is in no checkpoint


def test_a_run_that_goes_on_from_a_checkpoint_begins_where_that_teacher_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))
    run = nano(distill=DistillConfig(teacher=str(tmp_path / "before"), teacher_dtype="float32"))
    save_run(tmp_path / "before", run)
    train(dataclasses.replace(run, init=InitConfig(from_run=str(tmp_path / "before"))), tmp_path / "after")
    first, *later = (record["soft"] for record in metrics(tmp_path / "after") if record["kind"] == "train")
    assert abs(first) < 1e-5 and later[-1] > 1e-4  # the target that is given moves it away


def test_a_run_does_not_go_on_with_another_teacher_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=FAST_COMPILE))
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    run = nano(distill=DistillConfig(teacher=str(teacher), teacher_dtype="float32"))
    save_run(teacher, run)
    train(run, student)
    digest = Checkpoints(student / "checkpoints").metadata(run.steps)["teacher"]
    assert digest == identity(teacher)["digest"]
    (student / "evaluation.json").unlink()
    shutil.rmtree(teacher)
    save_run(teacher, dataclasses.replace(run, seed=5))
    with pytest.raises(
        UserError, match=rf"distill.teacher: found .*expected {digest}, from which checkpoint .*/{run.steps} learned"
    ):
        train(run, student)
    capsys.readouterr()
    train(run, student, allow_config_change=True)
    told = " ".join(capsys.readouterr().out.split())
    assert f"expected {digest}, from which checkpoint" in told and "It goes on with this one" in told


def test_a_teacher_is_the_checkpoint_that_was_the_newest(tmp_path: Path) -> None:
    save_run(tmp_path, nano())
    distill = as_of_now(DistillConfig(teacher=str(tmp_path)))
    before = identity(Path(distill.teacher))
    shutil.copytree(tmp_path / "checkpoints/0", tmp_path / "checkpoints/7")
    assert identity(Path(distill.teacher)) == before and as_of_now(distill) == distill
    assert Path(as_of_now(DistillConfig(teacher=str(tmp_path))).teacher).name == "7"


def test_targets_of_segments_are_not_asked_of_a_teacher_to_whom_the_place_in_the_row_matters(tmp_path: Path) -> None:
    save_run(tmp_path, micro(temperature_from="row"))
    digest = json.loads((tmp_path / "checkpoints/0/run/metadata").read_text())["tokenizer_digest"]
    load(micro(), tmp_path, digest)
    with pytest.raises(UserError, match=r"model.temperature_from is 'row' in the teacher"):
        load(micro(), tmp_path, digest, draws=4)


def load(run: RunConfig, teacher: Path, tokenizer: str, mesh: DeviceMesh | None = None, draws: int = 0) -> Any:
    mesh = mesh or DeviceMesh.alone()
    distill = DistillConfig(teacher=str(teacher), teacher_dtype="float32", draws=draws)
    return load_teacher(run, distill, mesh, abstract_state(run, Skeleton(run.model, mesh)), tokenizer)


def test_a_teacher_is_any_checkpoint_that_reads_the_same_batches(tmp_path: Path) -> None:
    state = save_run(tmp_path, micro(hidden_size=24, num_layers=8))
    digest = json.loads((tmp_path / "checkpoints/0/run/metadata").read_text())["tokenizer_digest"]
    for path in (tmp_path, tmp_path / "checkpoints" / "0"):
        found = load(micro(), path, digest)
        assert found.origin == f"{tmp_path}, step 0"
        for ours, theirs in zip(jax.tree.leaves(found.teacher.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("model", "words"), [
    ({"vocab_size": 512}, "model.vocab_size is 512 in the teacher and 300 in the student"),
    ({"vision": VISION}, "model.vision.image_size is 8 in the teacher and"),
])  # fmt: skip
def test_a_teacher_of_other_tokens_is_refused(model: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_run(tmp_path, micro(**model))
    digest = json.loads((tmp_path / "checkpoints/0/run/metadata").read_text())["tokenizer_digest"]
    with pytest.raises(UserError, match=words):
        load(micro(vocab_size=300), tmp_path, digest)


def test_another_tokenizer_a_wrong_path_and_a_mesh_that_does_not_divide_are_refused(tmp_path: Path) -> None:
    save_run(tmp_path, micro(num_heads=3, num_kv_heads=3))
    digest = json.loads((tmp_path / "checkpoints/0/run/metadata").read_text())["tokenizer_digest"]
    with pytest.raises(UserError, match="its tokens are those of tokenizer"):
        load(micro(), tmp_path, "another")
    with pytest.raises(UserError, match="which does not exist"):
        load(micro(), tmp_path / "nothing", digest)
    with pytest.raises(UserError, match=r"num_heads=3 cannot be split into 2 .* on the mesh tensor=2"):
        load(micro(), tmp_path, digest, DeviceMesh.of(jax.devices()[:2], {"tensor": 2}))


def test_a_teacher_that_does_not_fit_beside_the_student_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path, micro())
    digest = json.loads((tmp_path / "checkpoints/0/run/metadata").read_text())["tokenizer_digest"]
    state = abstract_state(micro(), Skeleton(micro().model))
    student = tree_bytes((state, state.params))
    pages = {"SC_PAGE_SIZE": 1}
    for room, fits in ((student + tree_bytes(state.params), True), (student + tree_bytes(state.params) - 1, False)):
        monkeypatch.setattr(memory.os, "sysconf", (pages | {"SC_PHYS_PAGES": room}).__getitem__)
        if fits:
            load(micro(), tmp_path, digest)
        else:
            with pytest.raises(
                UserError, match=r"and optimizer state, with the weights of the teacher .* or a smaller teacher"
            ):
                load(micro(), tmp_path, digest)


@pytest.mark.parametrize(("options", "words"), [
    ({"draws": 4, "divergence": "reverse"}, "distill.divergence: found 'reverse', expected 'forward' with draws"),
    ({"top_k": 4, "divergence": "jensen_shannon"}, "distill.divergence: found 'jensen_shannon'"),
    ({"top_k": 4, "draws": 4}, "distill.top_k: found 4 beside draws=4"),
    ({"top_k": 100_000}, "distill.top_k: found 100000, expected at most model.vocab_size"),
    ({"proposal": 0.5}, "distill.proposal: found 0.5, expected 1 without draws"),
    ({"proposal": 1.5, "draws": 4}, "distill.proposal: found 1.5, expected 0.1 to 1"),
    ({"proposal": 0.0, "draws": 4}, "distill.proposal: found 0.0, expected 0.1 to 1"),
    ({"source": "cache", "draws": 4}, "distill.cache: found nothing"),
    ({"cache": "c"}, "distill.cache: found 'c' with source='mesh', which reads none"),
    ({"draws": 65_536}, "distill.draws: found 65536, expected 65535 or less"),
    ({"source": "cache", "cache": "c"}, "distill.draws: found 0, as top_k is"),
    ({"temperature": 0.0}, "distill.temperature: found 0, expected more than 0"),
    ({"soft_weight": 1.5}, "distill.soft_weight: found 1.5, expected 0 to 1"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    plain = to_plain(micro()) | {"distill": {"teacher": "t", **options}}
    with pytest.raises(UserError, match=re.escape(words)):
        from_plain(RunConfig, plain)
