"""What a student writes for its teacher: token by token as a slow loop would, marked, scored, and the same again."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.config import DataConfig
from model.config import ModelConfig
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from tests import oracle
from tests.oracle_cases import (
    AUDIO,
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
from tests.trainer.saved_run import micro
from trainer import objective
from trainer.config import DistillConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from trainer.distillation import distillation_objective
from trainer.objective import SAMPLED, extras_for, next_token_objective
from trainer.optimizer import adamw
from trainer.rollout import Rollout, to_write, written
from trainer.sampling import Sampling
from trainer.sections import from_plain, to_plain
from trainer.step import Skeleton, Teacher, TrainState, loss_and_gradient, make_train_step

FLOAT64 = {"dtype": "float64", "param_dtype": "float64"}
STUDENT = dataclasses.replace(TINY, vision=VISION, audio=AUDIO, router_bias_rate=0.1, **FLOAT64)
TEACHER = dataclasses.replace(TINY, num_layers=2, moe_layer_step=2, nope_layer_step=2, hidden_size=20, **FLOAT64)
PLAIN = dataclasses.replace(TINY, num_layers=2, moe_layer_step=2, nope_layer_step=2, **FLOAT64)
ENDS = np.array([1, 3, 7, 11, 15], np.int32)
TEMPERATURE = 1.3
Array = Any


def data(config: ModelConfig, seed: int, **sizes: int) -> dict[str, Array]:
    """A batch as packing makes them: what an image or a sound stands for is no target, and no weight has a target of 0."""
    batch = random_batch(config, seed, **sizes)
    for name in ("image_positions", "audio_positions"):
        for row, places in enumerate(batch.get(name, [])):
            seen = places[places > 0]
            batch["loss_weights"][row, seen - 1] = 0
    batch["targets"][batch["loss_weights"] == 0] = 0
    return batch


def documents(batch: dict[str, Array]) -> list[tuple[int, Array]]:
    """(row, places) of each."""
    segments = batch["segment_ids"]
    return [(b, np.flatnonzero(row == g)) for b, row in enumerate(segments) for g in range(1, row.max() + 1)]


# What is written


@pytest.mark.parametrize("prompt", [0.0, 0.3, 0.5, 0.99])
def test_of_each_document_the_targets_behind_the_prompt_are_written(prompt: float) -> None:
    batch = data(dataclasses.replace(TINY, vision=VISION), 5, rows=6)
    found = np.asarray(jax.jit(functools.partial(to_write, prompt=prompt))(batch))
    expected = np.zeros_like(found)
    for row, places in documents(batch):
        targets = [place for place in places if batch["loss_weights"][row, place] > 0]
        expected[row, targets[int(prompt * len(targets)) :]] = True
    np.testing.assert_array_equal(found, expected)
    assert found.any() and (prompt == 0 or (batch["loss_weights"] > 0)[~found].any())


def slowly(params: Any, bias: Any, batch: dict[str, Array], sampled: Array, key: jax.Array, rows: Array) -> Any:
    """`written` with a whole forward pass for every token, of documents that are still whole."""
    skeleton, given = Skeleton(STUDENT), {name: jnp.asarray(array) for name, array in batch.items()}

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def logits(params: Any, bias: Any, tokens: Array) -> jax.Array:
        model = skeleton.model(params, bias)
        return model.logits(model({**given, "tokens": tokens}).hidden_BSD)

    out = {name: array.copy() for name, array in batch.items()} | {SAMPLED: np.zeros_like(sampled)}
    for place in range(batch["tokens"].shape[1]):
        z = np.asarray(logits(params, bias, out["tokens"]))[:, place] / TEMPERATURE
        for row in np.flatnonzero(sampled[:, place]):
            rest = batch["segment_ids"][row] == batch["segment_ids"][row, place]
            rest[: place + 1] = False
            if not out["segment_ids"][row, place] or out["loss_weights"][row, place] == 0:
                continue  # the document has ended
            own = jax.random.fold_in(jax.random.fold_in(key, int(rows[row])), place)
            token = np.argmax(z[row] + jax.random.gumbel(own, z[row].shape, z.dtype))
            out["targets"][row, place] = out["tokens"][row, place + 1] = token
            out[SAMPLED][row, place] = True
            if token in ENDS:
                out["targets"][row, rest] = out["loss_weights"][row, rest] = 0
                rest[place + 1] = False
                for name in ("segment_ids", "positions", "source_ids"):
                    out[name][row, rest] = 0
    return out


def test_the_student_writes_what_it_would_by_reading_everything_again_for_each_token() -> None:
    """Several documents a row, pictures, sound, chunks, experts with biases; documents that end early."""
    batch, rows = data(STUDENT, 8, rows=6), np.array([2, 0, 3, 5, 1, 4])
    with jax.enable_x64(True):
        params, bias = (oracle.as_float64(tree) for tree in (random_params(STUDENT, 8), random_bias(STUDENT, 8)))
        sampled, key, skeleton = np.asarray(to_write(batch, 0.3)), jax.random.key(4), Skeleton(STUDENT)

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def run(params: Any, bias: Any, batch: Any) -> Any:
            sampling = Sampling(key, jnp.float64(TEMPERATURE), None)
            model = skeleton.model(params, bias)
            return written(model, batch, jnp.asarray(sampled), sampling, ENDS, jnp.asarray(rows), DeviceMesh.alone())

        found = jax.device_get(run(params, bias, batch))
        expected = slowly(params, bias, batch, sampled, key, rows)
    real = expected["segment_ids"] > 0
    for name, array in expected.items():
        if name == "tokens":  # of padding they mean nothing
            np.testing.assert_array_equal(found[name][real], array[real])
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    ended = (batch["segment_ids"] > 0) & ~real
    assert ended.any() and found[SAMPLED].sum() > 20  # this seed shows both
    assert np.mean((found["targets"] != batch["targets"])[found[SAMPLED]]) > 0.5
    untouched = ~found[SAMPLED] & real & (expected["loss_weights"] > 0)
    np.testing.assert_array_equal(found["targets"][untouched], batch["targets"][untouched])
    kept = real & ~np.pad(found[SAMPLED], ((0, 0), (1, 0)))[:, :-1]
    np.testing.assert_array_equal(found["tokens"][kept], batch["tokens"][kept])
    np.testing.assert_array_equal(found["loss_weights"][real & found[SAMPLED]], batch["loss_weights"][found[SAMPLED]])


def run_of(model: ModelConfig, distill: DistillConfig, **options: Any) -> RunConfig:
    batch = DataConfig(sequence_length=LENGTH, batch_size=ROWS, tokenizer="bytes")
    return RunConfig(**{"model": model, "data": batch, "distill": distill, "steps": 200, **options})


OWN = DistillConfig(teacher="another run", on_policy=1.0, rollout_prompt=0.25, divergence="reverse", block_vocabulary=7)


def rolled(mesh: DeviceMesh, model: ModelConfig, seed: int = 0) -> list[dict[str, Array]]:
    """A batch as the student writes it at steps 5, 6 and 5 on a mesh, rows in the batch's own order."""
    run = run_of(model, OWN, seed=seed, optimizer=OptimizerConfig(accumulate=2))
    with jax.enable_x64(True):
        skeleton = Skeleton(model, mesh)
        batch = placed(mesh, random_batch(model, 6, rows=ROWS, length=LENGTH), 2)
        params = jax.device_put(oracle.as_float64(random_params(model, 6)), skeleton.shardings)
        bias = jax.device_put(random_bias(model, 6), mesh.everywhere)
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, params, bias, {}, zero, zero)
        rollout = Rollout(run, OWN, mesh, ENDS.tolist())
        shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in batch.items()}
        rollout.compile(state, shapes)
        found = [rollout(state, batch, step) for step in (5, 6, 5)]
        wanted, shapes = mesh.batch(found[0]), rollout.shapes(shapes)
        for name, array in found[0].items():
            assert array.sharding.is_equivalent_to(wanted[name], array.ndim)
            assert (array.shape, array.dtype) == (shapes[name].shape, shapes[name].dtype)
        back = np.argsort(mesh.row_order(ROWS, 2))
        return [{name: np.asarray(array)[back] for name, array in one.items()} for one in found]


TEXT = dataclasses.replace(CASES[next(iter(CASES))][0], num_layers=4, audio=None, vision=None, remat="none", **FLOAT64)


@functools.cache
def alone() -> list[dict[str, Array]]:
    return rolled(DeviceMesh.alone(), TEXT)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"stage": 2, "context": 2, "expert": 2}])
def test_a_mesh_writes_the_same(sizes: dict[str, int]) -> None:
    found = rolled(DeviceMesh.of(jax.devices()[:DEVICES], sizes), TEXT)
    jax.tree.map(np.testing.assert_array_equal, found, alone())


def test_what_is_written_depends_on_the_seed_and_the_step_alone() -> None:
    first, later, again = alone()
    jax.tree.map(np.testing.assert_array_equal, again, first)
    for other in (later, rolled(DeviceMesh.alone(), TEXT, seed=1)[0]):
        own = other[SAMPLED] & first[SAMPLED]
        assert np.mean(other["targets"][own] != first["targets"][own]) > 0.5


def test_the_share_of_batches_is_as_asked_and_the_others_are_left_alone() -> None:
    distill = dataclasses.replace(OWN, on_policy=0.3)
    model = dataclasses.replace(TEXT, dtype="float32", param_dtype="float32")
    rollout = Rollout(run_of(model, distill), distill, DeviceMesh.alone(), ())
    chosen = [rollout.writes(step) for step in range(2000)]
    assert abs(np.mean(chosen) - 0.3) < 0.03
    batch = {"tokens": jnp.ones((ROWS, LENGTH), jnp.int32)}
    state: Any = None
    found = rollout(state, batch, chosen.index(False))
    assert found["tokens"] is batch["tokens"] and not found[SAMPLED].any() and found[SAMPLED].shape == (ROWS, LENGTH)


# What is learned from it


def marked(seed: int) -> dict[str, Array]:
    """A batch some of whose targets count as written by the student."""
    batch = data(PLAIN, seed)
    return batch | {SAMPLED: np.asarray(to_write(batch, 0.4))}


@pytest.mark.parametrize("divergence", ["reverse", pytest.param("jensen_shannon", marks=pytest.mark.slow)])
def test_the_loss_is_the_divergence_alone_on_what_the_student_wrote(divergence: Any) -> None:
    distill = dataclasses.replace(OWN, divergence=divergence, soft_weight=0.3, adapt="confidence", temperature=0.8)
    batch = marked(3)
    with jax.enable_x64(True):
        students, teachers = Skeleton(PLAIN), Skeleton(TEACHER)
    plain = next_token_objective(COEFFICIENTS, SOURCES)
    shipped = distillation_objective(COEFFICIENTS, distill, SOURCES)
    targets, own = batch["targets"].reshape(-1), batch[SAMPLED].reshape(-1)
    weights = batch["loss_weights"].reshape(-1).astype(np.float64)

    def logits(skeleton: Skeleton, params: Any) -> jax.Array:
        model = skeleton.model(params, {})
        hidden = model(batch).hidden_BSD
        return hidden.reshape(-1, hidden.shape[-1]) @ model.head()

    def reference(params: Any, teacher: Any) -> Any:
        unmarked = {name: array for name, array in batch.items() if name != SAMPLED}
        router = plain(students.model(params, {}), unmarked, extras_for(unmarked, 1))[0]
        z_teacher, z_student = logits(teachers, teacher), logits(students, params)
        p, q = (jax.nn.log_softmax(z / 0.8) for z in (z_teacher, z_student))
        m = jnp.log((jnp.exp(p) + jnp.exp(q)) / 2)
        soft = {
            "reverse": jnp.sum(jnp.exp(q) * (q - p), 1),
            "jensen_shannon": jnp.sum(jnp.exp(p) * (p - m) + jnp.exp(q) * (q - m), 1) / 2,
        }[divergence] * 0.8**2
        log_p, log_q = jax.nn.log_softmax(z_teacher), jax.nn.log_softmax(z_student)
        hard = -log_q[jnp.arange(len(targets)), targets]
        sure = 1 + jnp.sum(jnp.exp(log_p) * log_p, 1) / np.log(PLAIN.vocab_size)
        w = 0.3 * jax.lax.stop_gradient(sure)
        each = jnp.where(own, soft, (1 - w) * hard + w * soft)
        loss = router + jnp.sum(weights * (each - hard)) / weights.sum()
        return loss, {"soft": soft, "loss": hard, "teacher_loss": -log_p[jnp.arange(len(targets)), targets]}

    with jax.enable_x64(True):
        params, teacher = (oracle.as_float64(random_params(model, 3)) for model in (PLAIN, TEACHER))

        @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
        def both(params: Any, teacher: Any, batch: Any) -> Any:
            frozen = Teacher(teachers, teacher, {})
            found = loss_and_gradient(students, shipped, params, {}, batch, 1, 0.0, frozen)
            return found, jax.value_and_grad(reference, has_aux=True)(params, teacher)

        (loss, sums, gradient), ((expected, facts), expected_gradient) = both(params, teacher, batch)
        facts, told = jax.device_get((facts, objective.metrics(sums, [f"source{i}" for i in range(SOURCES)])))
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12 * np.abs(theirs).max())
    given = weights * ~own
    for name, values in facts.items():
        np.testing.assert_allclose(told[f"sampled/{name}"], np.sum(weights * own * values) / np.sum(weights * own))
        np.testing.assert_allclose(told[name], np.sum(given * values) / np.sum(given))
    np.testing.assert_allclose(told[SAMPLED], np.sum(weights * own) / np.sum(weights))
    assert told["sampled/soft_weight"] == 1 and told["soft_weight"] < 0.3
    np.testing.assert_allclose(sum(told[f"targets/source{i}"] for i in range(SOURCES)), given.sum())


def test_a_student_comes_closer_to_its_teacher_on_what_it_writes() -> None:
    model = dataclasses.replace(PLAIN, num_layers=1, moe_layer_step=0, dtype="float32", param_dtype="float32")
    rate = OptimizerConfig(peak_lr=0.02, schedule="constant", warmup_steps=1, weight_decay=0.0)
    run, mesh, steps = run_of(model, OWN, optimizer=rate), DeviceMesh.alone(), 40
    skeleton, teacher = Skeleton(model), Teacher(Skeleton(model), random_params(model, 1), {})
    params = random_params(model, 2)
    zero = (jnp.zeros((), jnp.int32) for _ in range(3))
    state = TrainState(next(zero), params, {}, adamw(rate).init(params), next(zero), next(zero))
    batch = {name: jnp.asarray(array) for name, array in data(model, 3, rows=ROWS, length=LENGTH).items()}
    rollout = Rollout(run, OWN, mesh, ())
    rollout.compile(state, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch))
    step = jax.jit(
        make_train_step(run, skeleton, distillation_objective(ObjectiveConfig(), OWN, SOURCES)),
        compiler_options=FAST_COMPILE,
    )
    found = []
    for n in range(steps):
        state, sums = step(state, rollout(state, batch, n), teacher)
        found.append(float(sums["sampled/soft"] / sums[SAMPLED]))
    assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5]), found


# Whole runs


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(tmp_path: Path) -> None:
    finish(start(tmp_path / "teacher", "--config.model.hidden_size=32", config="tests/nano.py", steps=6))
    options = (
        "--config.distill={}",
        f"--config.distill.teacher={tmp_path / 'teacher'}",
        "--config.distill.divergence=jensen_shannon",
        "--config.distill.on_policy=0.6",
        "--config.optimizer.schedule=constant",
        "--config.optimizer.warmup_steps=1",
    )
    once, twice = tmp_path / "once", tmp_path / "twice"
    finish(start(once, *options, config="tests/nano.py", steps=6))
    finish(start(twice, *options, config="tests/nano.py", steps=3))
    finish(start(twice, *options, "--allow-config-change", config="tests/nano.py", steps=6))
    whole, parts = ([r for r in metrics(folder) if r["kind"] == "train"] for folder in (once, twice))
    assert [r["step"] for r in whole] == [1, 2, 3, 4, 5, 6]
    assert whole == parts
    wrote = [r["step"] for r in whole if r[SAMPLED]]
    chosen = [s for s in range(1, 7) if np.random.default_rng([0, s]).random() < 0.6]
    assert wrote == chosen and min(wrote) <= 3 < max(wrote)
    for record in whole:
        assert ("sampled/soft" in record) == (record["step"] in wrote) and record[SAMPLED] < 0.6
        assert record["loss"] > 0 and 0 <= record["soft"] < 1


@pytest.mark.parametrize(("options", "words"), [
    ({"source": "cache", "cache": "c", "draws": 4}, "distill.on_policy: found 0.5, expected 0 with source='cache'"),
    ({"draws": 4}, "distill.on_policy: found 0.5, expected 0 with draws or top_k"),
    ({"top_k": 4}, "distill.on_policy: found 0.5, expected 0 with draws or top_k"),
    ({"on_policy": 1.5}, "distill.on_policy: found 1.5, expected 0 to 1"),
    ({"rollout_temperature": 0.0}, "distill.rollout_temperature: found 0, expected more than 0"),
    ({"rollout_prompt": 1.0}, "distill.rollout_prompt: found 1, expected less"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    plain = to_plain(micro()) | {"distill": {"teacher": "t", "on_policy": 0.5, **options}}
    with pytest.raises(UserError, match=re.escape(words)):
        from_plain(RunConfig, plain)


def test_positions_of_the_row_are_refused() -> None:
    plain = to_plain(micro(temperature_from="row")) | {"distill": {"teacher": "t", "on_policy": 0.5}}
    with pytest.raises(UserError, match=r"on_policy: found 0\.5, expected 0 with model.temperature_from='row'"):
        from_plain(RunConfig, plain)
