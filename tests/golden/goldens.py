"""Stored answers of Hugging Face's Llama 4 as our batches: what `tests/golden/README.md` describes, in our terms."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig
from trainer.hf.config import model_config_from_hf
from trainer.hf.files import open_tensors
from trainer.hf.table import from_hf

HERE = Path(__file__).parent
SHIPPED = tuple(HERE / name for name in ("text_scout", "text_interleaved", "text_maverick", "multimodal"))
IGNORED = -100
"""The label that Hugging Face leaves out of the loss."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """One reference file and the model that it was made with."""

    path: Path

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    @functools.cached_property
    def answers(self) -> dict[str, np.ndarray]:
        with np.load(self.path) as file:
            return dict(file)

    @functools.cached_property
    def trajectory(self) -> dict[str, np.ndarray]:
        """Losses of optimizer steps on the fixed batch of `reference.npz`; empty if there are none."""
        path = self.path.with_name("adamw_trajectory.npz")
        if not path.exists():
            return {}
        with np.load(path) as file:
            return dict(file)

    @functools.cached_property
    def config_json(self) -> dict[str, Any]:
        config = json.loads((self.path.parent / "config.json").read_text())
        if "config_override" in self.answers:
            config.get("text_config", config).update(json.loads(str(self.answers["config_override"])))
        return config

    @functools.cached_property
    def default_config(self) -> ModelConfig:
        """The model as Drover reads it from config.json."""
        return model_config_from_hf(self.config_json)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """The same; the temperature counts from the row's start, as in Hugging Face, where this file can tell."""
        where = "row" if self.by_row_BS.any() else "document"
        return dataclasses.replace(self.default_config, temperature_from=where)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        return from_hf(open_tensors(self.path.parent), self.default_config)

    @functools.cached_property
    def real_BS(self) -> np.ndarray:
        """False at padding."""
        tokens = self.answers["input_ids"]
        return self.answers.get("attention_mask", np.ones(tokens.shape)).astype(bool)

    @functools.cached_property
    def batch(self) -> dict[str, np.ndarray]:
        """Our batch; its tiles are floating point, already normalised."""
        answers, real = self.answers, self.real_BS
        tokens = answers["input_ids"].astype(np.int32)
        if "position_ids" in answers:
            positions = answers["position_ids"].astype(np.int32)
        else:
            positions = np.where(real, np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
        segments = np.where(real, np.cumsum((positions == 0) & real, axis=1), 0).astype(np.int32)
        labels = np.concatenate([answers["labels"][:, 1:], np.full((len(tokens), 1), IGNORED)], axis=1)
        counted = labels != IGNORED
        batch = {
            "tokens": tokens,
            "targets": np.where(counted, labels, 0).astype(np.int32),
            "loss_weights": counted.astype(np.float32),
            "segment_ids": segments,
            "positions": positions,
            "source_ids": (segments > 0).astype(np.int32),
        }
        if "pixel_values" in answers:
            batch |= self._images(tokens)
        return batch

    def _images(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        per_tile = int(self.answers["num_patch_tokens_per_tile"])
        slots = [np.flatnonzero(row == self.config_json["image_token_index"]).reshape(-1, per_tile) for row in tokens]
        tiles = self.answers["pixel_values"].transpose(0, 2, 3, 1)
        most = max(map(len, slots))
        positions = np.full((len(tokens), most, per_tile), -1, np.int32)
        images = np.zeros((len(tokens), most, *tiles.shape[1:]), np.float32)
        start = 0
        for b, rows in enumerate(slots):
            positions[b, : len(rows)] = rows
            images[b, : len(rows)] = tiles[start : start + len(rows)]
            start += len(rows)
        return {"image_tiles": images, "image_positions": positions}

    @functools.cached_property
    def by_row_BS(self) -> np.ndarray:
        """[B,S]: the tokens of the documents whose answers depend on where in its row the document began.

        Hugging Face's temperature counts from there: after padding or another document it may pass the floor sooner.
        """
        config, segments = self.default_config, self.batch["segment_ids"]
        if not config.temperature_tuning or all(kind.rope for kind in config.layer_kinds()):
            return np.zeros_like(self.real_BS)
        theirs = (np.arange(self.real_BS.shape[1]) + 1) // config.temperature_floor
        ours = (self.batch["positions"] + 1) // config.temperature_floor
        differs = (theirs != ours) & self.real_BS
        return np.stack([np.isin(row, row[differs[b]]) for b, row in enumerate(segments)])


def goldens(directories: tuple[Path, ...]) -> list[Golden]:
    """Every reference file in these directories: a model's own, or a parent of such directories."""
    found = []
    for directory in directories:
        parents = sorted(path.parent for path in directory.glob("*/config.json"))
        models = [directory] if (directory / "config.json").is_file() else parents
        files = [file for model in models for file in sorted(model.glob("reference*.npz"))]
        if not files:
            raise FileNotFoundError(f"no config.json with reference*.npz in {directory} or in the directories below it")
        found += [Golden(file) for file in files]
    return found
