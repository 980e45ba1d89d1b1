"""A run on devices that are not there: its whole training step traced on their mesh, and what it takes of each.

Nothing is computed and no weight is made: `jax.eval_shape` goes through the step that `train` compiles, on an abstract mesh.
So what does not divide or fit together shows here, and not on a pod.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.table import Table
from rich.text import Text

from data.mixture import names
from data.target_cache import Header, describe
from data.target_estimate import MEAN_ENTROPY, bytes_per_token
from model.config import ModelConfig
from model.storage import AS_THEY_ARE
from sharding.config import written
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from trainer.asked import Asked
from trainer.config import DistillConfig, RunConfig
from trainer.distillation import objective_of
from trainer.flops import flops_per_token
from trainer.initialise import abstract_state
from trainer.inspect import DEVICES, number_table, terminal
from trainer.memory import device_bytes, tree_bytes
from trainer.objective import metrics
from trainer.placement import copies, copies_line, planned_student_and_teacher
from trainer.report_text import compact, percent
from trainer.step import Skeleton, Teacher, make_train_step
from trainer.targets import abstract_batch, check_recipe, header_of
from trainer.teacher import check_can_teach, differences, known_model, teacher_skeleton

HOSTS = (8, 4)
"""Devices of a host whose reading of the cache is shown: of GPUs, and of TPU v5p chips."""


def plan_run(run: RunConfig, devices: int, teacher: ModelConfig | None = None) -> dict[str, Any]:
    """Traces the run's step on so many devices; bytes and FLOPs as plain numbers.

    Args:
        run: checked options.
        devices: how many.
        teacher: the model of `distill.teacher`; read from there where it is None and there is something.

    Raises:
        UserError: the mesh does not divide the run or the teacher; a teacher is needed, and unknown.
    """
    (mesh, teacher_mesh), distill = planned_student_and_teacher(run, devices), run.distill
    apart = teacher_mesh is not mesh
    teacher = teacher or (known_model(distill.teacher) if distill and distill.teacher else None)
    taught = None
    if distill and distill.source != "cache":
        if teacher is None:
            raise UserError(
                f"distill.teacher: found {distill.teacher!r}, which does not exist. To plan for a teacher before there is one, "
                "give its config file as --teacher-config."
            )
        of_teacher = teacher_skeleton(run, distill, teacher_mesh, teacher, apart)
        taught = Teacher(of_teacher, *of_teacher.abstract_weights)
    elif distill and teacher:  # which spoke before, on other devices
        check_can_teach(distill, differences(run.model, teacher))
    skeleton = Skeleton(run.model, mesh)
    state, batch = abstract_state(run, skeleton), abstract_batch(run, mesh)
    beside = None if apart else taught
    trace(run, skeleton, state, batch, beside)
    targets = {name: array for name, array in batch.items() if name.startswith("soft_")}
    parts = {
        "weights": tree_bytes(state.params),
        "gradients": tree_bytes(state.params),
        "moments": tree_bytes(state.optimizer),
        "others": tree_bytes((state.router_bias, state.step, state.skipped, state.skipped_in_a_row)),
        "teacher": device_bytes((beside.params, beside.router_bias)) if beside else 0,
        "batch": tree_bytes(batch) - tree_bytes(targets),
        "targets": tree_bytes(targets),
        "gathered": gathered_bytes(skeleton),
        "teacher_gathered": gathered_bytes(beside.skeleton) if beside else 0,
    }
    own = _of_the_teacher(run, taught) if apart and taught else None
    data = run.data
    return {
        "devices": devices,
        "mesh": written(mesh.sizes),
        "rows": data.batch_size,
        "sequence_length": data.sequence_length,
        "steps": run.steps,
        "precision": {
            "student": run.model.param_dtype,
            "student_computes": run.model.dtype,
            "teacher": distill.teacher_dtype if distill else None,
        },
        "source": distill.source if distill else None,
        "bytes_per_device": parts | {"total": sum(parts.values())},
        "copies": copies(state),
        "teacher_devices": own and {"count": teacher_mesh.count, "mesh": written(teacher_mesh.sizes), "bytes": own},
        "room": [{"name": device.name, "bytes": device.memory_bytes - sum(parts.values())} for device in DEVICES],
        "flops": _flops(run, teacher),
        "cache": _cache(run, distill, mesh) if distill and distill.source == "cache" else None,
        "rollout_bytes": _rollout_bytes(run) if distill and distill.on_policy else 0,
    }


def _rollout_bytes(run: RunConfig) -> int:
    """Keys and values of a batch, of all devices together, while the student writes."""
    model, data = run.model, run.data
    return data.batch_size * model.cache_bytes(data.sequence_length, jnp.dtype(model.dtype).itemsize)


def _of_the_teacher(run: RunConfig, taught: Teacher) -> dict[str, int]:
    """What one of the teacher's own devices holds."""
    assert run.distill
    mesh = taught.skeleton.mesh
    batch = abstract_batch(run, mesh, asked=True)
    targets = Asked(run, run.distill, taught).shapes(batch)
    placed = {
        name: jax.ShapeDtypeStruct(targets[name].shape, targets[name].dtype, sharding=sharding)
        for name, sharding in mesh.batch(targets).items()
    }
    parts = {
        "teacher": device_bytes((taught.params, taught.router_bias)),
        "batch": tree_bytes(batch),
        "targets": tree_bytes(placed),
        "teacher_gathered": gathered_bytes(taught.skeleton),
    }
    return parts | {"total": sum(parts.values())}


def trace(run: RunConfig, skeleton: Skeleton, state: Any, batch: Any, teacher: Teacher | None) -> Any:
    """Shapes of the state and of the metrics after a step."""
    sources = names(run.data)
    step = make_train_step(run, skeleton, objective_of(run, len(sources)))

    def whole(state: Any, batch: Any, teacher: Teacher | None) -> Any:
        state, sums = step(state, batch, teacher)
        return state, metrics(sums, sources)

    return jax.eval_shape(whole, state, batch, teacher)


def gathered_bytes(skeleton: Skeleton) -> int:
    """Of the weights that a device gathers to compute one super-block, in the precision of the computation; of those that are
    kept otherwise than they are used, all matrices."""
    if skeleton.storage != AS_THEY_ARE:
        return tree_bytes(skeleton.one_super_block)
    place = skeleton.mesh.place

    def gathered(params: Any, router_bias: Any) -> list[jax.Array]:
        weights = nnx.state(skeleton.model(params, router_bias).blocks, nnx.Param)
        parts = jax.tree.map(lambda array: array[0], weights)
        pairs = zip(*map(jax.tree.leaves, (parts, place.whole(parts, skeleton.config.dtype))), strict=True)
        return [whole for part, whole in pairs if whole.shape != part.shape]

    mesh = skeleton.mesh
    on_all = mesh.on_all(gathered, (skeleton.shardings, mesh.everywhere), mesh.everywhere)
    return tree_bytes(jax.eval_shape(on_all, *skeleton.abstract_weights))


def _flops(run: RunConfig, teacher: ModelConfig | None) -> dict[str, Any]:
    """Of a step whose rows are full of text."""
    length = run.data.sequence_length
    tokens = run.data.batch_size * length
    student = flops_per_token(run.model, length).training_step(tokens, 0)
    forward = flops_per_token(teacher, length).forward_step(tokens, 0) if teacher else None
    return {
        "tokens": tokens,
        "student_step": student,
        "teacher_forward": forward,
        "ratio": forward / student if forward else None,
    }


def _cache(run: RunConfig, distill: DistillConfig, mesh: DeviceMesh) -> dict[str, Any]:
    """What is read from the cache: bytes of a token, of a step, and of the rows that a host has."""
    expected = header_of(run, distill, "", {})
    folder, tokens, found = Path(distill.cache).expanduser(), 0, 0
    if (folder / "header.json").exists():
        check_recipe(folder, Header.read(folder), distill)
        facts = describe(folder)
        tokens, found = facts["tokens"], facts["bytes of records"]
    each = found / tokens if tokens else bytes_per_token(expected.record_format, distill.proposal)
    rows, length = run.data.batch_size, run.data.sequence_length
    # Neighbours in the mesh have the same rows, or parts of them; a host reads what its devices have, whole.
    alike = mesh.count // mesh.place.row_parts
    of_a_row = length * each
    return {
        "draws": distill.draws,
        "top_k": distill.top_k,
        "bytes_per_token": each,
        "measured": bool(tokens),
        "bytes_per_step": rows * of_a_row,
        "bytes_per_run": run.steps * rows * of_a_row,
        "hosts": [
            {"devices": devices, "bytes_per_step": -(-devices // alike) * rows // mesh.place.row_parts * of_a_row}
            for devices in HOSTS
            if devices <= mesh.count
        ],
    }


# Showing


def show_plan(plan: Mapping[str, Any], file: IO[str] | None = None) -> None:
    """Prints what `plan_run` found, as `trainer.inspect.show` prints a model."""
    out, own = terminal(file), plan["teacher_devices"]
    students = f", {plan['devices'] - own['count']:,} of them the student's" if own else ""
    out.print()
    out.print(
        Text.assemble(
            (f"{plan['devices']:,} device{'s' if plan['devices'] > 1 else ''}{students}", "bold"),
            f": {plan['mesh']}; {plan['rows']:,} rows of {plan['sequence_length']:,} tokens a step. Its whole step was traced.",
        )
    )
    out.print()
    out.print(_table(plan, plan["bytes_per_device"]))
    if own:
        out.print()
        out.print(Text.assemble((f"{own['count']:,} are the teacher's", "bold"), f": {own['mesh']}"))
        out.print()
        out.print(_table(plan, own["bytes"]))
    for note in _notes(plan):
        out.print(Text(note, style="dim"))


def _table(plan: Mapping[str, Any], sizes: Mapping[str, int]) -> Table:
    student, teacher = plan["precision"]["student"], plan["precision"]["teacher"]
    labels = {
        "weights": f"student: weights, {student}",
        "gradients": "student: gradients",
        "moments": "student: two moments",
        "others": "student: counters, router biases",
        "teacher": f"teacher: weights, {teacher}",
        "batch": "batch",
        "targets": {"cache": "targets of the cache", "devices": "targets"}.get(
            plan["source"], "keys of the teacher's draws"
        ),
        "gathered": f"gathered for a super-block of the student, {plan['precision']['student_computes']}",
        "teacher_gathered": f"gathered for a super-block of the teacher, {teacher}",
        "total": "together",
    }
    table = number_table("a device holds", "bytes", "share")
    for name, label in labels.items():
        if sizes.get(name):
            style = "bold" if name == "total" else ""
            table.add_row(label, compact(sizes[name], "B"), percent(sizes[name] / sizes["total"]), style=style)
    return table


def _notes(plan: Mapping[str, Any]) -> Iterator[str]:
    yield f"Of the student's weights and moments, {copies_line(plan['copies'])}."
    room = ", ".join(
        f"{compact(left, 'B')} ({name})" if left > 0 else f"none ({name}, which lacks {compact(-left, 'B')})"
        for name, left in (device.values() for device in plan["room"])
    )
    where = ", on a device of the student's" if plan["teacher_devices"] else ""
    yield f"Room for activations, which come on top, and for what the compiler gathers ahead{where}: {room}. Powers of 1000."
    if plan["rollout_bytes"]:
        kept = compact(plan["rollout_bytes"], "B")
        yield (
            f"Not traced: the batches that the student writes itself (distill.on_policy). They take {kept} of keys and values, "
            "of all devices together if the compiler splits them, and as many steps of decoding as a row has tokens."
        )
    flops, cache = plan["flops"], plan["cache"]
    step = compact(flops["student_step"], "FLOP")
    yield f"A step of {flops['tokens']:,} tokens, rows full of text: {step} of the student, forward and backward."
    if flops["ratio"]:
        share = percent(flops["ratio"] / (1 + flops["ratio"]))
        once = compact(flops["teacher_forward"] * plan["steps"], "FLOP")
        forward = compact(flops["teacher_forward"], "FLOP")
        cost = f"The teacher's forward pass on it: {forward}, {flops['ratio']:.2f} times as much"
        if cache:
            yield f"{cost}. `drover teach` pays that once: {once} for {plan['steps']:,} steps."
        elif own := plan["teacher_devices"]:
            students = plan["devices"] - own["count"]
            yield (
                f"{cost}, on {own['count']:,} devices of its own. They take {flops['ratio'] * students / own['count']:.2f} "
                f"times as long for it as the student's {students:,} for their step, at the same utilisation."
            )
        else:
            yield f"{cost}, in every step: {share} of the run."
    elif plan["source"]:
        yield "The teacher is not there (distill.teacher): its config file, as --teacher-config, tells what it costs."
    if cache:
        kept = f"{cache['draws']} draws" if cache["draws"] else f"{cache['top_k']} likeliest ids"
        how = (
            "as the cache has them"
            if cache["measured"]
            else f"estimated, entropies of {MEAN_ENTROPY:.0f} nats in the mean"
        )
        a_step, a_run = compact(cache["bytes_per_step"], "B"), compact(cache["bytes_per_run"], "B")
        hosts = "".join(
            f", {compact(host['bytes_per_step'], 'B')} by a host with {host['devices']} devices"
            for host in cache["hosts"]
        )
        yield (
            f"The cache: {kept} of a token take {cache['bytes_per_token']:.1f} bytes ({how}). A step reads {a_step}{hosts}; "
            f"the run {a_run}."
        )
