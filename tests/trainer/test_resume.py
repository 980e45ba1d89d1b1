"""A run that is killed and started again is the run that was never killed, bit for bit (timings aside)."""

import functools
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.trainer.processes import STEPS, finish, killed_when, logged, metrics, reached, saving, start, wait_until


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir))
    assert logged(workdir) == STEPS
    return workdir


def test_killed_during_steps_and_saves_the_run_goes_on_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    """With worker processes making the batches, where the undisturbed run has threads: that makes no difference."""
    workers = ("--config.data.workers=1", "--allow-config-change")
    generator = random.Random(0)
    for moment in (4, 13, 27):  # before the first checkpoint, and between others
        killed_when(functools.partial(reached, tmp_path, moment), tmp_path, *workers, delay=generator.uniform(0, 0.02))
    torn = False
    for _ in range(3):  # within a save
        killed_when(functools.partial(saving, tmp_path), tmp_path, *workers)
        torn = saving(tmp_path)
        if torn or logged(tmp_path) == STEPS:
            break
    assert torn
    killed_when(functools.partial(reached, tmp_path, STEPS), tmp_path, *workers)  # before or in the last evaluation
    finish(start(tmp_path, *workers))
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
    wait_until(lambda: (tmp_path / ".lock").exists() and bool((tmp_path / ".lock").read_text()), process)
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


def test_another_mixture_goes_on_and_is_kept_in_the_journal(undisturbed: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    mixture = ("--config.data.mixture.scenes=0", "--config.data.mixture.text=1", "--allow-config-change")
    more = STEPS + 10
    killed_when(functools.partial(reached, workdir, STEPS + 4), workdir, *mixture, f"--config.steps={more}")
    finish(start(workdir, *mixture, f"--config.steps={more}"))
    saved = json.loads((workdir / "checkpoints" / str(more) / "run" / "metadata").read_text())
    assert [first for first, _ in saved["journal"]] == [0, STEPS]
    assert [options["mixture"]["scenes"] for _, options in saved["journal"]] == [0.7, 0.0]
    assert saved["data_position"]["taken"].keys() == {"scenes", "text"}
    records = [record for record in metrics(workdir) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, more + 1))
    assert records[: STEPS - 1] == [r for r in metrics(undisturbed) if r["kind"] == "train"][: STEPS - 1]
    assert all(0 < record["epochs/text"] < 1 for record in records[-3:])


def test_other_data_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    output = finish(start(workdir, "--config.data.seed=1", "--allow-config-change"), 2)
    assert "was trained on other data" in output and "--config.init.from_run" in output
    for name in ("config.json", "tokenizer.json"):
        assert (workdir / name).read_text() == (undisturbed / name).read_text()  # a refused start changes nothing


def test_without_its_checkpoints_a_finished_run_starts_afresh(undisturbed: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    output = finish(start(workdir, "--config.seed=1"), 2)
    assert "seed: 0 -> 1" in output
    finish(start(workdir))
    assert metrics(workdir) == metrics(undisturbed)


def test_a_finished_run_says_so_at_once_and_shows_its_scores(undisturbed: Path) -> None:
    before = (undisturbed / "metrics" / "metrics.jsonl").read_text()
    output = finish(start(undisturbed))
    assert f"has all its {STEPS} steps" in output and "report.html" in output
    assert (undisturbed / "metrics" / "metrics.jsonl").read_text() == before


def test_a_new_run_starts_from_the_weights_of_another(undisturbed: Path, tmp_path: Path) -> None:
    output = finish(start(tmp_path, f"--config.init.from_run={undisturbed}"))
    assert f"weights of {undisturbed}, step {STEPS}" in output
    assert metrics(tmp_path)[0]["loss"] < metrics(undisturbed)[0]["loss"] - 1
