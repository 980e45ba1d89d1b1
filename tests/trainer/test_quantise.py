"""A teacher in int8 or in the memory of the host: what it says, what it holds, what crosses between devices."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from qwix import QArray

from data.target_cache import describe
from model.config import ModelConfig
from model.storage import HOST, Storage, quantised
from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from tests.oracle_cases import FAST_COMPILE, random_batch, random_bias, random_params
from tests.sharding.collectives import instructions
from tests.sharding.sameness import LENGTH, ROWS, WIDE, placed
from tests.trainer.processes import finish, metrics, start
from tests.trainer.saved_run import micro, save_run
from trainer.checkpoint import Checkpoints
from trainer.config import CheckpointConfig, DistillConfig
from trainer.fingerprint import fingerprint
from trainer.hf.exporter import export_checkpoint
from trainer.memory import check_memory, tree_bytes
from trainer.quantise import in_int8, to_read
from trainer.step import Params, Skeleton
from trainer.teacher import load_teacher, storage_problems

INT8, FAR, BOTH = Storage(int8=True), Storage(host=True), Storage(int8=True, host=True)
MODEL = dataclasses.replace(
    WIDE,
    hidden_size=32,
    num_experts=16,
    num_layers=8,
    nope_layer_step=2,
    remat="none",
    router_bias_rate=0.1,
    dtype="float64",
    param_dtype="float64",
)
"""Four repeats of a super-block with a dense layer and one of experts."""
WIDER = dataclasses.replace(MODEL, hidden_size=128, expert_ffn_size=64, dense_ffn_size=64)


def dequantised(params: Any) -> Any:
    """Slow and obvious: every number times its scale, in float64, on the host."""

    def plain(node: Any) -> np.ndarray:
        if isinstance(node, QArray):
            return np.asarray(node.qvalue, np.float64) * np.asarray(node.scale)
        return np.asarray(node)

    return jax.tree.map(plain, params, is_leaf=lambda node: isinstance(node, QArray))


def kept(model: ModelConfig, mesh: DeviceMesh, storage: Storage) -> tuple[Skeleton, Params]:
    """Random weights as `storage` keeps them on a mesh."""
    skeleton = Skeleton(model, mesh, storage)
    shapes = to_read(skeleton, lambda read: read)
    values = jax.tree.map(lambda value: np.asarray(value, jnp.dtype(model.param_dtype)), random_params(model, 7))
    read = jax.tree.map(lambda value, shape: jax.device_put(value, shape.sharding), values, shapes)
    return skeleton, in_int8(skeleton, iter(jax.tree.leaves(read)))


def program(skeleton: Skeleton, batch: Any) -> Any:
    """(weights, router biases, batch) -> hidden states, not yet compiled."""
    mesh = skeleton.mesh

    def on_one(params: Params, biases: Params, batch: Any) -> jax.Array:
        return skeleton.model(params, biases)(batch).hidden_BSD

    inputs = (skeleton.shardings, mesh.everywhere, mesh.batch(batch))
    return jax.jit(mesh.on_all(on_one, inputs, mesh.batch(["tokens"])["tokens"]), compiler_options=FAST_COMPILE)


def said(model: ModelConfig, mesh: DeviceMesh, storage: Storage, params: Params | None = None) -> np.ndarray:
    """Hidden states of a batch."""
    with jax.enable_x64(True):
        skeleton, found = kept(model, mesh, storage)
        batch = random_batch(model, 6, rows=ROWS, length=LENGTH)
        run = program(skeleton, batch)
        biases = jax.device_put(random_bias(model, 7), mesh.everywhere)
        hidden_BSD = run(found if params is None else params, biases, placed(mesh, batch, 1))
        return np.asarray(hidden_BSD)[np.argsort(mesh.row_order(ROWS, 1))]


@functools.cache
def reference(int8: bool) -> np.ndarray:
    """Of the ordinary model, with weights that went through int8 or did not, on one device."""
    with jax.enable_x64(True):
        _, params = kept(MODEL, DeviceMesh.alone(), INT8 if int8 else Storage())
        return said(MODEL, DeviceMesh.alone(), Storage(), dequantised(params))


def on(**sizes: int) -> DeviceMesh:
    return DeviceMesh.of(jax.devices()[: int(np.prod(list(sizes.values())))], sizes)


@pytest.mark.parametrize(
    ("storage", "sizes"),
    [
        (INT8, {}),
        (FAR, {}),
        (INT8, {"fsdp": 2, "expert": 2, "tensor": 2}),
        (BOTH, {"fsdp": 2, "expert": 2, "tensor": 2}),
        (INT8, {"stage": 2, "fsdp": 2, "context": 2}),
    ],
    ids=str,
)
def test_it_says_what_the_ordinary_model_says_with_the_same_weights(storage: Storage, sizes: dict[str, int]) -> None:
    expected = reference(storage.int8)
    np.testing.assert_allclose(said(MODEL, on(**sizes), storage), expected, rtol=1e-9, atol=1e-11)


def test_every_number_is_off_by_at_most_half_a_scale() -> None:
    with jax.enable_x64(True):
        _, params = kept(MODEL, DeviceMesh.alone(), INT8)
        values = random_params(MODEL, 7)
        matrices = 0
        leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, QArray))
        for found, value in zip(leaves, jax.tree.leaves(values), strict=True):
            if not isinstance(found, QArray):
                np.testing.assert_array_equal(found, value)
                continue
            matrices += 1
            scale = np.broadcast_to(found.scale, value.shape)
            assert (np.abs(dequantised(found) - value) <= scale * (0.5 + 1e-12)).all()
            summed = tuple(i for i, size in enumerate(found.scale.shape) if size < value.shape[i])
            np.testing.assert_allclose(found.scale, np.abs(value).max(summed, keepdims=True) / 127.5, rtol=1e-6)
        experts = params["blocks"][1]["ffn"]["experts"]
        assert experts["down"].scale.shape == (4, 16, 1, 32) and experts["gate"].scale.shape == (4, 16, 1, 8)
        assert params["blocks"][0]["attn"]["o"].scale.shape == (4, 1, 1, 32)
        assert params["blocks"][1]["attn"]["q"].scale.shape == (4, 1, 16, 6)
        assert matrices == 10 + 7


# What is held, and what crosses


def bytes_on_a_device(params: Params, kind: str) -> int:
    blocks = [leaf for leaf in jax.tree.leaves(params["blocks"]) if leaf.sharding.memory_kind == kind]
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in blocks)


def test_a_device_holds_half_the_bytes_and_less_with_a_host() -> None:
    mesh, model = on(fsdp=2, expert=2), dataclasses.replace(WIDER, dtype="bfloat16", param_dtype="bfloat16")
    plain, int8, far, both = (kept(model, mesh, storage)[1] for storage in (Storage(), INT8, FAR, BOTH))
    whole = bytes_on_a_device(plain, "device")
    assert 0.5 < bytes_on_a_device(int8, "device") / whole < 0.56
    assert bytes_on_a_device(int8, HOST) == 0
    assert bytes_on_a_device(far, "device") < 0.05 * whole and bytes_on_a_device(far, HOST) > 0.95 * whole
    assert bytes_on_a_device(both, "device") < 0.1 * whole and bytes_on_a_device(both, HOST) < 0.5 * whole


def compiled(model: ModelConfig, mesh: DeviceMesh, storage: Storage) -> Any:
    """The forward pass for a batch, compiled from shapes."""
    skeleton = Skeleton(model, mesh, storage)
    batch = random_batch(model, 6, rows=ROWS, length=LENGTH)
    shapes = {
        name: jax.ShapeDtypeStruct(batch[name].shape, batch[name].dtype, sharding=sharding)
        for name, sharding in mesh.batch(batch).items()
    }
    return program(skeleton, batch).lower(*skeleton.abstract_weights, shapes).compile()


def gathered(program: str) -> dict[str, int]:
    """Numbers of all results of all-gathers, by type."""
    counts: dict[str, int] = {}
    for kind, shapes in instructions(program):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes) if kind == "all-gather" else ():
            counts[dtype] = counts.get(dtype, 0) + int(np.prod([int(size) for size in dims.split(",") if size]))
    return counts


def test_devices_pass_on_numbers_of_8_bits() -> None:
    model = dataclasses.replace(WIDER, dtype="float32", param_dtype="float32")
    plain, int8 = (gathered(compiled(model, on(fsdp=4), storage).as_text()) for storage in (Storage(), INT8))
    skeleton = Skeleton(model, on(fsdp=4), INT8)
    matrices = sum(leaf.size for leaf in skeleton.one_super_block)
    leaves = jax.tree.leaves(skeleton.abstract_weights[0], is_leaf=lambda node: isinstance(node, QArray))
    scales = [leaf.scale for leaf in leaves if isinstance(leaf, QArray)]
    split = sum(scale.size // len(scale) for scale in scales if not scale.sharding.is_fully_replicated)
    assert int8["s8"] == matrices and "s8" not in plain  # those of one super-block, inside the loop
    assert plain["f32"] - int8["f32"] == matrices - split


@pytest.mark.parametrize("storage", [INT8, BOTH], ids=str)
def test_matrices_of_one_super_block_at_a_time_are_dequantised(storage: Storage) -> None:
    mesh, model = on(fsdp=2, expert=2), dataclasses.replace(WIDER, dtype="float32", param_dtype="float32")
    few, many = (
        compiled(dataclasses.replace(model, num_layers=layers), mesh, storage).memory_analysis().temp_size_in_bytes
        for layers in (8, 32)
    )
    assert many - few < 0.1 * tree_bytes(Skeleton(model, mesh).one_super_block)


def moved(jaxpr: Any, times: int = 1) -> Iterator[tuple[int, int]]:
    """(numbers, how often) of every transfer to the device in a program and the loops in it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "device_put":
            (before,), (after,) = equation.invars, equation.outvars
            if before.aval.memory_space != after.aval.memory_space:
                yield after.aval.size, times
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from moved(inner, times * equation.params.get("length", 1))


def test_matrices_of_one_super_block_at_a_time_come_from_the_host() -> None:
    model = dataclasses.replace(MODEL, dtype="float32", param_dtype="float32")
    skeleton = Skeleton(model, DeviceMesh.alone(), BOTH)
    batch = random_batch(MODEL, 6, rows=ROWS, length=LENGTH)

    def run(params: Params, biases: Params, batch: Any) -> jax.Array:
        return skeleton.model(params, biases)(batch).hidden_BSD

    transfers = list(moved(jax.make_jaxpr(run)(*skeleton.abstract_weights, batch).jaxpr))
    assert sorted(transfers) == sorted((leaf.size, 4) for leaf in skeleton.one_super_block)


# Names


def test_a_name_is_the_same_on_any_mesh_and_in_any_memory() -> None:
    rng = np.random.default_rng(0)
    values = {"a": rng.standard_normal((4, 8, 6)).astype(jnp.bfloat16), "b": rng.standard_normal(8, np.float32)}
    names = set()
    for sizes, memory in (({}, None), ({}, HOST), ({"fsdp": 8}, HOST), ({"stage": 2, "fsdp": 2, "tensor": 2}, None)):
        mesh = on(**sizes)
        homes = {"a": mesh.split([("stage",), ("fsdp",), ("tensor",)]), "b": mesh.everywhere}
        homes["a"] = homes["a"].with_memory_kind(memory or "device")
        names.add(fingerprint(jax.device_put(values, homes), mesh))
    assert len(names) == 1
    small = {"a": quantised(jnp.asarray(values["a"]), (4, 1, 6)), "b": jnp.asarray(values["b"])}
    assert fingerprint(small, DeviceMesh.alone()) not in names


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", pytest.param("float64", marks=pytest.mark.slow)])
def test_every_number_and_its_place_count(dtype: str) -> None:
    mesh, rng = on(fsdp=8), np.random.default_rng(0)
    with jax.enable_x64(True):
        weights = {"a": np.asarray(rng.integers(-100, 100, (3, 8, 1)), jnp.dtype(dtype)), "b": np.asarray(1.5)}
        home = jax.NamedSharding(mesh.mesh, jax.P(None, "fsdp"))

        def name(**changed: Any) -> str:
            given = weights | changed
            return fingerprint({"a": jax.device_put(given["a"], home), "b": jnp.asarray(given["b"])}, mesh)

        names = {
            name(),
            name(b=np.asarray(1.25)),
            name(a=np.roll(weights["a"], 1, 1)),
            name(a=weights["a"].swapaxes(0, 2)),
            name(a=weights["a"].view(f"uint{8 * weights['a'].dtype.itemsize}")),
        }
        for place in np.ndindex(3, 8, 1):
            changed = weights["a"].copy()
            changed[place] = -changed[place] or 1
            names.add(name(a=changed))
    assert len(names) == 5 + 3 * 8


# From where teachers are read


def load(teacher: Path, digest: str, *kept: str, **sizes: int) -> Any:
    """`kept`: its dtype and memory; int8 and device."""
    dtype, memory = (*kept, *("int8", "device")[len(kept) :])
    distill = DistillConfig(teacher=str(teacher), teacher_dtype=dtype, teacher_memory=memory)  # pyright: ignore
    return load_teacher(RUN, distill, on(**sizes), None, digest)


RUN = micro(num_layers=4, router_bias_rate=0.1)
RUN = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, batch_size=4))


def assert_in_int8(found: Params, values: Any) -> None:
    """The matrices of the layers are `values` by qwix, bit for bit, and all else is in bfloat16."""
    matrices = 0
    leaves = jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, QArray))
    for leaf, value in zip(leaves, jax.tree.leaves(values), strict=True):
        if isinstance(leaf, QArray):
            expected = quantised(jnp.asarray(value, jnp.float32), leaf.scale.shape)
            np.testing.assert_array_equal(leaf.qvalue, expected.qvalue)
            np.testing.assert_array_equal(leaf.scale, expected.scale)
            matrices += 1
        else:
            np.testing.assert_array_equal(leaf, jnp.asarray(value, jnp.bfloat16))
    assert matrices == 2 * 10


@pytest.mark.parametrize(("memory", "sizes"), [
    ("device", {}),
    ("host", {"fsdp": 2, "expert": 2}),
    ("device", {"stage": 2, "tensor": 2}),
])  # fmt: skip
def test_a_checkpoint_becomes_int8_from_the_precision_that_it_has(
    memory: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    state = save_run(tmp_path, RUN)
    biases = jax.tree.map(lambda leaf: leaf + 0.5, random_bias(RUN.model, 0))
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    metadata = checkpoints.metadata(0)
    checkpoints.save(dataclasses.replace(state, step=jnp.asarray(1), router_bias=biases), metadata)
    checkpoints.close()
    found = load(tmp_path, metadata["tokenizer_digest"], "int8", memory, **sizes)
    assert_in_int8(found.teacher.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, found.teacher.router_bias, biases)
    assert found.model.dtype == "bfloat16"


def test_a_hugging_face_directory_becomes_int8(tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, router_bias_rate=0.0))
    state = save_run(tmp_path / "run", run)
    export_checkpoint(tmp_path / "run", tmp_path / "hf", None, 10**9, lambda _: None)
    digest = Checkpoints(tmp_path / "run" / "checkpoints").metadata(0)["tokenizer_digest"]
    assert_in_int8(load(tmp_path / "hf", digest, fsdp=2).teacher.params, state.params)
    far = load(tmp_path / "hf", digest, "float32", "host").teacher.params
    jax.tree.map(np.testing.assert_array_equal, far, state.params)


def test_a_teacher_on_the_host_and_stages_are_refused_together(tmp_path: Path) -> None:
    save_run(tmp_path, RUN)
    digest = Checkpoints(tmp_path / "checkpoints").metadata(0)["tokenizer_digest"]
    with pytest.raises(UserError, match=r"distill.teacher_memory='host' goes with mesh.stage=1, found 2"):
        load(tmp_path, digest, "int8", "host", stage=2)


def test_int8_stays_out_of_the_host_of_a_tpu() -> None:
    alone = DeviceMesh.alone().sizes
    (problem,) = storage_problems(BOTH, alone, "tpu")
    assert "goes with teacher_dtype='bfloat16' on a TPU, found 'int8'" in problem
    assert not storage_problems(BOTH, alone, "gpu") and not storage_problems(FAR, alone, "tpu")
    assert not storage_problems(INT8, alone, "tpu")


@pytest.mark.parametrize(("room", "host", "storage", "words"), [
    (10, 99, Storage(), "the weights of the teacher .* need 20.0 GiB, found 10.0 GiB on a chip.*teacher_dtype=int8"),
    (13, 99, INT8, None),
    (10, 99, INT8, "need 12.5 GiB, found 10.0 GiB on a chip"),
    (3, 20, FAR, None),
    (2, 20, FAR, "need 2.5 GiB, found 2.0 GiB on a chip"),
    (3, 19, FAR, "the weights of the teacher .* in the memory of the host need 20.0 GiB, found 19.0 GiB on the host"),
])  # fmt: skip
def test_a_teacher_without_room_is_refused(
    room: int, host: int, storage: Storage, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 repeats of a matrix of 1.25 G numbers, and one of them as it is computed with."""
    monkeypatch.setattr("trainer.memory._of_host", lambda: host * 2**30)
    here = DeviceMesh.alone().everywhere
    home = here.with_memory_kind(HOST if storage.host else "device")
    matrix = jax.ShapeDtypeStruct((8, 5 * 2**28), jnp.dtype("int8" if storage.int8 else "bfloat16"), sharding=home)
    beside = [jax.ShapeDtypeStruct((5 * 2**28,), jnp.bfloat16, sharding=here)] if storage != Storage() else []
    chip = SimpleNamespace(platform="tpu", device_kind="a chip", memory_stats=lambda: {"bytes_limit": room * 2**30})
    mesh: Any = SimpleNamespace(devices=[chip], local=[chip])
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        check_memory(None, mesh, (matrix, beside))


@pytest.mark.slow
def test_runs_learn_from_it_and_remember_which_it_was(tmp_path: Path) -> None:
    nano: dict[str, Any] = {"config": "tests/nano.py", "steps": 6}
    finish(start(tmp_path / "teacher", "--config.model.hidden_size=32", **nano))
    given = ("--config.distill={}", f"--config.distill.teacher={tmp_path / 'teacher'}", "--config.distill.draws=4")
    last, names = {}, {}
    for name, *options in (
        ("bfloat16",),
        ("int8", "--config.distill.teacher_dtype=int8"),
        ("both", "--config.distill.teacher_dtype=int8", "--config.distill.teacher_memory=host"),
    ):
        finish(start(tmp_path / name, *given, *options, **nano))
        last[name] = [record for record in metrics(tmp_path / name) if record["kind"] == "train"][-1]
        cache = tmp_path / f"cache_{name}"
        finish(start(cache, *given, *options, command="teach", folder="--out", **nano))
        names[name] = describe(cache)["teacher"]["fingerprint"]
    assert last["int8"]["loss"] == pytest.approx(last["both"]["loss"], rel=1e-3)
    assert last["int8"]["teacher_loss"] == pytest.approx(last["bfloat16"]["teacher_loss"], rel=1e-2)
    assert last["int8"]["teacher_loss"] != last["bfloat16"]["teacher_loss"]
    assert names["int8"] == names["both"] != names["bfloat16"]
