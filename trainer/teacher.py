"""The teacher of a run: another model's weights, on a mesh with their own shardings, frozen."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.storage import AS_THEY_ARE, Storage
from sharding.config import written
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from trainer.checkpoint import Checkpoints, locate
from trainer.config import DistillConfig, RunConfig
from trainer.hf.config import read_model_config
from trainer.hf.files import FileTensor, open_tensors
from trainer.hf.load import open_model
from trainer.initialise import check_same_tokenizer, check_tokenizer
from trainer.memory import check_memory, tree_bytes
from trainer.placement import cures, mesh_problems, of_teacher
from trainer.processes import leader_says
from trainer.quantise import in_int8, to_read
from trainer.step import Params, Skeleton, Teacher, TrainState

SAMPLES, SAMPLE_BYTES = 16, 512
"""Of each tensor, for the name of a teacher: so many pieces of so many bytes, evenly spread."""


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher and what a run says of it."""

    teacher: Teacher
    model: ModelConfig
    origin: str
    """Where the weights are from, for a line to the user."""


def identity(path: Path) -> dict[str, str]:
    """Names the teacher at a path, wherever that lies, without reading all of its weights.

    `digest` is of what was saved with a checkpoint (config, position in the data) and of the manifest of its arrays, or of
    config.json and the name, type, shape and samples (`SAMPLES`) of every tensor of a Hugging Face directory.

    Raises:
        UserError: nothing there, or files of weights that are missing or damaged.
    """
    digest = hashlib.blake2b(digest_size=16)
    if any(path.glob("*.safetensors")):
        digest.update((path / "config.json").read_bytes())
        for name, tensor in sorted(open_tensors(path).items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(_samples(tensor))
        return {"name": path.name, "digest": digest.hexdigest()}
    folder, step = locate(_existing(path))
    saved = Checkpoints(folder).metadata(step)
    digest.update(json.dumps(saved, sort_keys=True).encode())
    digest.update((folder / str(step) / "state" / "manifest.ocdbt").read_bytes())
    return {"name": f"{folder.parent.name}, step {step}", "digest": digest.hexdigest()}


def as_of_now(distill: DistillConfig) -> DistillConfig:
    """The same with the teacher's checkpoint in place of its run directory, which stands for the newest: another one may come
    while this run starts, and every process has to have the same. All have to ask.

    Raises:
        UserError: nothing there.
    """
    path = _existing(Path(distill.teacher).expanduser())
    if any(path.glob("*.safetensors")):
        return distill
    folder, step = locate(path)
    return dataclasses.replace(distill, teacher=str(folder / str(leader_says(step))))


def check_same_teacher(
    distill: DistillConfig, checkpoint: Path, saved: str | None, found: str | None, allowed: bool
) -> list[str]:
    """Refuses to go on from a checkpoint that learned from another teacher (`identity`), where both are known; where that is
    `allowed`, the line that tells of it."""
    if not saved or not found or saved == found:
        return []
    option, cure = "teacher", "Name the checkpoint of then (distill.teacher=RUN/checkpoints/STEP)"
    if distill.source == "cache":
        option, cure = "cache", "Name a cache that this teacher filled"
    differs = (
        f"distill.{option}: found {getattr(distill, option)!r}, whose teacher has the digest {found}; expected {saved}, from "
        f"which checkpoint {checkpoint} learned."
    )
    if allowed:
        return [f"{differs} It goes on with this one, by --allow-config-change."]
    raise UserError(f"{differs} {cure}, or give --allow-config-change to go on with this one.")


def _samples(tensor: FileTensor) -> bytes:
    """Pieces of a tensor's bytes from its first to its last; of a small one, all."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        if tensor.nbytes <= SAMPLES * SAMPLE_BYTES:
            return file.read(tensor.nbytes)
        pieces = []
        for i in range(SAMPLES):
            file.seek(tensor.offset + (tensor.nbytes - SAMPLE_BYTES) * i // (SAMPLES - 1))
            pieces.append(file.read(SAMPLE_BYTES))
        return b"".join(pieces)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(
            f"distill.teacher: found {str(path)!r}, which does not exist; expected a run directory, a checkpoint or a "
            "Hugging Face directory. Train a teacher first (configs/tiny_behemoth.py trains a small one)."
        )
    return path


def load_teacher(
    run: RunConfig, distill: DistillConfig, mesh: DeviceMesh, student: TrainState | None, tokenizer_digest: str
) -> LoadedTeacher:
    """The teacher that `distill` names, on the mesh. `student`: shapes of the state of the run that learns from it, if any.

    Raises:
        UserError: nothing there; another tokenizer, or one that is not known; a model whose tokens, tiles or windows of sound
            are not the student's, that the mesh does not divide, or for which there is no room.
    """
    path = _existing(Path(distill.teacher).expanduser())

    def prepared(model: ModelConfig, as_stored: Callable[[Params], Params]) -> tuple[Skeleton, Params]:
        """The teacher without its weights, and the shapes in which to read them."""
        skeleton = teacher_skeleton(run, distill, mesh, model, student is not None and distill.source == "devices")
        kept, read = skeleton.abstract_weights, skeleton.abstract_weights[0]
        beside: list[Any] = []  # what there is for a time beside what is kept
        if skeleton.storage != AS_THEY_ARE:
            beside += skeleton.one_super_block
        if skeleton.storage.int8:
            read = to_read(skeleton, as_stored)
            beside.append(max(jax.tree.leaves(read), key=tree_bytes))
        check_memory(student, mesh, (kept, beside))
        return skeleton, read

    if any(path.glob("*.safetensors")):
        found = open_model(path)
        if not found.tokenizer:
            raise UserError(
                f"distill.teacher: {path} has no tokenizer.json, expected that of the student's data ({tokenizer_digest}). Put "
                "the one that the model was trained with beside its weights."
            )
        check_same_tokenizer(f"{path}/tokenizer.json", found.tokenizer.digest, tokenizer_digest)
        skeleton, read = prepared(found.model, lambda _: found.abstract())
        params = in_int8(skeleton, found.weights_in_turn(read))
        return LoadedTeacher(Teacher(skeleton, params, {}), skeleton.config, str(path))
    folder, step = locate(path)
    checkpoints = Checkpoints(folder)
    if not check_tokenizer(checkpoints, step, tokenizer_digest):
        raise UserError(
            f"distill.teacher: checkpoint {folder / str(step)} names no tokenizer, expected that of the student's data "
            f"({tokenizer_digest}). It was imported from a directory without a tokenizer.json: put that file there, and "
            "`drover import` it again."
        )
    skeleton, read = prepared(checkpoints.run(step).model, lambda shapes: checkpoints.as_stored(step, shapes))
    biases = skeleton.abstract_weights[1]
    if skeleton.storage.int8:
        made = functools.partial(in_int8, skeleton)
        params, router_bias = checkpoints.restore_weights_in_turn(step, read, biases, made)
    else:
        params, router_bias = checkpoints.restore_weights(step, read, biases)
    if router_bias is None:  # an imported model has none
        router_bias = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), biases)
    teacher = Teacher(skeleton, params, router_bias)
    return LoadedTeacher(teacher, skeleton.config, f"{folder.parent}, step {step}")


def known_model(teacher: str) -> ModelConfig | None:
    """The model of the teacher that `distill.teacher` names, whose weights are not read; None if there is nothing."""
    path = Path(teacher).expanduser()
    if not path.exists():
        return None
    if any(path.glob("*.safetensors")):
        return read_model_config(path)
    folder, step = locate(path)
    return Checkpoints(folder).run(step).model


def teacher_skeleton(
    run: RunConfig, distill: DistillConfig, mesh: DeviceMesh, model: ModelConfig, apart: bool = False
) -> Skeleton:
    """The teacher without its weights, in the precision in which it computes, and as it is kept; `apart`: on its own devices.

    Raises:
        UserError: it cannot read the student's batches, or cannot be kept so on the mesh.
    """
    problems = list(differences(run.model, model))
    if distill.sparse and model.temperature_from == "row":
        problems.append(
            "model.temperature_from is 'row' in the teacher, so what it says of a segment depends on where in a row that "
            "stands; draws and top_k are of segments wherever they stand"
        )
    storage = Storage(int8=distill.teacher_dtype == "int8", host=distill.teacher_memory == "host")
    dtype = "bfloat16" if storage.int8 else distill.teacher_dtype
    model = dataclasses.replace(
        model,
        dtype=dtype,
        param_dtype=dtype,
        remat="none",
        expert_kernel=run.model.expert_kernel,
        capacity_factor=0.0,
    )
    placed = dataclasses.replace(of_teacher(run) if apart else run, model=model)
    local = mesh.count // jax.process_count() if apart else None
    misfits = mesh_problems(placed, mesh.sizes, local)
    problems += [f"{problem} on the mesh {written(mesh.sizes)}" for problem in misfits]
    problems += storage_problems(storage, mesh.sizes, mesh.platform)
    cure = f" distill.teacher_mesh: {cures(placed, mesh.count, mesh.sizes, local)}" if apart and misfits else ""
    check_can_teach(distill, problems, cure)
    return Skeleton(model, mesh, storage)


def storage_problems(storage: Storage, sizes: Mapping[str, int], platform: str) -> list[str]:
    """Why a teacher cannot be kept so on a mesh of these sizes."""
    if not storage.host:
        return []
    problems = []
    if sizes["stage"] > 1:
        problems.append(
            f"distill.teacher_memory='host' goes with mesh.stage=1, found {sizes['stage']}, where every device needs repeats "
            "that lie with the others"
        )
    if storage.int8 and platform == "tpu":
        problems.append(
            "distill.teacher_memory='host' goes with teacher_dtype='bfloat16' on a TPU, found 'int8', all of which its "
            "compiler copies to the devices at once"
        )
    return problems


def check_can_teach(distill: DistillConfig, problems: list[str], cure: str = "") -> None:
    """Refuses the teacher for these reasons, if there are any."""
    if problems:
        raise UserError(
            f"distill.teacher: {distill.teacher} cannot teach this run: {'; '.join(problems)}. A teacher may differ in depth, "
            "width, experts and the sizes of its encoders, but it reads the same tokens, tiles and windows of sound."
            + cure
        )


def differences(student: ModelConfig, teacher: ModelConfig) -> list[str]:
    """Why a teacher cannot read the student's batches, or speaks of other tokens."""
    found: list[str] = []

    def compare(name: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            found.append(f"model.{name} is {theirs} in the teacher and {ours} in the student")

    compare("vocab_size", student.vocab_size, teacher.vocab_size)
    for encoder, names in (
        ("vision", ("image_size", "tokens_per_tile")),
        ("audio", ("mel_bins", "window_frames", "tokens_per_window")),
    ):
        ours, theirs = getattr(student, encoder), getattr(teacher, encoder)
        if ours is not None and theirs is None:
            found.append(f"model.{encoder} is None in the teacher")
        elif ours is not None:
            for name in names:
                compare(f"{encoder}.{name}", getattr(ours, name), getattr(theirs, name))
    return found
