"""Hugging Face directories to test with: the stored models, in one file or two, in any precision, whole or damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from trainer.hf.files import open_tensors

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = ("text_scout", "text_interleaved", "text_maverick", "multimodal")


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor, in memory."""
    return {name: tensor[...] for name, tensor in open_tensors(directory).items()}


def write(directory: Path, tensors: dict[str, np.ndarray], source: Path, shards: int = 1) -> Path:
    """A directory with these tensors, written by the library `safetensors`, and the config.json of `source`."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "config.json", directory)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = sorted(tensors)
    weight_map = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
