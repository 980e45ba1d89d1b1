"""`drover inspect --devices`: the whole step traced on devices that are not there, and bytes, FLOPs and traffic by hand."""

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from configs import behemoth, maverick_distill
from data.target_cache import Header
from data.target_writer import TargetWriter
from launch import cli
from model.config import ModelConfig
from sharding.config import MeshConfig
from sharding.errors import UserError
from tests.configs.regenerate import ROOT
from tests.data.target_work import digest, targets
from tests.trainer.saved_run import nano, save_run
from trainer import plan
from trainer.config import DistillConfig, RunConfig
from trainer.flops import flops_per_token, parameter_counts
from trainer.hf.config import read_model_config
from trainer.initialise import abstract_state
from trainer.memory import tree_bytes
from trainer.placement import place_run, place_student_and_teacher, planned_mesh
from trainer.plan import gathered_bytes, plan_run, show_plan, trace
from trainer.sections import resolve
from trainer.step import Skeleton, Teacher
from trainer.targets import abstract_batch
from trainer.teacher import known_model, teacher_skeleton

DEVICES = 4096
BEHEMOTH = resolve(behemoth.get_config(), {}, "behemoth").model
CACHED = resolve(maverick_distill.get_config(), {}, "maverick_distill")
assert CACHED.distill
ONLINE = dataclasses.replace(CACHED, distill=dataclasses.replace(CACHED.distill, source="mesh"))


def on(run: RunConfig, **sizes: int) -> RunConfig:
    return dataclasses.replace(run, mesh=MeshConfig(**sizes))


@pytest.fixture(scope="module")
def plans() -> dict[str, dict[str, Any]]:
    """Of the shipped config, with both sources of the teacher's targets."""
    return {"cache": plan_run(CACHED, DEVICES, BEHEMOTH), "mesh": plan_run(ONLINE, DEVICES, BEHEMOTH)}


def split_by_hand(model: ModelConfig, shapes: Any, mesh: dict[str, int], itemsize: int) -> int:
    """Bytes of one device: each weight over the axes that docs/MESH.md says, whole where that says nothing."""
    stage, tensor, expert = mesh.get("stage", 1), mesh.get("tensor", 1), mesh.get("expert", 1)
    of_experts = mesh.get("fsdp", 1) * mesh.get("context", 1)
    width, total = of_experts * expert, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = [step.key for step in path]
        by = stage if names[0] == "blocks" else 1
        if "experts" in names:
            by *= expert * of_experts * tensor
        elif names[-1] == "router":
            by *= width
        elif names[0] in ("embed", "lm_head") or names[-1] in ("q", "k", "v", "o", "gate", "up", "down"):
            by *= width * tensor
        elif names[0] == "projector":
            by *= width
        elif names[0] == "vision":  # as far as its sizes can be divided
            axes = (axes if isinstance(axes, tuple) else (axes,) for axes in leaf.sharding.spec if axes)
            by = math.prod(mesh[axis] for each in axes for axis in each)
        size = math.prod(leaf.shape)
        assert size % by == 0
        total += size // by * itemsize
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameter_counts(model).total
    return total


@pytest.mark.parametrize("source", ["cache", "mesh"])
def test_bytes_of_a_device_are_those_counted_leaf_by_leaf(source: str, plans: dict[str, dict[str, Any]]) -> None:
    found, mesh = plans[source]["bytes_per_device"], {"fsdp": 64, "expert": 16, "tensor": 4}
    place = planned_mesh(CACHED, DEVICES)
    student = abstract_state(CACHED, Skeleton(CACHED.model, place))
    weights = split_by_hand(CACHED.model, student.params, mesh, 4)
    expected = dict.fromkeys(found, 0) | {
        "weights": weights,
        "gradients": weights,
        "moments": 2 * weights + 4,
        "others": 12,
    }
    # A row for each 4 devices, whole on each of them.
    expected["batch"] = 8192 * 6 * 4 + 34 * (336 * 336 * 3 + 144 * 4)
    expected["targets"] = 8192 * (12 * 8 + 4 + 4 + 1 + 1 if source == "cache" else 8)
    expected["gathered"] = found["gathered"]
    if source == "mesh":
        assert ONLINE.distill
        skeleton = teacher_skeleton(ONLINE, ONLINE.distill, place, BEHEMOTH)
        expected["teacher"] = split_by_hand(BEHEMOTH, skeleton.abstract_weights[0], mesh, 2)
        # Four layers: attention, shared expert and the one expert that is here, a quarter of each; and four routers.
        D, F = BEHEMOTH.hidden_size, BEHEMOTH.expert_ffn_size
        layer = (2 * D * 128 * (128 + 8) + 2 * 3 * D * F) // 4 + D * 16
        expected["teacher_gathered"] = 4 * layer * 2
    assert found == expected | {"total": sum(expected.values())}


def test_what_the_student_gathers_for_a_super_block_is_counted_by_hand() -> None:
    model = CACHED.model
    D, attention = model.hidden_size, 2 * model.hidden_size * 128 * (40 + 8)
    dense, expert = 3 * D * model.dense_ffn_size, 3 * D * model.expert_ffn_size
    experts = 128 // 16 * expert
    gathered = (4 * attention + 2 * dense + 2 * (expert + experts)) // 4 * 2 + 2 * D * 128 * 4  # routers are exact
    assert gathered_bytes(Skeleton(model, planned_mesh(CACHED, DEVICES))) == gathered
    assert gathered_bytes(Skeleton(model)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [
    {"stage": 4, "data": 2, "fsdp": 16, "expert": 8, "context": 2, "tensor": 2},
    {"fsdp": 32, "expert": 16, "context": 2, "tensor": 4},
])  # fmt: skip
def test_the_step_is_traced_on_meshes_of_every_axis(sizes: dict[str, int]) -> None:
    run = on(ONLINE, **sizes)
    found = plan_run(run, DEVICES, BEHEMOTH)["bytes_per_device"]
    student = abstract_state(run, Skeleton(run.model, planned_mesh(run, DEVICES)))
    assert found["weights"] == split_by_hand(run.model, student.params, sizes, 4)
    rows = 1024 // (math.prod(sizes.values()) // sizes["context"] // sizes["tensor"])
    shares = rows * 8192 // sizes["context"] * 6 * 4
    assert found["batch"] == shares + rows * 34 * (336 * 336 * 3 + 144 * 4)
    assert found["targets"] == rows * 8192 // sizes["context"] * 8


def test_the_traced_step_gives_back_the_state_and_what_is_logged() -> None:
    run = small(source="mesh", draws=0)
    mesh = planned_mesh(run, 8)
    skeleton, of_teacher = Skeleton(run.model, mesh), teacher_skeleton(run, distill_of(run), mesh, teacher_of(run))
    state = abstract_state(run, skeleton)
    taught = Teacher(of_teacher, *of_teacher.abstract_weights)
    after, logged = trace(run, skeleton, state, abstract_batch(run, mesh), taught)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert {"loss", "soft", "teacher_loss", "grad_norm", "experts/load"} <= set(logged)


def distill_of(run: RunConfig) -> DistillConfig:
    assert run.distill
    return run.distill


def small(**distill: Any) -> RunConfig:
    """On 8 devices."""
    run = nano()
    options: dict[str, Any] = {"teacher": "nowhere", "draws": 4, **distill}
    return on(dataclasses.replace(run, distill=DistillConfig(**options)), fsdp=4, expert=2)


def teacher_of(run: RunConfig) -> ModelConfig:
    return dataclasses.replace(run.model, hidden_size=2 * run.model.hidden_size)


def test_a_planned_mesh_splits_as_one_of_devices_does() -> None:
    run = small(source="cache", cache="nowhere")
    abstract, real = planned_mesh(run, 8), place_run(run, jax.devices()[:8])
    assert abstract.sizes == real.sizes and abstract.place == real.place and abstract.count == real.count == 8
    found = plan_run(run, 8)["bytes_per_device"]
    state = abstract_state(run, Skeleton(run.model, real))
    assert found["weights"] == tree_bytes(state.params) and found["moments"] == tree_bytes(state.optimizer)
    assert found["batch"] + found["targets"] == tree_bytes(abstract_batch(run, real))


def test_a_teacher_in_int8_and_one_in_the_memory_of_the_host_are_planned() -> None:
    runs = [small(source="mesh", **kept) for kept in ({}, {"teacher_dtype": "int8"}, {"teacher_memory": "host"})]
    plain, int8, far = (plan_run(run, 8, teacher_of(run))["bytes_per_device"] for run in runs)
    skeleton = teacher_skeleton(runs[1], distill_of(runs[1]), planned_mesh(runs[1], 8), teacher_of(runs[1]))
    weights = jax.tree_util.tree_leaves_with_path(skeleton.abstract_weights[0])
    numbers = tree_bytes([leaf for _, leaf in weights if leaf.dtype == "int8"])
    scales = tree_bytes([leaf for path, leaf in weights if str(path[-1]) == ".scale"])
    assert numbers > scales > 0
    assert int8["teacher"] == plain["teacher"] - numbers + scales
    assert far["teacher"] == plain["teacher"] - 2 * numbers
    # Of 1 repeat; experts stay split over 2 devices, and all that is split over 4 is gathered.
    model = skeleton.config
    D, F, experts = model.hidden_size, model.expert_ffn_size, model.num_experts // 2
    attention = 2 * D * model.head_dim * (model.num_heads + model.num_kv_heads)
    layers = len(model.super_block())
    assert int8["teacher_gathered"] == far["teacher_gathered"] == 2 * layers * (attention + 3 * D * F * (experts + 1))


def test_a_step_that_cannot_be_traced_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small(source="cache", cache="nowhere")
    monkeypatch.setattr("trainer.targets.empty_targets", lambda *_: {})
    with pytest.raises(AssertionError):  # neither targets nor a teacher
        plan_run(run, 8)


def test_what_does_not_divide_is_refused_with_the_meshes_that_do() -> None:
    with pytest.raises(UserError) as error:
        plan_run(on(CACHED, fsdp=32, expert=8, tensor=16), DEVICES)
    assert "model.num_heads=40 cannot be split into 16 equal parts" in str(error.value)
    assert (
        "Meshes of 4096 devices that fit this run, the nearest first: fsdp=32, expert=8, context=2, tensor=8;"
        in str(error.value)
    )
    with pytest.raises(UserError, match="whose product does not make 4000 devices"):
        plan_run(CACHED, 4000)
    wide = on(ONLINE, fsdp=32, expert=32, tensor=4)
    with pytest.raises(
        UserError, match=r"model.num_experts=16 cannot be split into 32 .* on the mesh fsdp=32, expert=32"
    ):
        plan_run(wide, DEVICES, BEHEMOTH)


def test_a_cached_teacher_need_not_fit_the_mesh_but_has_to_speak_of_the_same_tokens() -> None:
    run = small(source="cache", cache="nowhere", draws=0, top_k=3)
    odd = dataclasses.replace(teacher_of(run), num_experts=3)
    found = plan_run(run, 8, odd)
    assert found["bytes_per_device"]["teacher"] == 0 and "The teacher's forward pass" in words(found)
    with pytest.raises(UserError, match=r"model\.vocab_size is 512 in the teacher"):
        plan_run(run, 8, dataclasses.replace(odd, vocab_size=512))
    lacking = [{"name": "small", "bytes": -2e9}, {"name": "large", "bytes": 3e9}]
    assert "ahead: none (small, which lacks 2.00 GB), 3.00 GB (large)." in words(found | {"room": lacking})
    text = words(found | {"flops": found["flops"] | {"ratio": None}})
    assert (
        "The teacher is not there" in text
        and "3 likeliest ids of a token take" in text
        and "teacher: weights" not in text
    )


def test_the_teacher_is_the_one_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face = ROOT / "tests" / "golden" / "text_maverick"
    assert known_model(str(hugging_face)) == read_model_config(hugging_face)
    run = small(source="mesh", teacher=str(tmp_path), draws=0)
    save_run(tmp_path, dataclasses.replace(run, model=teacher_of(run), distill=None))
    assert known_model(str(tmp_path)) == known_model(str(tmp_path / "checkpoints" / "0")) == teacher_of(run)
    monkeypatch.setattr(plan, "trace", lambda *_: None)
    skeleton = teacher_skeleton(run, distill_of(run), planned_mesh(run, 8), teacher_of(run))
    assert plan_run(run, 8)["bytes_per_device"]["teacher"] == tree_bytes(skeleton.abstract_weights)
    with pytest.raises(UserError, match=r"found 'nowhere', which does not exist\. To plan .* --teacher-config"):
        plan_run(small(source="mesh"), 8)


def test_what_the_student_writes_itself_is_told_to_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    run = small(source="mesh", draws=0, on_policy=0.5)
    found = plan_run(run, 8, teacher_of(run))
    model, rows = run.model, run.data.batch_size
    slots = sum(
        min(model.chunk_size, run.data.sequence_length) if kind.rope else run.data.sequence_length
        for kind in model.layer_kinds()
    )
    assert (
        found["rollout_bytes"]
        == rows * slots * 2 * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    )
    show_plan(found)
    assert "Not traced: the batches that the student writes itself" in " ".join(capsys.readouterr().out.split())


def test_flops_are_those_of_full_rows(plans: dict[str, dict[str, Any]]) -> None:
    flops, tokens = plans["mesh"]["flops"], 1024 * 8192
    student, teacher = (flops_per_token(model, 8192).forward for model in (CACHED.model, BEHEMOTH))
    assert flops["tokens"] == tokens and flops["student_step"] == pytest.approx(3 * student * tokens)
    assert flops["teacher_forward"] == pytest.approx(teacher * tokens)
    assert flops["ratio"] == pytest.approx(teacher / (3 * student)) and plans["cache"]["flops"] == flops


def test_the_traffic_of_the_cache(plans: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    cache = plans["cache"]["cache"]
    each, row = cache["bytes_per_token"], 8192 * cache["bytes_per_token"]
    assert 15 < each < 17 and not cache["measured"] and plans["mesh"]["cache"] is None
    assert cache["bytes_per_step"] == 1024 * row and cache["bytes_per_run"] == 50_000 * 1024 * row
    # Four devices have a row in common.
    assert [(h["devices"], h["bytes_per_step"]) for h in cache["hosts"]] == [(8, 2 * row), (4, row)]
    run = small(source="cache", cache=str(tmp_path))
    with TargetWriter(tmp_path, Header({}, "tokens", run.model.vocab_size, draws=4)) as writer:
        writer.add([digest(i) for i in range(20)], [targets(i, vocab=250) for i in range(20)])
        measured = writer.written.bytes_per_token
    found = plan._cache(run, distill_of(run), planned_mesh(run, 8))
    assert found["measured"] and found["bytes_per_token"] == measured and (found["draws"], found["top_k"]) == (4, 0)
    other = small(source="cache", cache=str(tmp_path), draws=5)
    with pytest.raises(UserError, match=r"distill\.draws: found 4, expected 5"):
        plan._cache(other, distill_of(other), planned_mesh(other, 8))


@pytest.mark.parametrize(("sizes", "hosts"), [
    ({"context": 4, "tensor": 2}, {8: 8, 4: 8}),  # all devices have the same rows
    ({"fsdp": 2, "tensor": 2, "context": 2}, {8: 8, 4: 4}),
    ({"fsdp": 8}, {8: 8, 4: 4}),
])  # fmt: skip
def test_a_host_reads_the_rows_of_its_devices_once(sizes: dict[str, int], hosts: dict[int, int]) -> None:
    run = on(small(source="cache", cache="nowhere"), **sizes)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, num_heads=4, num_kv_heads=2))
    cache = plan._cache(run, distill_of(run), planned_mesh(run, 8))
    row = run.data.sequence_length * cache["bytes_per_token"]
    assert {h["devices"]: h["bytes_per_step"] for h in cache["hosts"]} == {
        devices: pytest.approx(rows * row) for devices, rows in hosts.items()
    }


def words(found: dict[str, Any]) -> str:
    file = io.StringIO()
    show_plan(found, file)
    assert max(map(len, file.getvalue().splitlines())) <= 100
    return " ".join(file.getvalue().split())


def test_the_config_file_quotes_what_is_printed(plans: dict[str, dict[str, Any]]) -> None:
    quoted = " ".join((ROOT / "configs" / "maverick_distill.py").read_text().split())
    cached, online = words(plans["cache"]), words(plans["mesh"])
    both = plans["cache"]["bytes_per_device"], plans["mesh"]["bytes_per_device"]
    state = sum(both[0][name] for name in ("weights", "gradients", "moments")) / 1e9
    batch = (both[0]["batch"] + both[0]["targets"]) / 1e6
    assert f"{state:.2f} GB of weights, gradients and moments, {batch:.1f} MB of the batch and its targets" in quoted
    for text, patterns in (
        (cached, (r"gathered for a super-block of the student, bfloat16 ([\d.]+ GB)", r"together ([\d.]+ GB)",
                  r"ahead: ([\d.]+) GB \(H100", r", ([\d.]+) GB \(TPU v5p 95 GB\)", r"A step reads ([\d.]+ MB), ",
                  r"the run ([\d.]+ TB)")),
        (online, (r"teacher: weights, bfloat16 ([\d.]+ GB)", r"super-block of the teacher, bfloat16 ([\d.]+ GB)",
                  r"together ([\d.]+ GB)", r"FLOP, ([\d.]+ times as much)", r"in every step: ([\d.]+ %) of the run")),
    ):  # fmt: skip
        for pattern in patterns:
            found = re.search(pattern, text)
            assert found and found[1] in quoted, pattern
    assert "drover teach` pays that once: 250 ZFLOP for 50,000 steps" in cached and "2.5e23 FLOP" in quoted
    assert "12 draws of a token take 15.6 bytes (estimated, entropies of 2 nats in the mean)" in cached


def test_the_command_prints_the_plan_of_any_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("launch.environment.prepare", lambda verbose: None)  # it changes the process for good
    arguments = ["inspect", "--config", "tests/nano.py", "--devices", "4"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "4 devices: fsdp=4; 8 rows of 128 tokens a step." in text and "teacher" not in text
    told = " ".join(text.split())
    assert "of it beyond an equal share, copied: " in told and " along fsdp (blocks." in told
    monkeypatch.setattr(
        plan, "plan_run", lambda run, devices, teacher: [run.distill.teacher, devices, teacher.num_layers]
    )
    given = ("--config.distill={}", "--config.distill.teacher=nowhere", "--teacher-config", "tests/nano.py", "--json")
    assert cli.main([*arguments, *given]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == ["nowhere", 4, 2]


def test_a_teacher_on_devices_of_its_own_is_counted_there() -> None:
    run = small(source="devices", teacher_mesh=MeshConfig(fsdp=4))
    run = dataclasses.replace(run, mesh=MeshConfig(data=2, fsdp=2))
    found = plan_run(run, 8, teacher_of(run))
    ours, theirs = place_student_and_teacher(run, jax.devices())
    student = found["bytes_per_device"]
    assert student["weights"] == tree_bytes(abstract_state(run, Skeleton(run.model, ours)).params)
    assert student["teacher"] == student["teacher_gathered"] == 0
    tokens = 2 * run.data.sequence_length  # of a device, on either mesh
    assert student["targets"] == tokens * (4 * 8 + 9)
    own = found["teacher_devices"]
    skeleton = teacher_skeleton(run, distill_of(run), theirs, teacher_of(run), apart=True)
    assert own["count"] == 4 and own["bytes"]["teacher"] == tree_bytes(skeleton.abstract_weights)
    assert own["bytes"]["batch"] == student["batch"] + tokens * 8  # the keys of the draws
    assert own["bytes"]["targets"] == student["targets"]
    assert own["bytes"]["teacher_gathered"] == gathered_bytes(skeleton) > 0
    text = words(found)
    assert "8 devices, 4 of them the student's: data=2, fsdp=2" in text and "4 are the teacher's: fsdp=4" in text
    ratio = found["flops"]["ratio"]
    found["teacher_devices"]["count"] = 2
    assert f"on 2 devices of its own. They take {3 * ratio:.2f} times as long" in words(found)
    assert "in every step" not in text
    with pytest.raises(
        UserError, match=r"does not make 3 devices, those that distill.teacher_mesh .fsdp=4. leaves of 7"
    ):
        plan_run(run, 7, teacher_of(run))
