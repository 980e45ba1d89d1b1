"""Real `drover train` processes on the micro config, to be watched, signalled and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 40
"""Steps of the micro config here."""


def start(
    workdir: Path,
    *arguments: str,
    through: tuple[str, ...] = (),
    config: str = "tests/micro.py",
    steps: int = STEPS,
    environment: dict[str, str] | None = None,
    command: str = "train",
    folder: str = "--workdir",
    before: str = "",
) -> subprocess.Popen[str]:
    """`drover train`, or another command, in a process of its own, started through another program if one is given;
    `before`: Python that runs in it first."""
    drover = [sys.executable, "-c", f"{before}\nfrom launch.cli import main\nraise SystemExit(main())", command]
    drover += ["--config", config, folder, str(workdir), f"--config.steps={steps}", *arguments]
    return subprocess.Popen(
        [*through, *drover],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | (environment or {}),
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


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, f"ended before it could be killed:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def killed_when(condition: Callable[[], bool], workdir: Path, *arguments: str, delay: float = 0) -> None:
    """Starts a run and kills it with SIGKILL, a moment after the condition holds."""
    process = start(workdir, *arguments)
    wait_until(condition, process)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
