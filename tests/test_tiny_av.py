"""The run of all four modalities, whole: it tells digits from sounds, and is to tell motion from clips."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.report_scores import Score

ROOT = Path(__file__).parents[1]
Evaluation = dict[str, Any]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    workdir = tmp_path_factory.mktemp("tiny_av")
    command = [sys.executable, "-c", "from launch.cli import main; raise SystemExit(main())", "train"]
    command += ["--config", "configs/tiny_av.py", "--workdir", str(workdir)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=4800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    print(done.stdout[-2500:])
    assert (workdir / "report.html").stat().st_size > 50_000
    return json.loads((workdir / "evaluation.json").read_text())


def score(rows: list[dict[str, Any]]) -> Score:
    return Score(sum(row["correct"] for row in rows), sum(row["count"] for row in rows))


def check(evaluation: Evaluation, attribute: str) -> None:
    """Surely three times chance, for novel combinations too, and no more than chance with other and blank files."""
    of_it = [row for row in evaluation["questions"] if row["attribute"] == attribute]
    for combination in ("seen", "novel"):
        rows = [row for row in of_it if (row["condition"], row["combination"]) == ("real", combination)]
        low, _ = score(rows).interval()
        assert low > 3 * rows[0]["chance"], f"{attribute}, {combination}: {rows}"
    chance = max(row["chance"] for row in of_it)
    for condition in ("shuffled", "blank"):
        other = score([row for row in of_it if row["condition"] == condition])
        assert other.interval()[0] < chance, f"{attribute} with {condition} files: {other}"


@pytest.mark.slow
@pytest.mark.parametrize("attribute", ["digit", "digits"])
def test_sounds_are_read_back_three_times_better_than_chance(evaluation: Evaluation, attribute: str) -> None:
    check(evaluation, attribute)


@pytest.mark.slow
@pytest.mark.xfail(reason="motion was at chance in every run so far; see configs/tiny_av.py", strict=True)
def test_motion_is_told_three_times_better_than_chance(evaluation: Evaluation) -> None:
    check(evaluation, "motion")


@pytest.mark.slow
def test_every_source_has_a_held_out_loss(evaluation: Evaluation) -> None:
    assert set(evaluation["loss"]) == {"loss", *(f"loss/{name}" for name in ("clips", "scenes", "text", "tones"))}
