"""Work for the writers of a target cache, and processes that do it and are killed at a chosen step.

python -m tests.data.target_work FOLDER PROCESS PROCESSES PAUSE: writes the process's share, with a pause in seconds after each
segment. python -m tests.data.target_work FOLDER kills: does all of it in processes that kill themselves before their first
step on the disk, before their second, ..., until one comes to the end; prints how many were killed.
"""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from data import target_writer
from data.target_cache import Header, Lack, TargetCache, describe
from data.target_records import Targets
from data.target_writer import TargetWriter

SEGMENTS = 90
HEADER = Header({"name": "teacher", "digest": "abc"}, "tokens", 1000, {"tile_size": 32}, draws=4)
SHARD_BYTES = 4000
SECONDS = 0.25
"""What each segment is said to take."""


def digest(i: int) -> bytes:
    return hashlib.blake2b(str(i).encode(), digest_size=16).digest()


DIGESTS = [digest(i) for i in range(SEGMENTS)]


def targets(i: int, vocab: int = 1000) -> Targets:
    rng = np.random.default_rng(i)
    n = int(rng.integers(1, 60))
    ids = rng.permuted(np.tile(np.arange(40), (n, 1)), axis=1)[:, :3] * 7 % vocab
    counts = np.array([[4, 0, 0], [1, 3, 0], [2, 1, 1]])[rng.integers(0, 3, n)]
    return Targets.of(ids, counts, None, -rng.integers(0, 8, n), rng.integers(0, 8, n), rng.random(n) < 0.5)


def same(found: Targets | Lack, i: int) -> bool:
    return isinstance(found, Targets) and all(
        np.array_equal(got, want)
        for got, want in zip(found, targets(i), strict=True)
        if got is not None and want is not None
    )


def write(folder: Path, process: int = 0, processes: int = 1, pause: float = 0, segments: int = SEGMENTS) -> None:
    with TargetWriter(folder, HEADER, process, processes, SHARD_BYTES) as writer:
        mine = range(process, segments, processes)
        done = writer.done([digest(i) for i in mine])
        for i, is_done in zip(mine, done, strict=True):
            if not is_done:
                assert writer.add([digest(i)], [targets(i)], SECONDS)[0]
                time.sleep(pause)


def files(folder: Path) -> dict[str, bytes]:
    """Content by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_a_process(work: Callable[[], None]) -> int:
    """What became of the process, as `os.waitpid` has it."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(step: int, work: Callable[[], None]) -> None:
    """Does the work, and is killed before this step of it."""
    left = step

    def counted(function: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("open", "write", "fsync", "link", "replace", "unlink", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    target_writer._Shard.write = counted(target_writer._Shard.write)
    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)
    work()


def check(folder: Path) -> None:
    """What counts is whole and there once."""
    if (folder / "header.json").exists():
        with TargetCache(folder, "hard") as cache:
            assert all(found == Lack.MISSING or same(found, i) for i, found in enumerate(cache.get(DIGESTS)))
        assert describe(folder)["repeated segments"] == 0


def main() -> None:
    folder, *arguments = sys.argv[1:]
    path = Path(folder)
    if arguments != ["kills"]:
        process, processes, pause = arguments
        return write(path, int(process), int(processes), float(pause))
    step = 1
    while (status := in_a_process(partial(killed_at, step, partial(write, path)))) == signal.SIGKILL:
        assert in_a_process(partial(check, path)) == 0, f"after a kill before step {step}"
        step += 1
    assert status == 0, status
    print(step - 1)


if __name__ == "__main__":
    main()
