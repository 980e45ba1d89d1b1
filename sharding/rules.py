"""Which mesh axes split which dims of the weights: dims have names, and each name its axes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sharding.errors import UserError

Dims = tuple[str, ...]
"""Names of an array's last dims; "-" for one that is never split. Dims before them, of stacked layers, are whole."""
Axes = tuple[str, ...]

GATHERED = ("width", "vision_width", "adapter", "audio_width", "expert_width")
"""Dims whose parts are gathered where they are used."""
AS_FAR_AS_THEY_DIVIDE = ("vision_width", "adapter", "audio_width")
"""Dims of the encoders of pictures and sound, whose sizes have few factors: axes that do not divide them are left out."""


@dataclass(frozen=True)
class Rules:
    """The mesh axes of each name, outermost first; a name that is no field is whole on every device."""

    repeats: Axes = ("stage",)
    """Of the super-block, in its stacked weights. Never gathered: rows go from device to device."""
    width: Axes = ("fsdp", "expert", "context")
    """Of the model, in the weights that all tokens use."""
    vision_width: Axes = ("fsdp", "expert", "context")
    """Of the vision encoder."""
    adapter: Axes = ("fsdp", "expert", "context")
    """Of the vision encoder's adapter."""
    audio_width: Axes = ("fsdp", "expert", "context")
    """Of the audio encoder."""
    experts: Axes = ("expert",)
    """Number of experts, in their weights. Never gathered: tokens go to the experts."""
    expert_width: Axes = ("fsdp", "context")
    """Of the model, in the experts' weights."""
    heads: Axes = ("tensor",)
    """Query heads. This one and those below are never gathered: each device computes with its part."""
    kv_heads: Axes = ("tensor",)
    """Heads of keys and values."""
    ffn: Axes = ("tensor",)
    """Inner width of the dense and the shared feed-forward layers."""
    expert_ffn: Axes = ("tensor",)
    """Inner width of the experts."""
    vocab: Axes = ("tensor",)
    """Tokens of the vocabulary."""

    def axes(self, name: str, size: int, mesh: Mapping[str, int], weight: str) -> Axes:
        """The axes that split a dim of this name and size; those of size 1 are left out. `weight`: whose dim, for a refusal.

        Raises:
            UserError: they do not divide it.
        """
        axes = tuple(axis for axis in getattr(self, name, ()) if mesh.get(axis, 1) > 1)
        if name in AS_FAR_AS_THEY_DIVIDE:
            while axes and size % math.prod(mesh[axis] for axis in axes):
                axes = axes[:-1]
        parts = math.prod(mesh[axis] for axis in axes)
        if size % parts:
            found = " x ".join(f"{axis}={mesh[axis]}" for axis in axes)
            raise UserError(f"mesh: {found} does not divide {name} of the weight {weight}, which is {size}")
        return axes

    def split(self, weight: str, dims: Dims, shape: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[Axes, ...]:
        """The axes of every dim of a weight whose last dims have these names. `weight`: its path, for a refusal.

        Raises:
            UserError: an axis does not divide its dim, or two dims claim it.
        """
        names = ("-",) * (len(shape) - len(dims)) + dims
        split = tuple(self.axes(name, size, mesh, weight) for name, size in zip(names, shape, strict=True))
        claimed = [axis for axes in split for axis in axes]
        twice = {axis for axis in claimed if claimed.count(axis) > 1}
        if twice:
            found = ", ".join(sorted(twice))
            raise UserError(f"mesh: {found} would split two dims of the weight {weight}, {dims} of {shape}")
        return split
