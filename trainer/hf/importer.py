"""A Hugging Face directory as a run directory at step 0, tensor by tensor, through no more memory than one takes."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.sources import load_tokenizer
from trainer.config import RunConfig
from trainer.hf.descriptions import image_options
from trainer.hf.files import INDEX, finished_or_absent
from trainer.hf.load import HfModel, open_model
from trainer.hf.table import Leaf, table
from trainer.initialise import check_same_tokenizer
from trainer.progress import byte_bar
from trainer.rundir import RunDirectory, write_json
from trainer.sections import to_plain
from trainer.streaming import Name, Streamed, save_streamed

KEPT = "hf"
"""Folder of a run directory with the files that describe an imported model, for an export to give back."""

_DESCRIPTIONS = ("*.json", "*.jinja", "*.md", "*.txt", "LICENSE*")
_KEPT_BYTES = 64 * 2**20


def import_checkpoint(source: Path, target: Path, run: RunConfig | None, copied: Callable[[str], None]) -> HfModel:
    """Makes `target` a run directory whose step 0 holds the weights of `source`, in their own precision.

    Args:
        source: Hugging Face directory; see `trainer.hf.load.open_model`.
        target: a new or empty directory.
        run: the run to start from these weights, whose model and tokenizer must be those of `source`; None for
            defaults around it.
        copied: called with a line about each thing that is not what one might expect.

    Raises:
        UserError: anything is wrong with `source`, `run` or `target`, or the disk is too small; nothing is written then.
    """
    found = open_model(source, run.model if run else None)
    if found.tokenizer is None:
        copied(
            f"{source} has no tokenizer.json: the model can be scored on token ids and exported, but not prompted "
            "with text, and runs that start from it cannot be told whether their tokenizer is the right one."
        )
    elif run:
        # Training would refuse another one, after everything has been copied.
        ours = load_tokenizer(run.data, run.media).digest
        check_same_tokenizer(f"{found.directory}/tokenizer.json", found.tokenizer.digest, ours)
    with finished_or_absent(target, found.nbytes) as partial:
        run = run or default_run(found, target)
        directory = RunDirectory(partial)
        metadata = {
            "config": to_plain(run),
            "next_batch": 0,
            "imported_from": str(found.directory.absolute()),
            "tokenizer_digest": found.tokenizer.digest if found.tokenizer else None,
        }
        with byte_bar(f"importing {source}", found.nbytes) as advance:
            save_streamed(directory.checkpoints, 0, _leaves(found, advance), metadata)
        if found.tokenizer:
            directory.tokenizer.write_text(found.tokenizer.serialised)
        _keep_descriptions(found.directory, partial / KEPT)
        write_json(directory.config, to_plain(run))
    return found


def _leaves(found: HfModel, advance: Callable[[int], None]) -> dict[Name, Streamed]:
    def streamed(leaf: Leaf) -> Streamed:
        dtype = found.tensors[leaf.names[0]].dtype

        def parts() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
            for part in leaf.parts():
                value = leaf.part(found.tensors, part)
                yield part, value
                advance(value.nbytes)

        return Streamed(leaf.shape, dtype, parts, leaf.part_dims)

    return {("params", *(str(key) for key in leaf.keys)): streamed(leaf) for leaf in table(found.model)}


def _keep_descriptions(source: Path, target: Path) -> None:
    """Copies what describes the model: config, tokenizer, processor, chat template, licence; no weights, no code."""
    target.mkdir()
    for path in sorted({path for pattern in _DESCRIPTIONS for path in source.glob(pattern)}):
        if path.is_file() and path.stat().st_size <= _KEPT_BYTES and path.name != INDEX:
            shutil.copyfile(path, target / path.name)


def default_run(found: HfModel, directory: Path) -> RunConfig:
    """A run around a Hugging Face model; computes in bfloat16 where its weights are in 16 bits.

    `directory` names the run, and holds the tokenizer that its data would be read with.
    """
    widths = {tensor.dtype.itemsize for tensor in found.tensors.values()}
    model = dataclasses.replace(found.model, dtype="bfloat16" if max(widths) == 2 else "float32")
    data = DataConfig(
        mixture={"text": 1.0},
        tokenizer=str(directory.expanduser().absolute() / "tokenizer.json") if found.tokenizer else "bytes",
        **(image_options(found.directory, model.vision) if model.vision else {}),
    )
    name = directory.expanduser().absolute().name.lstrip(".") or "imported"
    return RunConfig(name=name, model=model, data=data)
