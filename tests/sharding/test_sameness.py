"""A run is the same on any mesh; `python -m tests.sharding.sameness` prints how close."""

import pytest

from sharding.config import AXES, meshes, written
from tests.sharding.sameness import CASES, DEVICES, compare

EVERYTHING, IN_TURN = CASES
MESHES = [(EVERYTHING, sizes) for sizes in meshes(DEVICES)]
# The second model, of fewer features, on one axis and on three.
MESHES += [(IN_TURN, sizes) for sizes in meshes(DEVICES) if sum(size > 1 for size in sizes.values()) != 2]


@pytest.mark.parametrize(("case", "sizes"), [
    (EVERYTHING, {"fsdp": 8}),
    (EVERYTHING, {"data": 2, "fsdp": 2, "expert": 2}),
    (EVERYTHING, {"tensor": 8}),
    (IN_TURN, {"fsdp": 2, "expert": 2, "tensor": 2}),
])  # fmt: skip
def test_losses_and_gradients_are_those_of_one_device(case: str, sizes: dict[str, int]) -> None:
    good, line = compare(case, dict.fromkeys(AXES, 1) | sizes, only_float64=True)
    assert good, line


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes"), MESHES, ids=[f"{case}: {written(sizes)}" for case, sizes in MESHES])
def test_training_is_that_of_one_device(case: str, sizes: dict[str, int]) -> None:
    good, line = compare(case, sizes, only_float64=False)
    assert good, line
