"""The default run, whole: it learns to see, and says so in its report."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def interval(correct: int, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    z, share = 1.96, correct / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


@pytest.mark.slow
def test_the_default_run_answers_questions_about_pictures_it_has_never_seen(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from launch.cli import main; raise SystemExit(main())", "train"]
    command += ["--config", "configs/tiny.py", "--workdir", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr
    warnings = [line for line in done.stderr.splitlines() if not line.startswith("preparing built-in data: ")]
    assert not warnings, done.stderr
    print(done.stdout[-2000:])
    assert (tmp_path / "report.html").stat().st_size > 50_000
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["text_bits_per_byte"] < 2.6
    for attribute in ("colour", "shape"):
        rows = {
            (row["condition"], row["combination"]): row
            for row in evaluation["questions"]
            if row["attribute"] == attribute
        }
        for combination in ("seen", "novel"):
            row = rows["real", combination]
            assert interval(row["correct"], row["count"])[0] > row["chance"], f"{attribute}, {combination}: {row}"
        for condition in ("shuffled", "blank"):
            both = [rows[condition, combination] for combination in ("seen", "novel")]
            correct, count = sum(row["correct"] for row in both), sum(row["count"] for row in both)
            low, _ = interval(correct, count)
            assert low < both[0]["chance"], f"{attribute} with {condition} pictures: {correct} of {count}"
