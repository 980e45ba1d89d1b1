"""Stored answers of Hugging Face's Llama 4 as our batches: what `tests/golden/README.md` describes, in our terms."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig
from trainer import hf

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
    def config(self) -> ModelConfig:
        return hf.model_config_from_hf(self.config_json)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        return hf.from_hf(hf.read_safetensors(self.path.parent), self.config)

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
    def quirky_rows(self) -> list[int]:
        """Rows in which Hugging Face's temperature tuning differs from ours.

        It counts from the start of the row where ours counts from the start of the document, so a row with left padding
        or several documents differs if that crosses a multiple of the floor.
        """
        config = self.config
        if not config.temperature_tuning or all(kind.rope for kind in config.layer_kinds()):
            return []
        theirs = (np.arange(self.real_BS.shape[1]) + 1) // config.temperature_floor
        ours = (self.batch["positions"] + 1) // config.temperature_floor
        return np.flatnonzero(((theirs != ours) & self.real_BS).any(axis=1)).tolist()


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
