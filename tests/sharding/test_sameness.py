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
from tests.sharding.sameness import CASES, Trained, compare, fitting, replicas_agree, supported_line, unsupported

EVERYTHING, IN_TURN = CASES


def axes(sizes: dict[str, int]) -> int:
    """Those of more than one device."""
    return sum(size > 1 for size in sizes.values())


# Each axis alone, all pairs, and some triples; the second model, of fewer features, on one axis and on one triple.
MESHES = [
    (EVERYTHING, sizes)
    for sizes in fitting(EVERYTHING)
    if axes(sizes) == 1 or (axes(sizes) == 2 and [size for size in sizes.values() if size > 1] == [2, 4])
]
MESHES += [(IN_TURN, sizes) for sizes in fitting(IN_TURN) if axes(sizes) == 1]
MESHES += [
    (case, dict.fromkeys(AXES, 1) | dict.fromkeys(names.split(), 2))
    for case, names in (
        (EVERYTHING, "fsdp expert tensor"),
        (EVERYTHING, "fsdp context tensor"),
        (EVERYTHING, "stage expert context"),
        (EVERYTHING, "data stage fsdp"),
        (IN_TURN, "stage context tensor"),
    )
]


@pytest.mark.parametrize(("case", "sizes"), [
    (EVERYTHING, {"data": 2, "fsdp": 2, "expert": 2}),
    (IN_TURN, {"fsdp": 2, "expert": 2, "tensor": 2}),
    (IN_TURN, {"stage": 2, "expert": 2, "context": 2}),
])  # fmt: skip
def test_losses_and_gradients_are_those_of_one_device(case: str, sizes: dict[str, int]) -> None:
    good, line = compare(case, dict.fromkeys(AXES, 1) | sizes, only_float64=True)
    assert good, line


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes"), MESHES, ids=[f"{case}: {written(sizes)}" for case, sizes in MESHES])
def test_training_is_that_of_one_device(
    case: str, sizes: dict[str, int], record_property: Callable[[str, str], None]
) -> None:
    good, line = compare(case, sizes, only_float64=False)
    record_property("shown", f"{case + ': ' + written(sizes):72}{line}")
    assert good, line


@pytest.mark.slow  # beside the others, which show what is compared
@pytest.mark.parametrize(("case", "count"), [(EVERYTHING, 55), (IN_TURN, 50)])
def test_only_too_many_stages_are_not_supported(
    case: str, count: int, record_property: Callable[[str, str], None]
) -> None:
    record_property("shown", f"{case}, meshes: {supported_line(case)}")
    assert len(fitting(case)) == count
    assert all(sizes["stage"] > 2 for sizes in unsupported(case))


@pytest.mark.slow
def test_a_pipeline_of_several_micro_batches_and_rounds_is_the_same() -> None:
    good, line = compare(IN_TURN, dict.fromkeys(AXES, 1) | {"stage": 2, "fsdp": 2, "tensor": 2}, True, stage_batches=4)
    assert good, line


# The comparison itself


def test_one_bit_of_one_replica_is_seen() -> None:
    on = DeviceMesh.of(jax.devices()[:8], {"data": 4, "fsdp": 2})
    sharding, whole = on.split([("fsdp",)]), np.arange(8, dtype=np.float32)

    def array(changed: jax.Device | None) -> jax.Array:
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
    ({"loss": np.array(1 + 3e-5)}, "loss 3e-05"),
    ({"gradient": {"w": np.array([1, 2e-4])}}, "gradient 2e-04"),
    ({"weights": {"w": np.array([1, 3e-4])}}, "steps 3e-04"),
])  # fmt: skip
def test_each_difference_counts(changed: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = {"w": np.array([1.0, 0.0])}
    alone = Trained(np.array(1.0), leaf, leaf, replicas_agree=True)
    monkeypatch.setattr(sameness, "loss_sums_gradient", lambda *_: leaf)
    monkeypatch.setattr(sameness, "alone_losses", lambda case: leaf)
    monkeypatch.setattr(sameness, "alone_trained", lambda case: alone)
    monkeypatch.setattr(sameness, "trained", lambda case, on: dataclasses.replace(alone, **changed))
    good, line = compare(EVERYTHING, dict.fromkeys(AXES, 1) | {"fsdp": 8}, only_float64=False)
    assert good == (not changed) and words in line
