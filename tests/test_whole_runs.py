"""The default run, whole: it learns to see, and says so in its report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.report_scores import Score

ROOT = Path(__file__).parents[1]


def trained(config: str, workdir: Path, *overrides: str) -> dict[str, Any]:
    """Trains a config as a user does; its held-out scores."""
    command = [sys.executable, "-c", "from launch.cli import main; raise SystemExit(main())", "train"]
    command += ["--config", f"configs/{config}.py", "--workdir", str(workdir), *overrides]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    warnings = [line for line in done.stderr.splitlines() if not line.startswith("preparing built-in data: ")]
    assert not warnings, done.stderr
    print(done.stdout[-2500:])
    assert (workdir / "report.html").stat().st_size > 50_000
    return json.loads((workdir / "evaluation.json").read_text())


def score(rows: list[dict[str, Any]]) -> Score:
    return Score(sum(row["correct"] for row in rows), sum(row["count"] for row in rows))


def check(evaluation: dict[str, Any], attributes: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Surely above chance: each of these attributes for combinations that were seen; for novel ones, of which so few are asked
    about that luck would decide, all of them and the others together. And no more than chance with other and blank files."""

    def of(condition: str, combination: str, attributes: tuple[str, ...]) -> list[dict[str, Any]]:
        found = [row for row in evaluation["questions"] if row["attribute"] in attributes]
        return [row for row in found if row["condition"] == condition and combination in ("", row["combination"])]

    for row in of("real", "seen", attributes):
        assert score([row]).interval()[0] > row["chance"], row
    novel = of("real", "novel", attributes + others)
    assert score(novel).interval()[0] > sum(row["chance"] * row["count"] for row in novel) / score(novel).count, novel
    for attribute in attributes:
        for condition in ("shuffled", "blank"):
            rows = of(condition, "", (attribute,))
            assert score(rows).interval()[0] < max(row["chance"] for row in rows), rows


@pytest.mark.slow
def test_the_default_run_answers_questions_about_pictures_it_has_never_seen(tmp_path: Path) -> None:
    evaluation = trained("tiny", tmp_path, "--config.steps=600")  # of 1400, to spare time
    assert evaluation["text_bits_per_byte"] < 2.7
    check(evaluation, ("colour", "shape"), others=("size", "position", "count"))
