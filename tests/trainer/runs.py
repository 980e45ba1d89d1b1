"""A small made-up run, for the console and the report."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from model.config import ModelConfig
from trainer.config import RunConfig
from trainer.metrics import MetricsLogger
from trainer.sections import to_plain

RUN = RunConfig(name="tiny", steps=60, model=ModelConfig(num_layers=4, moe_layers=(1, 3), num_experts=4))

FACTS: dict[str, Any] = {
    "devices": "1 x cpu",
    "peak_flops": 2.5e11,
    "peak_source": "measured: best 1024 x 1024 float32 matrix product on this cpu",
    "flops_per_token": 3.3e7,
    "mfu_formula": "MFU = tokens/s x 3.3e+07 / peak FLOP/s",
    "parameters": 9_412_608,
    "active_parameters": 3_120_384,
    "time_to_first_step_s": 21.4,
    "compile_s": 12.9,
    "initialised_from": "scratch",
    "data_digest": "9c41f0aa",
    "versions": {"jax": "0.10.2"},
}


def records(steps: int = 60) -> list[dict[str, Any]]:
    """A record every ten steps and a held-out score every thirty."""
    found: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        scenes, text = 1 + 4 * math.exp(-step / 20), 2 + 4 * math.exp(-step / 30)
        found.append(
            {
                "kind": "train",
                "step": step,
                "loss": (scenes + text) / 2,
                "loss/scenes": scenes,
                "loss/text": text,
                "learning_rate": 1e-3 * step / 60,
                "grad_norm": 1 / step,
                "aux/load_balance": 1.1,
                "aux/router_z": 0.4,
                "tokens_seen": 4096 * step,
                "experts/load": [[0.25, 0.25, 0.3, 0.2], [0.7, 0.1, 0.2, 0.0]],
                "experts/imbalance": 2.8,
                "skipped": 0,
                "time/step": 0.25,
                "time/tokens_per_s": 16384.0,
                "time/mfu": 0.231,
                "time/data_wait": 0.004,
                "time/elapsed": 0.25 * step,
            }
        )
        if step % 30 == 0:
            losses = {"loss": 3.0, "loss/scenes": scenes + 0.1, "loss/text": text + 0.1}
            found.append({"kind": "eval", "step": step, **losses, "text_bits_per_byte": 2.345})
    return found


def png(colour: str = "red") -> str:
    """A base64 picture."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def evaluation(**sample: Any) -> dict[str, Any]:
    """Scores of two attributes, and one sample with the given changes."""
    asked = [
        ("colour", "seen", "real", 40, 36, 0.125),
        ("colour", "novel", "real", 20, 15, 0.125),
        ("colour", "seen", "shuffled", 40, 6, 0.125),
        ("colour", "novel", "shuffled", 20, 3, 0.125),
        ("colour", "seen", "blank", 60, 6, 0.125),
        ("size", "seen", "real", 40, 30, 0.5),
        ("size", "seen", "shuffled", 40, 20, 0.5),
    ]
    names = ("attribute", "combination", "condition", "count", "correct", "chance")
    plain = {
        "image": png(),
        "question": "What colour is it?",
        "answers": ["red", "it is red"],
        "predicted": "red",
        "correct": True,
        "attribute": "colour",
        "combination": "novel",
    }
    return {
        "step": 60,
        "text_bits_per_byte": 2.125,
        "loss": {"text": 2.0},
        "questions": [dict(zip(names, row, strict=True)) for row in asked],
        "samples": [{**plain, **sample}],
    }


def write_run(
    workdir: Path, steps: int = 60, scores: dict[str, Any] | None = None, facts: dict[str, Any] | None = None
) -> Path:
    """A run directory that has come `steps` far, and has been evaluated if there are scores."""
    with MetricsLogger(workdir / "metrics", 0) as logger:
        for record in records(steps):
            logger.write(record)
    (workdir / "config.json").write_text(json.dumps(to_plain(RUN)))
    (workdir / "run.json").write_text(json.dumps(FACTS if facts is None else facts))
    if scores is not None:
        (workdir / "evaluation.json").write_text(json.dumps(scores))
    return workdir
