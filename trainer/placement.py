"""A run on its devices: the mesh that the config asks for, checked against the model and the batch."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from rich.filesize import decimal

from sharding.config import AXES, REST, ROW_AXES, MeshConfig, distance, meshes, written
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from trainer.config import RunConfig
from trainer.memory import tree_bytes
from trainer.step import TrainState, path_of

SUGGESTED = 4
"""Meshes that a refusal names."""
COUNTS = 16
"""Numbers of devices, the nearest to what was asked for, among which a refusal looks for them."""
NAMED = 3
"""Arrays that are named of those that devices have copies of."""


def place_run(run: RunConfig, devices: Sequence[Any]) -> DeviceMesh:
    """The mesh of a run on these devices.

    Raises:
        UserError: its product is not their number, or it does not divide what it splits; names the nearest that do.
    """
    sizes = _sizes(run, len(devices))
    return DeviceMesh.of(devices, sizes, **_options(run, sizes))


def planned_mesh(run: RunConfig, devices: int) -> DeviceMesh:
    """The mesh of a run on so many devices that are not there; raises as `place_run` does."""
    sizes = _sizes(run, devices)
    return DeviceMesh.planned(sizes, **_options(run, sizes))


def place_student_and_teacher(run: RunConfig, devices: Sequence[Any]) -> tuple[DeviceMesh, DeviceMesh]:
    """The meshes of the run and of its teacher, which is the same one unless `distill.source` is "devices".

    Then of the devices of each process the last ones are the teacher's, and each process has rows of its own: what the
    teacher says of them stays in the process.

    Raises:
        UserError: the devices cannot be shared out so, or see `place_run`; names the nearest meshes that fit.
    """
    if not _apart(run):
        mesh = place_run(run, devices)
        return mesh, mesh
    by_process = [[d for d in devices if d.process_index == i] for i in sorted({d.process_index for d in devices})]
    each = len(by_process[0])
    if any(len(local) != each for local in by_process):
        raise UserError(
            f"distill.source: found {', '.join(str(len(local)) for local in by_process)} devices in the processes of this "
            "run, expected as many in each, of which the teacher gets its own. Give all processes as many devices, or take "
            "source='mesh'."
        )
    students, teachers = _shared_out(run, len(by_process), each)
    first = math.prod(students.values()) // len(by_process)
    ours = [device for local in by_process for device in local[:first]]
    theirs = [device for local in by_process for device in local[first:]]
    return (
        DeviceMesh.of(ours, students, in_order=True, **_options(run, students)),
        DeviceMesh.of(theirs, teachers, in_order=True, **_options(of_teacher(run), teachers)),
    )


def planned_student_and_teacher(run: RunConfig, devices: int) -> tuple[DeviceMesh, DeviceMesh]:
    """The same on so many devices that are not there, of one process."""
    if not _apart(run):
        mesh = planned_mesh(run, devices)
        return mesh, mesh
    students, teachers = _shared_out(run, 1, devices)
    return (
        DeviceMesh.planned(students, **_options(run, students)),
        DeviceMesh.planned(teachers, **_options(of_teacher(run), teachers)),
    )


def _apart(run: RunConfig) -> bool:
    return run.distill is not None and run.distill.source == "devices"


def of_teacher(run: RunConfig) -> RunConfig:
    """A run with the mesh of the teacher's own devices."""
    assert run.distill and run.distill.teacher_mesh
    return dataclasses.replace(run, mesh=run.distill.teacher_mesh)


def _shared_out(run: RunConfig, processes: int, each: int) -> tuple[dict[str, int], dict[str, int]]:
    """The checked sizes of the student's mesh and those of the teacher's, on so many devices of each process."""
    teacher, devices = of_teacher(run).mesh, processes * each
    count = devices - _product(run.mesh) if teacher.rest else _product(teacher)
    sizes = teacher.sizes(count) if count in range(processes, devices, processes) else None
    if sizes is None:
        raise UserError(_wrong_count(run, teacher, processes, each))
    left = f", those that distill.teacher_mesh ({written(sizes)}) leaves of {devices}"
    return _sizes(run, devices - count, left, each - count // processes), sizes


def _wrong_count(run: RunConfig, teachers: MeshConfig, processes: int, each: int) -> str:
    """Refuses a teacher's mesh that does not take some of each process's devices and leave some to the student."""
    devices = processes * each
    if teachers.rest:
        count = devices - _product(run.mesh)
        found = (
            f"mesh: found {_written_all(run.mesh)}, which leaves {max(count, 0)} of {devices} devices to the teacher "
            f"(distill.teacher_mesh: {_written_all(teachers)})"
        )
    else:
        count = _product(teachers)
        found = (
            f"distill.teacher_mesh: found {_written_all(teachers)}, which takes {count} of {devices} devices and leaves "
            f"{max(devices - count, 0)} to the student"
        )
    rule = f"as many of the {each} devices of each of the {processes} processes" if processes > 1 else "some"
    wanted = _wanted(teachers, count)
    counts = sorted(range(processes, devices, processes), key=lambda n: abs(math.log2(n / math.prod(wanted.values()))))
    fitting = (
        sizes
        for count in counts[:COUNTS]
        if any(not mesh_problems(run, ours, (devices - count) // processes) for ours in meshes(devices - count))
        for sizes in meshes(count)
        if run.data.batch_size // run.optimizer.accumulate % math.prod(sizes[name] for name in ROW_AXES) == 0
    )
    nearest = [
        f"{written(sizes)} ({devices - math.prod(sizes.values())} for the student)"
        for sizes in _nearest(fitting, wanted)
    ]
    cure = f"The nearest that fit: {'; '.join(nearest)}" if nearest else "None fits; take source='mesh'"
    return f"{found}; expected {rule} for the teacher and the others for the student. {cure}."


def _sizes(run: RunConfig, devices: int, which: str = "", local: int | None = None) -> dict[str, int]:
    """The checked size of each axis; `which`: more about the devices, in words; `local`: see `mesh_problems`."""
    sizes = run.mesh.sizes(devices)
    if sizes is None:
        wanted = _wanted(run.mesh, devices)
        found = f"found {_written_all(run.mesh)}, whose product does not make {devices} devices{which}"
    else:
        problems = mesh_problems(run, sizes, local)
        if not problems:
            return sizes
        wanted, found = sizes, f"found {written(sizes)}: {'; '.join(problems)}"
    raise UserError(f"mesh: {found}. {cures(run, devices, wanted, local)}")


def _options(run: RunConfig, sizes: dict[str, int]) -> dict[str, Any]:
    """What a `Place` knows of a run."""
    return {
        "expert_buffer": run.mesh.expert_buffer,
        "stage_batches": run.mesh.stage_batches,
        "straddle": run.data.row_parts % sizes["context"] > 0,
    }


def _written_all(mesh: MeshConfig) -> str:
    return ", ".join(f"{name}={getattr(mesh, name)}" for name in AXES)


def _fixed(mesh: MeshConfig) -> dict[str, int]:
    return {name: size for name in AXES if (size := getattr(mesh, name)) != REST}


def _product(mesh: MeshConfig) -> int:
    """Of the sizes that are given."""
    return math.prod(_fixed(mesh).values())


def _wanted(mesh: MeshConfig, devices: int) -> dict[str, int]:
    """The sizes that are given, and for -1 what they leave, whether or not that makes the devices."""
    return dict.fromkeys(AXES, max(1, devices // _product(mesh))) | _fixed(mesh)


def mesh_problems(run: RunConfig, sizes: dict[str, int], local: int | None = None) -> list[str]:
    """What in the run a mesh does not divide. `local`: its devices in each process, where each needs rows of its own."""
    model, tensor, context = run.model, sizes["tensor"], sizes["context"]
    micro_batch = run.data.batch_size // run.optimizer.accumulate
    rows = f"the {micro_batch} rows of each of the optimizer.accumulate micro-batches of data.batch_size"
    kinds = [kind.moe for kind in model.layer_kinds()]
    experts = any(kinds)
    splits = {"hidden_size": sizes["fsdp"] * sizes["expert"] * context}
    splits |= dict.fromkeys(("num_heads", "num_kv_heads", "vocab_size"), tensor)
    splits |= {"num_experts": sizes["expert"], "expert_ffn_size": tensor} if experts else {}
    splits |= {} if all(kinds) else {"dense_ffn_size": tensor}
    parts = math.prod(sizes[name] for name in ROW_AXES)
    checks = [(micro_batch, parts, f"{rows}={run.data.batch_size}")]
    if sizes["stage"] > 1:
        block = len(model.super_block())
        repeats = model.num_layers // block
        blocks = f"the {repeats} super-block(s) of {block} layer(s) of model.num_layers={model.num_layers}"
        checks.append((repeats, sizes["stage"], blocks))
    if micro_batch % parts == 0:
        here = f"the {micro_batch // parts} rows that a device has of a micro-batch"
        checks.append((micro_batch // parts, run.mesh.stage_batches, f"{here} (mesh.stage_batches)"))
    if context > 1:  # twice, for a balanced ring
        checks.append((run.data.sequence_length, 2 * context, f"data.sequence_length={run.data.sequence_length}"))
    checks += [(getattr(model, name), by, f"model.{name}={getattr(model, name)}") for name, by in splits.items()]
    found = [f"{what} cannot be split into {by} equal parts" for size, by, what in checks if size % by]
    if not experts and sizes["expert"] > 1:
        found.append("the model has no experts to split, use fsdp")
    if local and local % (context * tensor):
        found.append(
            f"its {local} device(s) in each process cannot be split into groups of context={context} x tensor={tensor}, and "
            "beside a teacher on devices of its own each process needs whole rows (distill.source)"
        )
    return found


def _nearest(found: Iterable[dict[str, int]], wanted: dict[str, int]) -> list[dict[str, int]]:
    return sorted(found, key=lambda sizes: distance(sizes, wanted))[:SUGGESTED]


def cures(run: RunConfig, devices: int, wanted: dict[str, int], local: int | None = None) -> str:
    """The meshes of so many devices that fit a run and are nearest to what was wanted, for a refusal."""
    fitting = _nearest((sizes for sizes in meshes(devices) if not mesh_problems(run, sizes, local)), wanted)
    if fitting:
        nearest = "; ".join(written(sizes) for sizes in fitting)
        return f"Meshes of {devices} devices that fit this run, the nearest first: {nearest}."
    micro_batches = run.optimizer.accumulate
    rows = math.lcm(run.data.batch_size, devices * micro_batches)
    return (
        f"No mesh of {devices} devices fits this run. Take data.batch_size={rows}, so that their number divides the rows of "
        "a micro-batch, or fewer devices (CUDA_VISIBLE_DEVICES on GPUs)."
    )


def memory_line(state: TrainState) -> str:
    """What weights and optimizer state take of each device, and what of that is copied."""
    return f"weights and optimizer state {decimal(tree_bytes(state))} a device, {copies_line(copies(state))}"


def copies(tree: Any) -> list[dict[str, Any]]:
    """What a device holds of a tree beyond an equal share of it, by the mesh axes along which devices hold the same.

    An array that is split over some axes is copied along the others: of c copies, all but 1 / c of each is beyond the share.
    `tree`: shapes with their shardings; a weight counts together with its moments. The largest first, in bytes.
    """
    found: dict[tuple[str, ...], Counter[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
        taken = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
        axes = tuple(axis for axis in AXES if mesh.shape[axis] > 1 and axis not in taken)
        if axes:
            part = tree_bytes(leaf)
            keys = [key for key in path if isinstance(key, jax.tree_util.DictKey)]
            name = path_of(keys) if keys else str(path[-1]).lstrip(".")
            beyond = part - part // math.prod(mesh.shape[axis] for axis in axes)
            found.setdefault(axes, Counter())[name] += beyond
    groups = (
        {"axes": list(axes), "bytes": names.total(), "arrays": [name for name, _ in names.most_common()]}
        for axes, names in found.items()
    )
    return sorted(groups, key=lambda group: -group["bytes"])


def copies_line(found: Sequence[Mapping[str, Any]]) -> str:
    """What `copies` found, with the names of the largest arrays."""
    if not found:
        return "none of it copied"

    def arrays(names: Sequence[str]) -> str:
        more = len(names) - NAMED
        return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")

    groups = (
        f"{decimal(group['bytes'])} along {' x '.join(group['axes'])} ({arrays(group['arrays'])})" for group in found
    )
    return f"{decimal(sum(group['bytes'] for group in found))} of it beyond an equal share, copied: {'; '.join(groups)}"
