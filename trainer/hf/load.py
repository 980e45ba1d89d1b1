"""A Hugging Face directory as a model: its config, its tensors all accounted for, its weights onto devices."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.tokenizer import Tokenizer, load_file
from model.config import ModelConfig
from sharding.errors import UserError
from trainer.hf.config import read_model_config
from trainer.hf.files import FileTensor, open_tensors
from trainer.hf.table import Tree, check_tensors, place, table

_OURS = (
    "dtype",
    "param_dtype",
    "remat",
    "scan_layers",
    "expert_kernel",
    "capacity_factor",
    "router_bias_rate",
    "init_std",
    "temperature_from",
)
"""Options of `ModelConfig` that are no property of the weights; the others must agree with the checkpoint's config."""


@dataclass(frozen=True)
class HfModel:
    """A directory that was opened: everything about it was checked but the numbers, which are not read yet."""

    directory: Path
    model: ModelConfig
    """The one that config.json describes."""
    tensors: Mapping[str, FileTensor]
    tokenizer: Tokenizer | None
    """None where the directory has no tokenizer.json."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def abstract(self, dtype: str | None = None) -> Tree:
        """Our parameters as shapes; in their own dtypes, or in the one given."""
        tree: Tree = {}
        for leaf in table(self.model):
            own = self.tensors[leaf.names[0]].dtype
            place(tree, leaf.keys, jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype) if dtype else own))
        return tree

    def weights(self, like: Tree, kept: tuple[int, ...] | None = None) -> Tree:
        """Our parameters as device arrays, with the dtypes and shardings of `like` (a tree of shapes); of the super-blocks
        only those that are kept.

        Each device's part is read by itself, so that a host never holds more than its own parts and one tensor.
        """
        return jax.tree.unflatten(jax.tree.structure(like), list(self.weights_in_turn(like, kept)))

    def weights_in_turn(self, like: Tree, kept: tuple[int, ...] | None = None) -> Iterator[jax.Array]:
        """The same one at a time: the leaves of `like` in order."""
        leaves = {leaf.keys: leaf for leaf in table(self.model)}
        for path, wanted in jax.tree_util.tree_leaves_with_path(like):
            leaf = leaves[tuple(entry.key for entry in path)]
            if kept is not None and leaf.keys[0] == "blocks":
                leaf = leaf._replace(names=tuple(leaf.names[i] for i in kept))
            yield jax.make_array_from_callback(
                leaf.shape,
                wanted.sharding,
                lambda index, leaf=leaf, dtype=wanted.dtype: leaf.read(self.tensors, dtype, index),
            )


def open_model(directory: Path, expected: ModelConfig | None = None) -> HfModel:
    """Opens a directory that transformers' `save_pretrained` wrote, and accounts for every tensor.

    Args:
        directory: holds `config.json`, and `model.safetensors` or shards with their index; maybe `tokenizer.json`.
        expected: the model that the caller is about to compute, if it has one in mind.

    Raises:
        UserError: files are missing or damaged, weights are pickled or quantised, config.json describes what Drover does
            not compute or another model than `expected`, tensors are missing, left over or of another shape, or the
            tokenizer has ids beyond the vocabulary.
    """
    directory = directory.expanduser()
    tensors = open_tensors(directory)
    model = read_model_config(directory)
    if expected is not None:
        _check_same(model, expected, directory / "config.json")
    check_tensors(tensors, model)
    tokenizer = load_file(directory) if (directory / "tokenizer.json").is_file() else None
    if tokenizer and tokenizer.size > model.vocab_size:
        raise UserError(
            f"{directory / 'tokenizer.json'}: found ids up to {tokenizer.size - 1}, expected less than {model.vocab_size}, "
            "the vocab_size of config.json. The tokenizer belongs to another model; fetch both files again."
        )
    return HfModel(directory, model, tensors, tokenizer)


def _check_same(found: ModelConfig, expected: ModelConfig, path: Path) -> None:
    if differences := differing_properties(found, expected):
        raise UserError(
            f"The config describes another model than {path}:\n  "
            + "\n  ".join(differences)
            + "\nGive the config these values; to change the model on purpose, change them in that config.json."
        )


def differing_properties(source: ModelConfig, model: ModelConfig, but: tuple[str, ...] = ()) -> list[str]:
    """Where a model computes otherwise than the one whose weights it takes, a line each, some properties aside."""
    theirs, ours = _properties(source), _properties(model)
    return [
        f"model.{name}: found {ours.get(name)}, expected {theirs.get(name)}"
        for name in sorted((theirs.keys() | ours.keys()) - set(but))
        if ours.get(name) != theirs.get(name)
    ]


def _properties(model: ModelConfig) -> dict[str, Any]:
    """What decides the computation, flat: the option's name and its value."""
    values = asdict(model)
    encoders = {name: values.pop(name) or {} for name in ("vision", "audio")}
    encoders["vision"].pop("tiles_per_block", None)
    encoders["audio"].pop("windows_per_block", None)
    for name in (*_OURS, "moe_layers", "nope_layers", "moe_layer_step", "nope_layer_step"):
        values.pop(name, None)
    kinds = model.layer_kinds()
    values["moe_layers"] = tuple(i for i, kind in enumerate(kinds) if kind.moe)
    values["nope_layers"] = tuple(i for i, kind in enumerate(kinds) if not kind.rope)
    return values | {f"{name}.{option}": value for name, of in encoders.items() for option, value in of.items()}


def same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configs compute the same from the same weights, precision and speed aside."""
    return _properties(one) == _properties(other)
