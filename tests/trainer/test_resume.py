"""A run that is killed and started again is the run that was never killed, bit for bit (timings aside)."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 40


def start(workdir: Path, *arguments: str) -> subprocess.Popen[str]:
    """`drover train` on the micro config, in a process of its own."""
    command = [sys.executable, "-c", "from launch.cli import main; raise SystemExit(main())", "train"]
    command += ["--config", "tests/micro.py", "--workdir", str(workdir), f"--config.steps={STEPS}", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def metrics(workdir: Path) -> list[dict]:
    """Records without what depends on the clock."""
    lines = (workdir / "metrics" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")} for line in lines]


def logged(workdir: Path) -> int:
    path = workdir / "metrics" / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def reached(workdir: Path, step: int) -> bool:
    return logged(workdir) >= step


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written just now."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in entry.name for entry in folder.iterdir())


def wait_until(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir))
    assert logged(workdir) == STEPS
    return workdir


def test_killed_during_steps_and_saves_the_run_goes_on_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    moments = [
        lambda: logged(tmp_path) >= 13,  # between the first and the second checkpoint
        lambda: saving(tmp_path),  # within a save
        lambda: logged(tmp_path) >= 34,
    ]
    for moment in moments:
        process = start(tmp_path)
        wait_until(moment, process)
        time.sleep(generator.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(tmp_path))
    assert metrics(tmp_path) == metrics(undisturbed)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(
        (undisturbed / "evaluation.json").read_text()
    )


def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    for number, moment in ((signal.SIGTERM, 5), (signal.SIGINT, 17)):
        process = start(tmp_path)
        wait_until(functools.partial(reached, tmp_path, moment), process)
        process.send_signal(number)
        sent = time.monotonic()
        output = finish(process, 128 + number)
        assert time.monotonic() - sent < 30
        assert "goes on from there" in output
        assert max(int(entry.name) for entry in (tmp_path / "checkpoints").iterdir()) >= moment
    finish(start(tmp_path))
    assert metrics(tmp_path) == metrics(undisturbed)


def test_before_the_first_step_a_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_until(lambda: (tmp_path / ".lock").exists() and (tmp_path / ".lock").read_text(), process)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    finish(process, 128 + signal.SIGINT)
    assert time.monotonic() - sent < 10


def test_two_runs_on_one_directory_the_second_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    first = start(tmp_path)
    wait_until(lambda: logged(tmp_path) >= 1, first)
    output = finish(start(tmp_path), 2)
    assert f"process {first.pid}" in output and "--workdir" in output
    first.kill()
    first.communicate()


def test_another_config_is_refused_with_the_difference_unless_asked_for(undisturbed: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    output = finish(start(workdir, "--config.optimizer.peak_lr=1e-4"), 2)
    assert "optimizer.peak_lr: 0.003 -> 0.0001" in output and "--allow-config-change" in output
    finish(start(workdir, f"--config.steps={STEPS + 2}", "--allow-config-change"))
    assert [record["step"] for record in metrics(workdir) if record["kind"] == "train"][-1] == STEPS + 2


def test_other_data_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    output = finish(start(workdir, "--config.data.seed=1", "--allow-config-change"), 2)
    assert "was trained on data" in output and "--config.init.from_run" in output
    for name in ("config.json", "tokenizer.json"):
        assert (workdir / name).read_text() == (undisturbed / name).read_text()  # a refused start changes nothing


def test_a_finished_run_says_so_at_once_and_shows_its_scores(undisturbed: Path) -> None:
    before = (undisturbed / "metrics" / "metrics.jsonl").read_text()
    output = finish(start(undisturbed))
    assert f"has all its {STEPS} steps" in output and "report.html" in output
    assert (undisturbed / "metrics" / "metrics.jsonl").read_text() == before


def test_a_new_run_starts_from_the_weights_of_another(undisturbed: Path, tmp_path: Path) -> None:
    output = finish(start(tmp_path, f"--config.init.from_run={undisturbed}"))
    assert f"weights of {undisturbed}, step {STEPS}" in output
    assert metrics(tmp_path)[0]["loss"] < metrics(undisturbed)[0]["loss"] - 1
