"""Meshes of a run: sizes, refusals with the nearest mesh that fits, bytes on each device."""

import dataclasses
from typing import Any

import jax
import pytest
from rich.filesize import decimal

from data.config import DataConfig
from sharding.config import MeshConfig, meshes
from sharding.errors import UserError
from tests.oracle_cases import VISION
from tests.sharding.sameness import WIDE
from trainer.config import RunConfig
from trainer.initialise import abstract_state
from trainer.memory import tree_bytes
from trainer.placement import copies, memory_line, mesh_problems, place_run
from trainer.sections import from_plain, to_plain
from trainer.step import Skeleton


def run_on(model: Any = WIDE, rows: int = 16, length: int = 512, **mesh: int) -> RunConfig:
    data = DataConfig(batch_size=rows, sequence_length=length)
    return RunConfig(model=model, data=data, mesh=MeshConfig(**mesh))


def placed(run: RunConfig, devices: int = 8) -> dict[str, int]:
    """Axes of more than one device."""
    return {name: size for name, size in place_run(run, jax.devices()[:devices]).sizes.items() if size > 1}


def test_an_axis_takes_the_devices_that_the_others_leave() -> None:
    assert placed(run_on()) == {"fsdp": 8}
    assert placed(run_on(data=2, expert=2)) == {"data": 2, "fsdp": 2, "expert": 2}
    assert placed(run_on(data=-1, fsdp=4)) == {"data": 2, "fsdp": 4}
    assert placed(run_on(context=2, tensor=2)) == {"fsdp": 2, "context": 2, "tensor": 2}
    assert placed(run_on(), devices=1) == {}


ALIKE = dataclasses.replace(WIDE, num_layers=6, moe_layer_step=1, nope_layer_step=0)
"""All layers are alike."""
SEVEN_HEADS = dataclasses.replace(WIDE, num_heads=7, num_kv_heads=7)


@pytest.mark.parametrize(("run", "words"), [
    (run_on(data=3), "found stage=1, data=3, fsdp=-1, expert=1, context=1, tensor=1, whose product does not make 8 "
     "devices. Meshes of 8 devices that fit this run, the nearest first: data=4, fsdp=2"),
    (run_on(fsdp=4), "found stage=1, data=1, fsdp=4, expert=1, context=1, tensor=1, whose product does not make 8 "
     "devices"),
    (run_on(dataclasses.replace(WIDE, num_experts=6), expert=4),
     "found fsdp=2, expert=4: model.num_experts=6 cannot be split into 4 equal parts. Meshes of 8 devices that fit this "
     "run, the nearest first: "),
    (run_on(dataclasses.replace(WIDE, hidden_size=12)), "model.hidden_size=12 cannot be split into 8 equal parts. Meshes of "
     "8 devices that fit this run, the nearest first: fsdp=4, tensor=2; data=2, fsdp=4;"),
    (run_on(dataclasses.replace(WIDE, moe_layer_step=0), expert=2), "the model has no experts to split, use fsdp"),
    (run_on(SEVEN_HEADS, tensor=2), "model.num_heads=7 cannot be split into 2 equal parts; model.num_kv_heads=7 cannot be "
     "split into 2 equal parts. Meshes of 8 devices that fit this run, the nearest first: fsdp=4, context=2; fsdp=4"),
    (run_on(dataclasses.replace(WIDE, vocab_size=23), tensor=2), "found fsdp=4, tensor=2: model.vocab_size=23 cannot be"),
    (run_on(ALIKE, stage=4), "found stage=4, fsdp=2: the 6 super-block(s) of 1 layer(s) of model.num_layers=6 cannot be split "
     "into 4 equal parts. Meshes of 8 devices that fit this run, the nearest first: stage=2, fsdp=2, tensor=2"),
    (run_on(ALIKE, stage=2, stage_batches=4), "the 2 rows that a device has of a micro-batch "
     "(mesh.stage_batches) cannot be split into 4 equal parts"),
    (run_on(length=200, context=8), "found context=8: data.sequence_length=200 cannot be split into 16 equal parts. Meshes "
     "of 8 devices that fit this run, the nearest first: "),
    (run_on(SEVEN_HEADS, rows=4, length=511), "the 4 rows of each of the optimizer.accumulate micro-batches of "
     "data.batch_size=4 cannot be split into 8 equal parts. No mesh of 8 devices fits this run. Take data.batch_size=8"),
])  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused_with_those_that_do(run: RunConfig, words: str) -> None:
    with pytest.raises(UserError) as error:
        place_run(run, jax.devices()[:8])
    assert words in str(error.value)


def test_chunks_may_straddle_unless_the_packer_sees_to_it() -> None:
    run = run_on(dataclasses.replace(WIDE, chunk_size=32), context=4)
    for parts, straddle in ((1, True), (2, True), (4, False), (8, False)):
        data = dataclasses.replace(run.data, row_parts=parts)
        assert place_run(dataclasses.replace(run, data=data), jax.devices()[:8]).place.straddle == straddle


def test_parts_of_rows_are_whole_chunks() -> None:
    plain = to_plain(RunConfig(data=DataConfig(mixture={"text": 1.0}, sequence_length=16384)))
    for parts, words in (
        (3, "data.row_parts: found 3, expected a divisor of sequence_length=16384"),
        (4, "data.row_parts: found 4, parts of 4096 tokens; expected parts of a multiple of model.chunk_size=8192"),
    ):
        with pytest.raises(UserError) as error:
            from_plain(RunConfig, plain | {"data": plain["data"] | {"row_parts": parts}})
        assert words in str(error.value)


def test_what_is_suggested_fits() -> None:
    run = run_on(dataclasses.replace(WIDE, num_experts=6, hidden_size=12), rows=24)
    fitting = [sizes for sizes in meshes(6) if not mesh_problems(run, sizes)]
    assert len(fitting) > 1
    for sizes in fitting:
        mesh = place_run(dataclasses.replace(run, mesh=MeshConfig(**sizes)), jax.devices()[:6])
        assert mesh.sizes == sizes
        Skeleton(run.model, mesh)


@pytest.mark.parametrize(("mesh", "words"), [
    ({"fsdp": 0}, "mesh.fsdp: found 0, expected 1 or more, or -1"),
    ({"fsdp": -2}, "mesh.fsdp: found -2, expected -1 or more"),
    ({"data": -1, "fsdp": -1}, "mesh.fsdp: found -1, expected a size: data is -1 already"),
    ({"expert_buffer": 0.5}, "mesh.expert_buffer: found 0.5, expected 1 or more"),
])  # fmt: skip
def test_options_of_the_mesh_are_checked_without_devices(mesh: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        from_plain(RunConfig, to_plain(RunConfig()) | {"mesh": mesh})
    assert words in str(error.value)


def test_weights_and_moments_are_split_but_for_norms_and_counters() -> None:
    run = run_on(fsdp=4, expert=2)
    mesh = place_run(run, jax.devices()[:8])
    state = abstract_state(run, Skeleton(run.model, mesh))
    alone = abstract_state(run, Skeleton(run.model))
    whole = [leaf for leaf in jax.tree.leaves(state) if leaf.sharding.is_fully_replicated]
    assert {leaf.shape for leaf in whole} == {(), (16,), (1, 16)}  # counters and norms
    assert tree_bytes(state) == (tree_bytes(alone) - tree_bytes(whole)) // 8 + tree_bytes(whole)
    assert copies(alone) == [] and "none of it copied" in memory_line(alone)


SEEING = dataclasses.replace(WIDE, num_layers=8, vision=dataclasses.replace(VISION, hidden_size=16, adapter_size=6))
"""Has an adapter whose width 4 devices do not divide."""


@pytest.mark.parametrize(("sizes", "along", "copied", "split"), [
    ({"stage": 2, "fsdp": 4}, ["stage"], {"embed", "lm_head", "vision.blocks.fc1.kernel"},
     {"blocks.0.attn.q", "vision.adapter.fc2", "final_norm", "step"}),
    ({"fsdp": 4, "tensor": 2}, ["tensor"], {"blocks.1.ffn.router", "vision.blocks.fc1.kernel", "projector"},
     {"blocks.0.attn.q", "embed", "lm_head", "vision.adapter.fc2"}),
    ({"data": 2, "fsdp": 4}, ["data"], {"blocks.0.attn.q", "embed", "lm_head", "vision.blocks.fc1.kernel"},
     {"vision.adapter.fc2", "final_norm", "count"}),
    ({"stage": 2, "fsdp": 2, "tensor": 2}, ["stage", "tensor"], {"vision.blocks.fc1.kernel", "vision.adapter.fc2"},
     {"blocks.0.attn.q", "embed", "blocks.1.ffn.router", "final_norm"}),
])  # fmt: skip
def test_every_byte_that_devices_have_copies_of_is_told(
    sizes: dict[str, int], along: list[str], copied: set[str], split: set[str]
) -> None:
    run = run_on(SEEING, **sizes)
    state = abstract_state(run, Skeleton(run.model, place_run(run, jax.devices()[:8])))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    found = copies(state)
    assert sum(group["bytes"] for group in found) == pytest.approx(tree_bytes(state) - whole / 8, abs=len(found))
    (names,) = (set(group["arrays"]) for group in found if group["axes"] == along)
    assert copied <= names and not split & names
    largest = found[0]
    line = memory_line(state)
    assert f"{decimal(largest['bytes'])} along {' x '.join(largest['axes'])} ({largest['arrays'][0]}, " in line


def test_copies_of_an_array_are_counted_by_hand() -> None:
    sharding = place_run(run_on(data=2, fsdp=4), jax.devices()[:8])
    half = jax.ShapeDtypeStruct((8, 3), "float32", sharding=sharding.split([("fsdp",), ()]))
    whole = jax.ShapeDtypeStruct((10,), "float32", sharding=sharding.everywhere)
    assert copies({"norm": whole, "matrix": half}) == [
        {"axes": ["data", "fsdp"], "bytes": 35, "arrays": ["norm"]},  # 40 bytes, of which an eighth is a share
        {"axes": ["data"], "bytes": 12, "arrays": ["matrix"]},  # 24 bytes, twice
    ]
