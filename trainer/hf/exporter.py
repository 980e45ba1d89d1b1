"""A checkpoint of ours as a Hugging Face directory, tensor by tensor, that transformers and vLLM open."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from data.tokenizer import Tokenizer
from sharding.errors import UserError
from trainer.checkpoint import Checkpoints, locate
from trainer.config import RunConfig
from trainer.hf.config import model_config_from_hf
from trainer.hf.descriptions import write_descriptions
from trainer.hf.files import Planned, finished_or_absent, read_json, write_tensors
from trainer.hf.importer import KEPT
from trainer.hf.load import same_model
from trainer.hf.table import Leaf, hf_rows, pieces, table
from trainer.progress import byte_bar
from trainer.rundir import RunDirectory
from trainer.streaming import Stored

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
"""Precisions that an export may be asked for."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    step: int
    tensors: int
    nbytes: int


def export_checkpoint(
    source: Path, target: Path, dtype: str | None, max_shard_bytes: int, told: Callable[[str], None]
) -> Exported:
    """Writes the weights of a run as a Hugging Face directory: safetensors, config, tokenizer and processor files.

    Args:
        source: a run directory, whose newest checkpoint is taken, or one of its checkpoints.
        target: a new or empty directory.
        dtype: one of `DTYPES`; None keeps the precision in which each tensor is stored.
        max_shard_bytes: bytes of a file of weights at most.
        told: called with a line about each thing that is not what one might expect.

    Raises:
        UserError: no checkpoint, one that does not hold the weights of its config's model, a model that Hugging Face's
            Llama 4 cannot express, or no room; nothing is written then.
    """
    folder, step = locate(source)
    checkpoints = Checkpoints(folder)
    run, metadata, root = checkpoints.run(step), checkpoints.metadata(step), folder.parent
    tokenizer = _tokenizer(RunDirectory(root), metadata["tokenizer_digest"])
    stored = Stored(folder / str(step) / "state")
    _check(stored, run, folder / str(step))

    def stored_dtype(leaf: Leaf) -> np.dtype:
        return np.dtype(DTYPES[dtype]) if dtype else stored.array(_name(leaf)).dtype.numpy_dtype

    made_of = pieces(run.model)
    plan = [Planned(name, stored_dtype(of[0].leaf), of[0].leaf.hf_shape) for name, of in made_of.items()]

    def runs(tensor: Planned) -> Iterator[np.ndarray]:
        return hf_rows(made_of[tensor.name], lambda leaf, part: stored.read(_name(leaf), part))

    nbytes = sum(tensor.nbytes for tensor in plan)
    with finished_or_absent(target, nbytes) as partial:
        widest = max((tensor.dtype for tensor in plan), key=lambda dtype: dtype.itemsize)
        if _kept(root / KEPT, run):
            for path in (root / KEPT).iterdir():
                shutil.copyfile(path, partial / path.name)
            if dtype or "imported_from" not in metadata:  # else they are the very tensors that the file came with
                _set_dtype(partial / "config.json", widest.name)
        else:
            write_descriptions(partial, run, tokenizer, widest.name, told)
        with byte_bar(f"exporting step {step}", nbytes) as advance:
            write_tensors(partial, plan, runs, max_shard_bytes, advance)
    return Exported(step, len(plan), nbytes)


def _name(leaf: Leaf) -> tuple[str, ...]:
    return ("params", *(str(key) for key in leaf.keys))


def _tokenizer(directory: RunDirectory, digest: str | None) -> Tokenizer | None:
    return directory.load_tokenizer(digest) if digest else None


def _check(stored: Stored, run: RunConfig, path: Path) -> None:
    """Refuses what does not fit the config, and what Hugging Face's Llama 4 has no place for."""
    if run.model.router_bias_rate:
        raise UserError(
            f"checkpoint {path}: was trained with model.router_bias_rate={run.model.router_bias_rate}, and chooses "
            "experts by router logits plus a bias. Hugging Face's Llama 4 has no such bias; an export would be another "
            "model. Train without it to export."
        )
    if run.model.audio:
        raise UserError(
            f"checkpoint {path}: has an audio encoder (model.audio). Hugging Face's Llama 4 has no place for one; an export "
            "would be another model. Train with model.audio=none to export."
        )
    vision = run.model.vision
    if vision and vision.ffn_size != vision.hidden_size * vision.shuffle**2:
        raise UserError(
            f"checkpoint {path}: has model.vision.ffn_size={vision.ffn_size}. Hugging Face's Llama 4 has one number for "
            "it and for the adapter's input, model.vision.hidden_size x model.vision.shuffle^2 = "
            f"{vision.hidden_size * vision.shuffle**2}; it cannot hold another. Train with that width to export."
        )
    expected = {_name(leaf): leaf.shape for leaf in table(run.model)}
    found = {name: tuple(stored.array(name).shape) for name in stored.under("params")}
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        lines = [f"{'.'.join(n)}: found {found.get(n, 'nothing')}, expected {expected.get(n, 'nothing')}" for n in odd]
        raise UserError(
            f"checkpoint {path}: does not hold the weights of its own config, {len(odd)} arrays differ:\n  "
            + "\n  ".join(lines[:5])
            + "\nRestore the folder from a copy."
        )


def _kept(folder: Path, run: RunConfig) -> bool:
    """Whether the files that came with an imported model still describe this one."""
    config = folder / "config.json"
    return config.is_file() and same_model(model_config_from_hf(read_json(config)), run.model)


def _set_dtype(path: Path, dtype: str) -> None:
    """Puts the precision of the weights into a config.json, in whichever spelling it has."""
    config = read_json(path)
    for section in (config, config.get("text_config"), config.get("vision_config")):
        for name in ("dtype", "torch_dtype"):
            if section and name in section:
                section[name] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n")
