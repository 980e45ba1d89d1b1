"""The one table between Hugging Face's Llama 4 layout and ours.

The Hugging Face layout exists in this folder only. `table` is its bijection with ours: linears are transposed and cut
into heads, layers are stacked by their place in the super-block, the fused `gate_up_proj` is two leaves. The names and
shapes are those of transformers' `models/llama4`, versions 4.51 to 5.

Legend: D width, N query heads, K kv heads, H head width, F ffn width, E experts, V vocabulary, W vision width,
A adapter width, P patches per tile.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from model.config import ModelConfig, VisionConfig
from sharding.errors import UserError

Tree = dict[Any, Any]
Index = tuple[slice, ...]

_LISTED = 40
"""Tensors named in one error message."""


class Tensor(Protocol):
    """What is needed of a Hugging Face tensor: an array in memory, or one in a file that is read where it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Leaf(NamedTuple):
    """One of our parameters and where its numbers are in a Hugging Face checkpoint.

    It is read and written part by part: a layer at a time, and of the experts one at a time.
    """

    path: str
    """Our path, dotted; the number of a super-block's layer is an integer key."""
    names: tuple[str, ...]
    """Hugging Face tensors: one per layer that the leaf stacks, first to last, or just the one."""
    layer_shape: tuple[int, ...]
    """Our shape, of one layer."""
    hf_shape: tuple[int, ...]
    """Shape of each Hugging Face tensor."""
    stacked: bool = False
    """Our leaf has a leading axis of layers."""
    transpose: bool = False
    """Hugging Face linears are [out, in], ours [in, out]."""
    half: int | None = None
    """Which half of the last axis of a fused tensor is ours; None if all of it is."""
    experts: bool = False
    """The first axis of a layer is that of the experts, in both layouts."""

    @property
    def keys(self) -> tuple[str | int, ...]:
        return tuple(int(key) if key.isdigit() else key for key in self.path.split("."))

    @property
    def shape(self) -> tuple[int, ...]:
        """Our shape."""
        return (len(self.names), *self.layer_shape) if self.stacked else self.layer_shape

    @property
    def part_dims(self) -> int:
        """Leading dims of our shape that number the parts."""
        return self.stacked + self.experts

    def name(self, part: tuple[int, ...]) -> str:
        """The tensor that a part lies in."""
        return self.names[part[0] if self.stacked else 0]

    def parts(self) -> Iterator[tuple[int, ...]]:
        """Indices of the parts, in order."""
        return itertools.product(*(range(size) for size in self.shape[: self.part_dims]))

    def part(self, tensors: Mapping[str, Tensor], part: tuple[int, ...]) -> np.ndarray:
        """One part in our layout, in the tensor's dtype; of the tensor no more is read than it takes."""
        tensor = tensors[self.name(part)]
        value = tensor[part[-1]] if self.experts else tensor[...]
        if self.half is not None:
            value = np.split(value, 2, axis=-1)[self.half]
        return (value.T if self.transpose else value).reshape(self.shape[self.part_dims :])

    def part_to_hf(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `part`: [rows, columns] or [columns] of the tensor; of a fused tensor, our half."""
        *rows, last = self.hf_shape[self.experts :]
        shape = (*rows, last if self.half is None else last // 2)
        return value.reshape(shape[::-1]).T if self.transpose else value.reshape(shape)

    def read(self, tensors: Mapping[str, Tensor], dtype: np.dtype, index: Index | None = None) -> np.ndarray:
        """A slice of our leaf (all of it without `index`), put together part by part."""
        index = index or tuple(slice(None) for _ in self.shape)
        ranges = [range(*cut.indices(size)) for cut, size in zip(index, self.shape, strict=True)]
        value = np.empty([len(r) for r in ranges], dtype)
        lead, rest = ranges[: self.part_dims], index[self.part_dims :]
        for place in itertools.product(*(range(len(r)) for r in lead)):
            part = tuple(r[i] for r, i in zip(lead, place, strict=True))
            value[place] = self.part(tensors, part)[rest]
        return value


def table(model: ModelConfig) -> tuple[Leaf, ...]:
    """Every parameter of `model`, in our layout and in Hugging Face's; each tensor name occurs in exactly one leaf (a
    fused one in two)."""
    text = "language_model." if model.vision else ""
    D, V = model.hidden_size, model.vocab_size
    leaves = [
        Leaf("embed", (f"{text}model.embed_tokens.weight",), (V, D), (V, D)),
        Leaf("final_norm", (f"{text}model.norm.weight",), (D,), (D,)),
    ]
    if not model.tie_embeddings:
        leaves.append(Leaf("lm_head", (f"{text}lm_head.weight",), (D, V), (V, D), transpose=True))
    block = model.super_block()
    for j, kind in enumerate(block):
        prefixes = [f"{text}model.layers.{i}." for i in range(j, model.num_layers, len(block))]
        for leaf in _decoder_layer(model, kind.moe):
            leaves.append(_stack(leaf, f"blocks.{j}.", prefixes))
    return (*leaves, *(_vision_leaves(model.vision, D) if model.vision else ()))


def _decoder_layer(model: ModelConfig, moe: bool) -> Iterator[Leaf]:
    D, N, K, H = model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim
    yield Leaf("attn_norm", ("input_layernorm.weight",), (D,), (D,))
    yield Leaf("ffn_norm", ("post_attention_layernorm.weight",), (D,), (D,))
    for name, heads in (("q", N), ("k", K), ("v", K)):
        weight = f"self_attn.{name}_proj.weight"
        yield Leaf(f"attn.{name}", (weight,), (D, heads, H), (heads * H, D), transpose=True)
    yield Leaf("attn.o", ("self_attn.o_proj.weight",), (N, H, D), (D, N * H), transpose=True)
    if not moe:
        yield from _swiglu("ffn.", "feed_forward.", D, model.dense_ffn_size)
        return
    E, F = model.num_experts, model.expert_ffn_size
    yield from _swiglu("ffn.shared.", "feed_forward.shared_expert.", D, F)
    yield Leaf("ffn.router", ("feed_forward.router.weight",), (D, E), (E, D), transpose=True)
    # Experts multiply from the right, [E, in, out]: no transpose. The first half of the fused columns is the gate.
    fused = ("feed_forward.experts.gate_up_proj",)
    yield Leaf("ffn.experts.gate", fused, (E, D, F), (E, D, 2 * F), half=0, experts=True)
    yield Leaf("ffn.experts.up", fused, (E, D, F), (E, D, 2 * F), half=1, experts=True)
    yield Leaf("ffn.experts.down", ("feed_forward.experts.down_proj",), (E, F, D), (E, F, D), experts=True)


def _swiglu(ours: str, theirs: str, D: int, F: int) -> Iterator[Leaf]:
    for name, shape in (("gate", (D, F)), ("up", (D, F)), ("down", (F, D))):
        yield Leaf(f"{ours}{name}", (f"{theirs}{name}_proj.weight",), shape, shape[::-1], transpose=True)


def _vision_leaves(vision: VisionConfig, D: int) -> Iterator[Leaf]:
    W, F, A, n = vision.hidden_size, vision.ffn_size, vision.adapter_size, vision.num_heads
    P, pixels = vision.patches_per_side**2, 3 * vision.patch_size**2
    projector = "multi_modal_projector.linear_1.weight"
    yield Leaf("projector", (projector,), (A, D), (D, A), transpose=True)

    def norm(ours: str, theirs: str) -> Iterator[Leaf]:
        yield Leaf(f"{ours}.scale", (f"{theirs}.weight",), (W,), (W,))
        yield Leaf(f"{ours}.bias", (f"{theirs}.bias",), (W,), (W,))

    def linear(ours: str, theirs: str, shape: tuple[int, ...], bias: tuple[int, ...], inputs: int) -> Iterator[Leaf]:
        out = math.prod(bias)
        yield Leaf(f"{ours}.kernel", (f"{theirs}.weight",), shape, (out, inputs), transpose=True)
        yield Leaf(f"{ours}.bias", (f"{theirs}.bias",), bias, (out,))

    def layer() -> Iterator[Leaf]:
        heads = (n, W // n)
        yield from norm("attn_norm", "input_layernorm")
        yield from norm("ffn_norm", "post_attention_layernorm")
        for name in "qkv":
            yield from linear(name, f"self_attn.{name}_proj", (W, *heads), heads, W)
        yield from linear("o", "self_attn.o_proj", (*heads, W), (W,), W)
        yield from linear("fc1", "mlp.fc1", (W, F), (F,), W)
        yield from linear("fc2", "mlp.fc2", (F, W), (W,), F)

    def outside() -> Iterator[Leaf]:
        patch = "patch_embedding.linear.weight"
        yield Leaf("patch_embed", (patch,), (pixels, W), (W, pixels), transpose=True)
        yield Leaf("class_embed", ("class_embedding",), (W,), (W,))
        yield Leaf("pos_embed", ("positional_embedding_vlm",), (P + 1, W), (P + 1, W))
        yield from norm("pre_norm", "layernorm_pre")
        yield from norm("post_norm", "layernorm_post")
        # The first linear's input is one token after the pixel shuffle.
        for name, inputs in (("fc1", W * vision.shuffle**2), ("fc2", A)):
            weight = f"vision_adapter.mlp.{name}.weight"
            yield Leaf(f"adapter.{name}", (weight,), (inputs, A), (A, inputs), transpose=True)

    for leaf in outside():
        yield leaf._replace(path=f"vision.{leaf.path}", names=tuple(f"vision_model.{name}" for name in leaf.names))
    prefixes = [f"vision_model.model.layers.{i}." for i in range(vision.num_layers)]
    for leaf in layer():
        yield _stack(leaf, "vision.blocks.", prefixes)


def _stack(leaf: Leaf, ours: str, prefixes: list[str]) -> Leaf:
    names = tuple(prefix + leaf.names[0] for prefix in prefixes)
    return leaf._replace(path=ours + leaf.path, names=names, stacked=True)


def place(tree: Tree, keys: tuple[str | int, ...], value: Any) -> None:
    """Puts a value into a nested dict."""
    *parents, last = keys
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def check_tensors(tensors: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Accounts for every tensor.

    Raises:
        UserError: tensors are missing, left over or of another shape, all of them listed; or tensors that are one
            parameter here, layer by layer, have different dtypes.
    """
    leaves = table(model)
    shapes = {name: leaf.hf_shape for leaf in leaves for name in leaf.names}
    problems = [f"missing {name} {list(shape)}" for name, shape in shapes.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.append(f"left over {name} {list(tensor.shape)}")
        elif tensor.shape != shapes[name]:
            problems.append(f"{name}: found shape {list(tensor.shape)}, expected {list(shapes[name])}")
    if problems:
        raise UserError(
            f"The checkpoint does not hold the weights of the model that the config describes "
            f"({len(problems)} of {len(shapes.keys() | tensors.keys())} tensors differ):\n  "
            + "\n  ".join(problems[:_LISTED])
            + (f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else "")
            + "\nSet the config's model section to the sizes in the checkpoint's config.json."
        )
    for leaf in leaves:
        first = leaf.names[0]
        for name in leaf.names:
            if tensors[name].dtype != tensors[first].dtype:
                raise UserError(
                    f"{name}: found {tensors[name].dtype}, expected {tensors[first].dtype} like {first}: the layers "
                    "of a checkpoint share one precision. Save it again in one."
                )


def from_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> Tree:
    """Hugging Face tensors as our parameters: a nested dict of arrays in `model.param_dtype`.

    Raises:
        UserError: see `check_tensors`.
    """
    check_tensors(tensors, model)
    tree: Tree = {}
    for leaf in table(model):
        place(tree, leaf.keys, leaf.read(tensors, np.dtype(model.param_dtype)))
    return tree


class Piece(NamedTuple):
    """What a Hugging Face tensor is made of: one layer of a leaf; two such for a fused tensor, side by side."""

    leaf: Leaf
    layer: int | None
    """Layer of a stacked leaf."""

    def parts(self) -> Iterator[tuple[int, ...]]:
        """Indices of the leaf's parts that are this layer's, in order."""
        layer = () if self.layer is None else (self.layer,)
        experts = range(self.leaf.layer_shape[0]) if self.leaf.experts else None
        return iter([layer] if experts is None else [(*layer, e) for e in experts])


def pieces(model: ModelConfig) -> dict[str, list[Piece]]:
    """Every Hugging Face tensor of `model` by name, as the pieces that follow each other along its last axis."""
    found: dict[str, list[Piece]] = {}
    for leaf in table(model):
        for i, name in enumerate(leaf.names):
            found.setdefault(name, []).append(Piece(leaf, i if leaf.stacked else None))
    return found


def hf_rows(of: list[Piece], value: Any) -> Iterator[np.ndarray]:
    """A Hugging Face tensor in consecutive runs of its numbers: of the experts one at a time, else all at once.

    `value(leaf, part)` gives a part of one of our leaves.
    """
    for parts in zip(*(piece.parts() for piece in of), strict=True):
        runs = [
            piece.leaf.part_to_hf(np.asarray(value(piece.leaf, part))) for piece, part in zip(of, parts, strict=True)
        ]
        yield runs[0] if len(runs) == 1 else np.concatenate(runs, axis=-1)


def to_hf(params: Mapping[str, Any], model: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: our parameters (or a gradient of theirs) under Hugging Face's names and layout."""

    def value(leaf: Leaf, part: tuple[int, ...]) -> np.ndarray:
        found: Any = params
        for key in leaf.keys:
            found = found[key]
        return found[part]

    tensors = {}
    for name, of in pieces(model).items():
        rows = list(hf_rows(of, value))
        tensors[name] = np.stack(rows) if of[0].leaf.experts else rows[0]
    return tensors
