"""Hugging Face Llama 4 checkpoints as our parameters.

The Hugging Face layout exists in this file only. `table` is its one bijection with ours: linears are transposed and cut
into heads, layers are stacked by their place in the super-block, the fused `gate_up_proj` is two leaves. The names and
shapes are those of transformers' `models/llama4`, versions 4.51 to 5.

Legend: D width, N query heads, K kv heads, H head width, F ffn width, E experts, V vocabulary, W vision width,
A adapter width, P patches per tile.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from model.config import ModelConfig, VisionConfig
from sharding.errors import UserError
from trainer.hf_config import model_config_from_hf

Tree = dict[Any, Any]

_LISTED = 40
"""Tensors named in one error message."""

_SAFETENSORS_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_OURS = ("dtype", "param_dtype", "remat", "scan_layers", "expert_kernel", "router_bias_rate", "init_std")
"""Options of `ModelConfig` that are no property of the weights; the others must agree with the checkpoint's config."""


class Leaf(NamedTuple):
    """One of our parameters and where its numbers are in a Hugging Face checkpoint."""

    path: str
    """Our path, dotted; the number of a super-block's layer is an integer key."""
    names: tuple[str, ...]
    """Hugging Face tensors: one per layer that the leaf stacks, first to last, or just the one."""
    shape: tuple[int, ...]
    """Our shape, of one layer."""
    hf_shape: tuple[int, ...]
    """Shape of each Hugging Face tensor."""
    stacked: bool = False
    """Our leaf has a leading axis of layers."""
    transpose: bool = False
    """Hugging Face linears are [out, in], ours [in, out]."""
    half: int | None = None
    """Which half of the last axis of a fused tensor is ours; None if all of it is."""

    @property
    def keys(self) -> list[str | int]:
        return [int(key) if key.isdigit() else key for key in self.path.split(".")]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        if self.half is not None:
            tensor = np.split(tensor, 2, axis=-1)[self.half]
        return (tensor.T if self.transpose else tensor).reshape(self.shape)

    def to_hf(self, value: np.ndarray) -> np.ndarray:
        """The inverse; of a fused tensor, our half."""
        *rows, last = self.hf_shape
        shape = (*rows, last if self.half is None else last // 2)
        return value.reshape(shape[::-1]).T if self.transpose else value.reshape(shape)


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
    yield Leaf("ffn.experts.gate", fused, (E, D, F), (E, D, 2 * F), half=0)
    yield Leaf("ffn.experts.up", fused, (E, D, F), (E, D, 2 * F), half=1)
    yield Leaf("ffn.experts.down", ("feed_forward.experts.down_proj",), (E, F, D), (E, F, D))


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
        # The first linear's input is one token after the pixel shuffle, W x shuffle^2 = F wide.
        for name, inputs in (("fc1", F), ("fc2", A)):
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


def from_hf(tensors: Mapping[str, np.ndarray], model: ModelConfig) -> Tree:
    """Hugging Face tensors as our parameters: a nested dict of arrays in `model.param_dtype`.

    Raises:
        UserError: a tensor is missing, left over or of another shape; the message lists them all.
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
    tree: Tree = {}
    dtype = np.dtype(model.param_dtype)
    for leaf in leaves:
        shape = (len(leaf.names), *leaf.shape) if leaf.stacked else leaf.shape
        value = np.empty(shape, dtype)
        for i, name in enumerate(leaf.names):  # layer by layer, so that only one copy of a leaf is ever in memory
            value[i if leaf.stacked else ...] = leaf.to_ours(tensors[name])
        *parents, last = leaf.keys
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def to_hf(params: Mapping[str, Any], model: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: our parameters (or a gradient of theirs) under Hugging Face's names and layout."""
    halves: dict[str, list[np.ndarray]] = {}
    for leaf in table(model):
        value: Any = params
        for key in leaf.keys:
            value = value[key]
        for i, name in enumerate(leaf.names):
            halves.setdefault(name, []).append(leaf.to_hf(value[i] if leaf.stacked else value))
    return {name: np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0] for name, parts in halves.items()}


def load_pretrained(directory: Path, model: ModelConfig) -> Tree:
    """The weights in a directory that Hugging Face's `save_pretrained` wrote: nested dict of arrays in our layout.

    Reads `config.json`, and `model.safetensors` or the shards that `model.safetensors.index.json` names.

    Raises:
        UserError: no such files, a damaged file, a config.json that describes another model, or tensors that are
            missing, left over, quantised or of another shape. Pickled weights are refused.
    """
    tensors = read_safetensors(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"Pretrained weights: {directory} has no config.json. Fetch it: shapes alone do not say it all."
        )
    theirs, ours = (_properties(m) for m in (model_config_from_hf(_json(path, path.read_bytes())), model))
    differences = [
        f"model.{name}: found {ours.get(name)}, expected {theirs.get(name)}"
        for name in sorted(theirs.keys() | ours.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        raise UserError(
            f"The config describes another model than {path}:\n  "
            + "\n  ".join(differences)
            + "\nGive the config these values; to change the model on purpose, change them in that config.json."
        )
    return from_hf(tensors, model)


def _properties(model: ModelConfig) -> dict[str, Any]:
    """What decides the computation, flat: (field, value)."""
    values = asdict(model)
    vision = values.pop("vision") or {}
    vision.pop("tiles_per_block", None)
    for name in (*_OURS, "moe_layers", "nope_layers", "moe_layer_step", "nope_layer_step"):
        del values[name]
    kinds = model.layer_kinds()
    values["moe_layers"] = tuple(i for i, kind in enumerate(kinds) if kind.moe)
    values["nope_layers"] = tuple(i for i, kind in enumerate(kinds) if not kind.rope)
    return values | {f"vision.{name}": value for name, value in vision.items()}


def read_safetensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint directory by name, mapped from its file (read when it is used).

    Raises:
        UserError: see `load_pretrained`.
    """
    if not directory.is_dir():
        raise UserError(
            f"Pretrained weights: no directory {directory}. Give the directory that holds model.safetensors."
        )
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        return _read_file(directory / "model.safetensors")
    if not index.exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        if pickles:
            raise UserError(
                f"Pretrained weights: {directory} holds {', '.join(pickles[:3])}, which are pickles: loading one runs "
                "whatever code is inside. Drover reads safetensors only; save the model again with transformers' "
                "save_pretrained, which writes them."
            )
        raise UserError(f"Pretrained weights: {directory} holds neither model.safetensors nor {index.name}.")
    weight_map = _json(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: found no weight_map from tensor names to file names. Fetch the file again.")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise UserError(f"{index} names {shard}, which is not in the directory. Fetch the missing file.")
        found = _read_file(directory / shard)
        listed = {name for name, where in weight_map.items() if where == shard}
        if found.keys() != listed:
            odd = sorted(found.keys() ^ listed)
            raise UserError(
                f"{directory / shard}: its tensors are not those that {index.name} lists, such as {odd[0]}."
            )
        tensors |= found
    return tensors


def _read_file(path: Path) -> dict[str, np.ndarray]:
    """One safetensors file: eight bytes of header length, a JSON header, then the tensors' bytes."""
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if size < 8 or length > size - 8:
        raise UserError(f"{path}: found {size} bytes, too few for a safetensors file. Fetch the file again.")
    header = _json(path, data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            stored, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, tensor {name}: found the entry {entry}. Fetch the file again.") from error
        dtype = _SAFETENSORS_DTYPES.get(stored)
        if dtype is None:
            raise UserError(
                f"{path}, tensor {name}: found {stored}, expected one of {', '.join(_SAFETENSORS_DTYPES)}. Drover reads "
                "weights that are not quantised."
            )
        if not begin <= end <= size or end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
            raise UserError(f"{path}, tensor {name}: its bytes are not all there. Fetch the file again.")
        tensors[name] = data[begin:end].view(dtype).reshape(shape)
    return tensors


def _json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: found no valid JSON ({error}). Fetch the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: found JSON that is not an object. Fetch the file again.")
    return value
