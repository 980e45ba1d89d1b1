"""A model that begins as a deeper one without some of its super-blocks."""

from typing import NamedTuple

from model.config import LayerKind, ModelConfig
from sharding.errors import UserError
from trainer.hf.load import differing_properties

_DEPTH = ("num_layers", "moe_layers", "nope_layers")


class Kept(NamedTuple):
    """Which super-blocks of a model stay."""

    blocks: tuple[int, ...]
    """Counted from 0, in order."""
    total: int
    """Of the deeper model."""

    def __str__(self) -> str:
        return f"super-blocks {', '.join(map(str, self.blocks))} of 0 to {self.total - 1}"


def kept_blocks(source: ModelConfig, student: ModelConfig, keep: tuple[int, ...], where: str) -> Kept:
    """The super-blocks of `source` that `student` begins with: `keep`, or evenly spaced ones, first and last included.

    Raises:
        UserError: the models differ in more than their depth; `keep` names too many or too few, or what is not there.
    """
    differing = differing_properties(source, student, but=_DEPTH)
    pattern, expected = student.super_block(), source.super_block()
    if pattern != expected:
        differing.append(
            f"model.num_layers, moe_layer_step and nope_layer_step: found a super-block of {_written(pattern)}, expected "
            f"{_written(expected)}"
        )
    if differing:
        raise UserError(
            f"init.layers: found 'pruned', and a model that differs from that of {where} in more than its depth:\n  "
            + "\n  ".join(differing)
            + "\nGive the config these values and fewer layers, or start it from scratch."
        )
    total, left = (model.num_layers // len(expected) for model in (source, student))
    if left > total:
        raise UserError(
            f"model.num_layers: found {left} super-blocks of {len(expected)} layers, expected at most the {total} of {where}, "
            "from which they are taken (init.layers='pruned')."
        )
    if not keep and left == 1 < total:
        raise UserError(
            "init.keep: found nothing, expected the one super-block that stays: a model of one cannot keep the first and the "
            f"last of the {total} of {where}."
        )
    blocks = keep or evenly_spaced(left, total)
    if len(blocks) != left or blocks[-1] >= total:
        raise UserError(
            f"init.keep: found {keep}, expected {left} of the super-blocks 0 to {total - 1} of {where}: model.num_layers "
            f"has {left} times {len(expected)} layers."
        )
    return Kept(blocks, total)


def evenly_spaced(count: int, total: int) -> tuple[int, ...]:
    """`count` of 0 to `total` - 1, the first and the last included where there are two or more; halves go up."""
    gaps = max(count - 1, 1)
    return tuple((2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(count))


def _written(pattern: tuple[LayerKind, ...]) -> str:
    kinds = (f"{'moe' if kind.moe else 'dense'} {'chunked' if kind.rope else 'global'}" for kind in pattern)
    return f"({', '.join(kinds)})"
