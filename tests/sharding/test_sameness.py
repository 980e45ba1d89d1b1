"""A run is the same on any mesh; `python -m tests.sharding.sameness` prints how close."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from sharding.config import AXES, written
from sharding.mesh import DeviceMesh
from tests.sharding import sameness
from tests.sharding.sameness import CASES, Trained, compare, fitting, margin, replicas_agree, supported_line

EVERYTHING, TIED = CASES


def mesh(**sizes: int) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | sizes


def more_than_one(sizes: dict[str, int]) -> list[int]:
    return [size for size in sizes.values() if size > 1]


# Each axis alone, all pairs, and some triples, with everything switched on. The second model where it differs.
MESHES = [(EVERYTHING, mesh(stage=2)), (EVERYTHING, mesh(stage=4))]  # of fewer devices: it has four super-blocks
MESHES += [(EVERYTHING, sizes) for sizes in fitting(EVERYTHING) if more_than_one(sizes) in ([8], [2, 4])]
MESHES += [
    (EVERYTHING, mesh(**dict.fromkeys(names.split(), 2)))
    for names in (
        "fsdp expert tensor",
        "stage expert context",
        "stage data fsdp",
    )
]
MESHES += [(TIED, sizes) for sizes in (mesh(expert=8), mesh(fsdp=4, tensor=2), mesh(stage=2, context=4))]


def test_the_meshes_have_each_axis_alone_and_all_pairs() -> None:
    found = [tuple(name for name in AXES if sizes[name] > 1) for case, sizes in MESHES if case == EVERYTHING]
    assert {axes for axes in found if len(axes) == 1} == {(name,) for name in AXES}
    assert len({axes for axes in found if len(axes) == 2}) == len(AXES) * (len(AXES) - 1) // 2


@pytest.mark.parametrize(("case", "sizes"), [
    (EVERYTHING, {"data": 2, "fsdp": 2, "expert": 2}),
    (TIED, {"fsdp": 2, "expert": 2, "tensor": 2}),
    (TIED, {"stage": 2, "expert": 2, "context": 2}),
])  # fmt: skip
def test_losses_and_gradients_are_those_of_one_device(case: str, sizes: dict[str, int]) -> None:
    good, line = compare(case, mesh(**sizes), only_float64=True)
    assert good, line


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes"), MESHES, ids=[f"{case}: {written(sizes)}" for case, sizes in MESHES])
def test_training_is_that_of_one_device(
    case: str, sizes: dict[str, int], record_property: Callable[[str, str], None]
) -> None:
    good, line = compare(case, sizes, only_float64=False)
    record_property("shown", f"{case + ': ' + written(sizes):52}{line}")
    assert good, line


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_choice_of_an_expert_hangs_on_rounding(case: str, record_property: Callable[[str, str], None]) -> None:
    found = margin(case)
    record_property("shown", f"{case}, choice of experts: {found}")
    assert found.clearance > 1, found


@pytest.mark.slow  # beside the others, which show what is compared
@pytest.mark.parametrize(("case", "count"), [(EVERYTHING, 55), (TIED, 50)])
def test_only_too_many_stages_are_not_supported(
    case: str, count: int, record_property: Callable[[str, str], None]
) -> None:
    record_property("shown", f"{case}, meshes: {supported_line(case)}")
    assert len(fitting(case)) == count
    assert all(sizes["stage"] > 2 for sizes in sameness.unsupported(case))


@pytest.mark.slow
def test_a_pipeline_of_several_micro_batches_and_rounds_is_the_same() -> None:
    good, line = compare(TIED, mesh(stage=2, fsdp=2, tensor=2), True, stage_batches=4)
    assert good, line


# The comparison itself


def test_one_bit_of_one_replica_is_seen() -> None:
    on = DeviceMesh.of(jax.devices()[:8], {"data": 4, "fsdp": 2})
    sharding, whole = on.split([("fsdp",)]), np.arange(8, dtype=np.float32)

    def array(changed: Any) -> jax.Array:
        shards = []
        for device, index in sharding.devices_indices_map(whole.shape).items():
            part = whole[index].copy()
            part[0] = np.nextafter(part[0], 9) if device == changed else part[0]
            shards.append(jax.device_put(part, device))
        return jax.make_array_from_single_device_arrays(whole.shape, sharding, shards)

    assert replicas_agree(array(None))
    assert not any(replicas_agree(array(device)) for device in on.devices)


@pytest.mark.parametrize(("changed", "words"), [
    ({}, ""),
    ({"replicas_agree": False}, "replicas differ"),
    ({"assignments": np.array([[[3, 5]], [[4, 4]]])}, "experts have other tokens"),
    ({"loss": np.array(1 + 3e-5)}, "loss 3e-05"),
    ({"gradient": {"w": np.array([1, 2e-4])}}, "gradient 2e-04"),
    ({"weights": {"w": np.array([1, 3e-4])}}, "steps 3e-04"),
])  # fmt: skip
def test_each_difference_counts(changed: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = {"w": np.array([1.0, 0.0])}
    assignments = np.array([[[3, 5]], [[5, 3]]])
    alone = Trained(np.array(1.0), leaf, assignments, leaf, replicas_agree=True, selection=[])
    monkeypatch.setattr(sameness, "loss_sums_gradient", lambda *_: leaf)
    monkeypatch.setattr(sameness, "alone_losses", lambda case: leaf)
    monkeypatch.setattr(sameness, "alone_trained", lambda case: alone)
    monkeypatch.setattr(sameness, "trained", lambda case, on: dataclasses.replace(alone, **changed))
    good, line = compare(EVERYTHING, mesh(fsdp=8), only_float64=False)
    assert good == (not changed) and words in line
