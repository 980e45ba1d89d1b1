"""The run of all four modalities, whole: it tells motion from clips and digits from sounds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.report_scores import Score

ROOT = Path(__file__).parents[1]


def score(rows: list[dict[str, Any]]) -> Score:
    return Score(sum(row["correct"] for row in rows), sum(row["count"] for row in rows))


@pytest.mark.slow
def test_a_run_on_text_pictures_video_and_sound_understands_clips_and_sounds_of_new_combinations(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", "from launch.cli import main; raise SystemExit(main())", "train"]
    command += ["--config", "configs/tiny_av.py", "--workdir", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=4800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    print(done.stdout[-2500:])
    assert (tmp_path / "report.html").stat().st_size > 50_000
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(evaluation["loss"]) == {"loss", *(f"loss/{name}" for name in ("clips", "scenes", "text", "tones"))}
    for attribute in ("motion", "digit", "digits"):
        of_it = [row for row in evaluation["questions"] if row["attribute"] == attribute]
        for combination in ("seen", "novel"):
            rows = [row for row in of_it if (row["condition"], row["combination"]) == ("real", combination)]
            low, _ = score(rows).interval()
            assert low > 3 * rows[0]["chance"], f"{attribute}, {combination}: {rows}"
        chance = max(row["chance"] for row in of_it)
        for condition in ("shuffled", "blank"):
            other = score([row for row in of_it if row["condition"] == condition])
            assert other.interval()[0] < chance, f"{attribute} with {condition} files: {other}"
    colour = [row for row in evaluation["questions"] if (row["attribute"], row["condition"]) == ("colour", "real")]
    assert score(colour).interval()[0] > max(row["chance"] for row in colour)
