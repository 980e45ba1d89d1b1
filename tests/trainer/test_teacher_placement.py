"""Which devices are the teacher's own, and which sizes, options and models are refused."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from data.tokenizer import load_bytes
from sharding.config import MeshConfig
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from tests.trainer.saved_run import nano, save_run
from trainer import memory
from trainer.config import DistillConfig, RunConfig
from trainer.initialise import abstract_state
from trainer.memory import tree_bytes
from trainer.placement import place_student_and_teacher
from trainer.rundir import RunDirectory
from trainer.sections import from_plain, to_plain
from trainer.step import Skeleton
from trainer.teacher import load_teacher

OWN = DistillConfig(
    teacher="another run", source="devices", teacher_mesh=MeshConfig(fsdp=2), draws=5, block_vocabulary=7
)


def with_rows(run: RunConfig, rows: int) -> RunConfig:
    return dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=rows))


def own(teacher: MeshConfig, **mesh: int) -> RunConfig:
    """Of 24 rows and a width of 48, which many meshes divide."""
    run = with_rows(nano(distill=dataclasses.replace(OWN, teacher_mesh=teacher), mesh=MeshConfig(**mesh)), 24)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, hidden_size=48))


@dataclass(frozen=True)
class Device:
    """Of some process."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def devices(processes: int, each: int) -> list[Any]:
    """As a slice may number them: one of each process in turn."""
    return [Device(each * p + i, p) for i in range(each) for p in range(processes)]


def shape(mesh: DeviceMesh) -> dict[str, int]:
    return {name: size for name, size in mesh.sizes.items() if size > 1}


@pytest.mark.parametrize(("run", "student", "teacher"), [
    (own(MeshConfig(fsdp=2)), {"fsdp": 6}, {"fsdp": 2}),
    (own(MeshConfig(fsdp=1)), {"fsdp": 7}, {}),
    (own(MeshConfig(data=2, fsdp=1, tensor=2), data=2, fsdp=2), {"data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}),
    (own(MeshConfig(), data=2, fsdp=3), {"data": 2, "fsdp": 3}, {"fsdp": 2}),
])  # fmt: skip
def test_the_last_devices_are_the_teachers_and_one_mesh_takes_what_the_other_leaves(
    run: RunConfig, student: dict[str, int], teacher: dict[str, int]
) -> None:
    if 7 in student.values():
        run = dataclasses.replace(with_rows(run, 7), model=dataclasses.replace(run.model, hidden_size=49))
    ours, theirs = place_student_and_teacher(run, jax.devices())
    assert (shape(ours), shape(theirs)) == (student, teacher)
    assert ours.devices + theirs.devices == jax.devices()


def test_each_process_has_a_part_of_both_meshes() -> None:
    ours, theirs = place_student_and_teacher(own(MeshConfig(fsdp=2)), devices(2, 4))
    assert [device.id for device in ours.devices] == [0, 1, 2, 4, 5, 6]
    assert [device.id for device in theirs.devices] == [3, 7]


def test_without_devices_of_its_own_the_teacher_is_on_the_students_mesh() -> None:
    ours, theirs = place_student_and_teacher(nano(distill=DistillConfig(teacher="t")), jax.devices())
    assert ours is theirs and len(ours.devices) == 8
    assert place_student_and_teacher(nano(), jax.devices())[1].sizes == ours.sizes


@pytest.mark.parametrize(("run", "found", "words"), [
    (own(MeshConfig(fsdp=8)), devices(1, 8), "distill.teacher_mesh: found stage=1, data=1, fsdp=8, expert=1, context=1, "
     "tensor=1, which takes 8 of 8 devices and leaves 0 to the student; expected some for the teacher and the others for the "
     "student. The nearest that fit: fsdp=6 (2 for the student); fsdp=4 (4 for the student); "),
    (own(MeshConfig(fsdp=3)), devices(2, 4), "which takes 3 of 8 devices and leaves 5 to the student; expected as many of the "
     "4 devices of each of the 2 processes for the teacher and the others for the student. The nearest that fit: fsdp=4 (4 for "
     "the student); fsdp=2 (6 for the student)"),
    (own(MeshConfig(), fsdp=8), devices(1, 8), "mesh: found stage=1, data=1, fsdp=8, expert=1, context=1, tensor=1, which "
     "leaves 0 of 8 devices to the teacher (distill.teacher_mesh: stage=1, data=1, fsdp=-1"),
    (own(MeshConfig(tensor=2), fsdp=5), devices(1, 8), "mesh: found stage=1, data=1, fsdp=5, expert=1, context=1, tensor=1, "
     "which leaves 3 of 8 devices to the teacher (distill.teacher_mesh: stage=1, data=1, fsdp=-1, expert=1, context=1, tensor=2"
     "); expected some for the teacher and the others for the student. The nearest that fit: tensor=2 (6 for the student)"),
    (own(MeshConfig(fsdp=2), fsdp=4), devices(1, 8), "mesh: found stage=1, data=1, fsdp=4, expert=1, context=1, tensor=1, "
     "whose product does not make 6 devices, those that distill.teacher_mesh (fsdp=2) leaves of 8. Meshes of 6 devices that "
     "fit this run, the nearest first: fsdp=6; fsdp=3, tensor=2; "),
    (own(MeshConfig(fsdp=3)), devices(1, 8), "mesh: found fsdp=5: the 24 rows of each of the optimizer.accumulate "
     "micro-batches"),
    (own(MeshConfig(fsdp=2), context=2), devices(2, 4), "mesh: found fsdp=3, context=2: its 3 device(s) in each process cannot "
     "be split into groups of context=2 x tensor=1, and beside a teacher"),
    (own(MeshConfig(fsdp=1)), devices(1, 1), "which takes 1 of 1 devices and leaves 0 to the student; expected some for the "
     "teacher and the others for the student. None fits; take source='mesh'"),
    (own(MeshConfig(fsdp=2)), [*devices(1, 4), Device(9, 1), Device(10, 1)], "distill.source: found 4, 2 devices in the "
     "processes of this run, expected as many in each"),
])  # fmt: skip
def test_sizes_that_do_not_share_out_the_devices_are_refused_with_those_that_do(
    run: RunConfig, found: list[Any], words: str
) -> None:
    with pytest.raises(UserError) as error:
        place_student_and_teacher(run, found)
    assert words in str(error.value)


@pytest.mark.parametrize(("options", "mesh", "words"), [
    ({"draws": 0}, {}, "distill.draws: found 0, as top_k is; expected 1 or more of one of them: from devices of its own the "
     "teacher would have to send the whole distribution"),
    ({"teacher_mesh": None}, {}, "distill.teacher_mesh: found None, expected the sizes of the teacher's mesh"),
    ({"source": "mesh"}, {}, "distill.teacher_mesh: found sizes, expected None"),
    ({"teacher": ""}, {}, "distill.teacher: found nothing, expected a run directory"),
    ({"teacher_mesh": {"data": -1, "fsdp": 2}}, {}, "distill.teacher_mesh.data: found -1, expected a size: mesh.fsdp is -1, "
     "and takes all devices that the teacher leaves"),
    ({"teacher_mesh": {"fsdp": 0}}, {}, "distill.teacher_mesh.fsdp: found 0, expected 1 or more"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], mesh: dict[str, int], words: str
) -> None:
    plain = to_plain(nano(distill=OWN))
    from_plain(RunConfig, plain)
    plain = plain | {"distill": plain["distill"] | options, "mesh": plain["mesh"] | mesh}
    with pytest.raises(UserError, match=re.escape(words)):
        from_plain(RunConfig, plain)


def test_a_teacher_that_its_mesh_does_not_divide_is_refused_with_the_meshes_that_do(tmp_path: Path) -> None:
    run = nano()
    save_run(tmp_path, dataclasses.replace(run, model=dataclasses.replace(run.model, hidden_size=18)))
    digest = json.loads((tmp_path / "checkpoints/0/run/metadata").read_text())["tokenizer_digest"]
    run = dataclasses.replace(
        run, distill=dataclasses.replace(OWN, teacher=str(tmp_path), teacher_mesh=MeshConfig(fsdp=4))
    )
    assert run.distill
    ours, theirs = place_student_and_teacher(run, jax.devices())
    state = abstract_state(run, Skeleton(run.model, ours))
    with pytest.raises(UserError) as error:
        load_teacher(run, run.distill, theirs, state, digest)
    assert "model.hidden_size=18 cannot be split into 4 equal parts on the mesh fsdp=4" in str(error.value)
    assert "distill.teacher_mesh: Meshes of 4 devices that fit this run, the nearest first: fsdp=2, tensor=2;" in str(
        error.value
    )


def test_memory_is_that_of_the_teachers_devices_or_of_the_machine_that_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    run = nano(distill=OWN)
    ours, theirs = place_student_and_teacher(run, jax.devices()[:6])
    state, weights = abstract_state(run, Skeleton(run.model, ours)), Skeleton(run.model, theirs).abstract_weights
    needed: list[int] = []
    monkeypatch.setattr(memory, "check_room", lambda nbytes, *_: needed.append(nbytes))
    memory.check_memory(state, theirs, weights)
    assert needed.pop() == 4 * tree_bytes((state, state.params)) + 2 * tree_bytes(weights)
    monkeypatch.setattr(DeviceMesh, "local", property(lambda _: [Device(0, 0, "gpu")]))
    memory.check_memory(state, theirs, weights)
    assert needed.pop() == tree_bytes(weights)
    memory.check_memory(state, ours, weights)
    assert needed.pop() == tree_bytes((state, state.params, weights))


def test_a_run_may_go_on_with_another_mesh_of_the_teacher(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    directory.save(nano(distill=OWN), load_bytes())
    other = dataclasses.replace(OWN, teacher_mesh=MeshConfig(tensor=2))
    assert directory.differences(nano(distill=other, mesh=MeshConfig(data=2))) == []
    assert directory.differences(nano(distill=dataclasses.replace(other, draws=6))) == ["distill.draws: 5 -> 6"]
    (line,) = directory.differences(nano(distill=dataclasses.replace(OWN, source="mesh", teacher_mesh=None)))
    assert line == "distill.source: 'devices' -> 'mesh'"
