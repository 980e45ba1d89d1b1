"""A run is the same on any mesh; `python -m tests.sharding.sameness` prints how close."""

from collections.abc import Callable

import pytest

from sharding.config import AXES, written
from tests.sharding.sameness import CASES, compare, fitting

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


@pytest.mark.slow
def test_a_pipeline_of_several_micro_batches_and_rounds_is_the_same() -> None:
    good, line = compare(IN_TURN, dict.fromkeys(AXES, 1) | {"stage": 2, "fsdp": 2, "tensor": 2}, True, stage_batches=4)
    assert good, line
