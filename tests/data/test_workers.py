"""Worker processes: what ends them, what does not, and how their errors arrive."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.pipeline import Dataset
from sharding.errors import UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

SCRIPT = """
import multiprocessing, os, pickle, signal, sys, time

def main():
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    dataset = pickle.loads(bytes.fromhex(sys.stdin.readline()))
    batches = dataset.batches(0, 10**6)
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    next(batches)
    print("first", flush=True)
    if sys.argv[1] == "forget":
        raise SystemExit("left without closing")
    while not received:
        next(batches)
    for _ in range(10):
        next(batches)
    batches.close()
    print("left", len(multiprocessing.active_children()), flush=True)

if __name__ == "__main__":
    main()
"""


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < end, f"{[pid for pid in pids if alive(pid)]} still run after {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def trainer(tmp_path, scenes_only):
    """Starts a process, in a group of its own, that reads batches from two workers: (process, pids of the workers)."""
    import dataclasses
    import pickle

    script = tmp_path / "trainer.py"
    script.write_text(SCRIPT)
    dataset = Dataset(dataclasses.replace(scenes_only.config, workers=2), scenes_only.media, held_out=False)
    started = []

    def start(mode: str = "read"):
        process = subprocess.Popen(
            [sys.executable, str(script), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )
        started.append(process)
        assert process.stdin
        assert process.stdout
        process.stdin.write(pickle.dumps(dataset).hex() + "\n")
        process.stdin.flush()
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        return process, pids

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_workers_end_when_the_trainer_is_killed_and_leave_no_memory_behind(trainer):
    before = set(os.listdir("/dev/shm"))
    process, pids = trainer()
    assert process.stdout.readline() == "first\n"
    assert all(map(alive, pids))
    process.kill()
    wait_until_gone(pids, 30)
    process.communicate()  # until the process that clears up shared memory has ended too
    # Other programs use /dev/shm as well: only blocks of this size can be ours.
    left = [Path("/dev/shm", name) for name in set(os.listdir("/dev/shm")) - before]
    assert not [path for path in left if path.exists() and path.stat().st_size == 3 * 5 * 4 * 4]


def test_workers_end_when_the_trainer_is_killed_while_they_start(trainer):
    process, pids = trainer()
    process.kill()
    wait_until_gone(pids, 60)


@pytest.mark.parametrize(("number", "early"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_signals_to_the_whole_group_reach_the_trainer_alone(trainer, number, early):
    process, pids = trainer()
    if not early:
        assert process.stdout.readline() == "first\n"
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split("\n")[-2] == "left 0"
    assert "Traceback" not in err
    wait_until_gone(pids, 1)


def test_a_trainer_that_forgets_to_close_still_ends(trainer):
    process, pids = trainer("forget")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.strip().endswith("left without closing")
    wait_until_gone(pids, 5)


def small(scenes_only, kind: type[Dataset]) -> Dataset:
    import dataclasses

    return kind(dataclasses.replace(scenes_only.config, workers=1, prefetch=1), scenes_only.media, False)


class Failing(Dataset):
    """Its third batch cannot be made."""

    error: Exception = UserError("data.scenes: the third batch is broken. Mend it.")

    def __reduce__(self):
        return type(self), self._again

    def batch(self, n, rows=None):
        if n == 2:
            raise self.error
        return super().batch(n, rows)


class Crashing(Failing):
    error = ZeroDivisionError("a mistake in the code")


class Spying(Failing):
    """Its batches tell about the process that makes them."""

    def batch(self, n, rows=None):
        jax = sys.modules.get("jax")
        blocked = int(Path("/proc/self/status").read_text().split("SigBlk:\t")[1].split()[0], 16)
        backends = len(sys.modules["jax._src.xla_bridge"]._backends) if jax else 0
        return {
            "pid": np.array([os.getpid()]),
            "backends": np.array([backends]),
            "cpu only": np.array([jax is None or jax.config.jax_platforms == "cpu"]),
            "blocked": np.array([blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM)]),
        }


def test_an_error_for_the_user_arrives_as_it_is(scenes_only):
    with small(scenes_only, Failing).batches(0, 5) as batches, pytest.raises(UserError) as raised:
        list(batches)
    assert str(raised.value).splitlines()[0] == str(Failing.error)


def test_any_other_error_names_its_batch(scenes_only):
    with small(scenes_only, Crashing).batches(0, 5) as batches, pytest.raises(ZeroDivisionError) as raised:
        list(batches)
    assert "while making batch 2" in raised.value.__notes__


def test_workers_take_no_device_and_hear_no_signals(scenes_only):
    with small(scenes_only, Spying).batches(0, 2) as batches:
        first, second = batches
    assert first["pid"] == second["pid"] != os.getpid()
    assert second["backends"] == 0
    assert second["cpu only"]
    assert second["blocked"].all()


def test_a_killed_worker_is_one_clear_error(scenes_only):
    with small(scenes_only, Spying).batches(0, 10**6) as batches:
        os.kill(int(next(batches)["pid"][0]), signal.SIGKILL)
        with pytest.raises(UserError, match=r"data\.workers: a process that makes batches ended by itself"):
            for _ in range(50):
                next(batches)


def test_closing_early_ends_the_workers_soon(scenes_only):
    with small(scenes_only, Spying).batches(0, 10**6) as batches:
        pid = int(next(batches)["pid"][0])
        start = time.monotonic()
    assert time.monotonic() - start < 10
    assert not alive(pid)


def test_a_whole_pass_leaves_no_shared_memory_and_says_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from data.config import DataConfig, MediaSpec\n"
        "from data.pipeline import build_dataset\n"
        "if __name__ == '__main__':\n"
        f"    config = DataConfig(mixture={{'text': 1.0}}, tokenizer='bytes', cache_dir={str(tmp_path)!r})\n"
        "    with build_dataset(config, MediaSpec(), 'train').batches(0, 3) as batches:\n"
        "        print(len(list(batches)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("3\n", "")
