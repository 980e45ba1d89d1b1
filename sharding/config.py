"""Typed options of the mesh (free of jax, so that `--help` is instant)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

Problem = tuple[str, str]

ROW_AXES = ("stage", "data", "fsdp", "expert")
"""Axes that split the rows of a batch."""
AXES = (*ROW_AXES, "context", "tensor")
"""Axes of the mesh, the outermost first: neighbours on the last one are nearest to each other."""

REST = -1
"""Size of an axis that takes all devices that the others leave."""


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out: the product of the axes is their number. Rows of a batch are split over stage, data, fsdp
    and expert together."""

    MAY_BE_REST: ClassVar[frozenset[str]] = frozenset(AXES)
    """Options that may be -1."""

    data: int = 1
    """Copies of the weights."""
    fsdp: int = REST
    """Parts that weights, gradients and optimizer state are split into, along the model's width; -1 takes all devices that
    the other axes leave."""
    expert: int = 1
    """Groups that the experts are split into; other weights are split over fsdp, expert and context together."""
    context: int = 1
    """Parts that each row is split into, and weights as over fsdp."""
    tensor: int = 1
    """Parts that the heads of attention, the inner width of feed-forward layers and the vocabulary are split into."""
    stage: int = 1
    """Parts that the repeats of the super-block are split into, for a circular pipeline."""
    stage_batches: int = 1
    """Micro-batches that the rows of a device are cut into for the pipeline: more of them leave it idle for less time."""
    expert_buffer: float = 1.5
    """Rows that a device can send to each other one in a round of the expert exchange, as a multiple of what balanced
    routing sends; more of them go in further rounds, none are dropped."""

    def problems(self) -> Iterator[Problem]:
        if len(self.rest) > 1:
            yield (
                self.rest[1],
                f"found -1, expected a size: {self.rest[0]} is -1 already, and takes all devices that are left",
            )
        for name in AXES:
            if getattr(self, name) == 0:
                yield name, "found 0, expected 1 or more, or -1 for all devices that the other axes leave"
        if self.expert_buffer < 1:
            yield "expert_buffer", f"found {self.expert_buffer}, expected 1 or more"

    @property
    def rest(self) -> list[str]:
        """The axes of size -1."""
        return [name for name in AXES if getattr(self, name) == REST]

    def sizes(self, devices: int) -> dict[str, int] | None:
        """The size of each axis on this many devices; None where their product cannot be that number."""
        sizes = {name: getattr(self, name) for name in AXES}
        fixed = math.prod(size for size in sizes.values() if size != REST)
        if REST in sizes.values():
            sizes = {name: devices // fixed if size == REST else size for name, size in sizes.items()}
        return sizes if math.prod(sizes.values()) == devices else None


def written(sizes: dict[str, int]) -> str:
    """A mesh as its axes that are not 1, such as `fsdp=4, expert=2`."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one device"


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of this many devices."""

    def parts(left: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (left,)
            return
        for size in range(1, left + 1):
            if left % size == 0:
                for others in parts(left // size, axes - 1):
                    yield size, *others

    return (dict(zip(AXES, sizes, strict=True)) for sizes in parts(devices, len(AXES)))


def distance(one: dict[str, int], other: dict[str, int]) -> float:
    """How different two meshes are: the sum over the axes of the doublings between their sizes."""
    return sum(abs(math.log2(one[name] / other[name])) for name in AXES)
