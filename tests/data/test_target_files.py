"""A cache of more shards than a process may have files open, and files that are whole and cannot be read."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.target_cache import Lack, TargetCache, describe
from data.target_index import Segments, ShardFacts, ShardIndex, halves
from data.target_writer import TargetWriter
from sharding.errors import UserError
from tests.data.target_work import DIGESTS, HEADER, SEGMENTS, digest, files, same, targets

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
MORE = 50
"""Files that a process may have open beside those that it has."""


@pytest.fixture
def few_files(whole) -> Iterator[None]:
    with TargetCache(whole) as cache:  # what the libraries open once for all
        cache.get([DIGESTS[0]])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + MORE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_shards_than_files_may_be_open_are_written_and_read(tmp_path, few_files) -> None:
    for stop in (100, SEGMENTS + 30):
        with TargetWriter(tmp_path, HEADER, shard_bytes=1) as writer:
            for i in range(stop):
                writer.add([digest(i)], [targets(i)])
    assert describe(tmp_path)["shards"] > 2 * MORE
    with TargetCache(tmp_path) as cache:
        assert all(same(found, i) for i, found in enumerate(cache.get([digest(i) for i in range(SEGMENTS + 30)])))


def test_too_many_open_files_are_not_taken_for_damage(cache, few_files) -> None:
    before = files(cache)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(TargetCache(cache, "hard"))
        with contextlib.suppress(OSError):
            while True:
                stack.enter_context(open(cache / "header.json"))
        for ask in (
            lambda: reader.get([DIGESTS[0]]),
            lambda: ShardIndex.open(cache / "000001.index"),
            lambda: TargetCache(cache, "hard"),
            lambda: describe(cache),
            lambda: TargetWriter(cache, HEADER),
        ):
            with pytest.raises(UserError, match=r"cannot be opened, since this process has \d+ files open .*ulimit -n"):
                ask()
    assert files(cache) == before


@pytest.mark.parametrize(
    "number, cure",
    [
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOMEM, "End other processes"),
        (errno.EIO, "dmesg"),
        (errno.ESTALE, "dmesg"),
        (errno.EACCES, "permissions"),
    ],
)
def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(whole, monkeypatch, number: int, cure: str) -> None:
    expected = rf"cannot be used \({os.strerror(number)}\)\. .*{cure}"

    def fails(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    with TargetCache(whole, "hard") as cache:

        def said(*_: object) -> Any:  # as ArrayRecord does
            raise RuntimeError(f"read() failed: {os.strerror(number)}; reading 000000.array_record")

        with monkeypatch.context() as patched, pytest.raises(UserError, match=rf"\.array_record: {expected}"):
            patched.setattr(cache, "_reader", said)
            cache.get([DIGESTS[0]])
        assert cache.take_notes() == [] and same(cache.get([DIGESTS[0]])[0], 0)
    for method, file in (("read_bytes", r"\.index"), ("read_text", "header.json"), ("iterdir", whole.name)):
        with monkeypatch.context() as patched, pytest.raises(UserError, match=f"{file}: {expected}"):
            patched.setattr(Path, method, fails)
            TargetCache(whole, "hard")


def test_no_memory_and_unknown_errors_are_not_taken_for_damage(whole, monkeypatch) -> None:
    for error, message in (
        (MemoryError(), r"cannot be used \(out of memory\)\. .*End other processes"),
        (OSError(errno.ENOTCONN, "Not connected"), r"cannot be read \(.*Not connected\)\. Give the same command again"),
    ):

        def fails(*_: object, error: Exception = error) -> Any:
            raise error

        with monkeypatch.context() as patched, pytest.raises(UserError, match=rf"\.index: {message}"):
            patched.setattr(Path, "read_bytes", fails)
            TargetCache(whole, "hard")
    with TargetCache(whole, "hard") as cache, pytest.raises(UserError, match="out of memory"):
        monkeypatch.setattr(cache, "_reader", lambda _: (_ for _ in ()).throw(MemoryError()))
        cache.get([DIGESTS[0]])


def test_a_shard_that_vanished_counts_as_damaged(cache) -> None:
    with TargetCache(cache, "hard") as reader:
        for path in cache.glob("*.array_record"):
            path.unlink()
        assert reader.get([DIGESTS[0]]) == [Lack.DAMAGED]


def test_shards_are_found_alike_whether_added_at_once_or_one_by_one() -> None:
    rng = np.random.default_rng(0)
    digests = [bytes(7) + rng.bytes(1) + i.to_bytes(8, "big") for i in range(3000)]  # first halves are often alike
    ends = np.cumsum([1, 1, 2, 900, 5, 40, 40, 40, 40, 600, 1, 1330])
    shards = []
    for start, stop in zip([0, *ends], ends, strict=False):
        high, low = halves(digests[start:stop])
        order = np.lexsort((low, high))
        arrays = (high, low, np.arange(stop - start, dtype=np.uint32), np.ones(stop - start, np.uint32))
        shards.append(ShardIndex(ShardFacts(b"", len(high), 0, 0, 0, 0, 0), *(array[order] for array in arrays)))
    where = np.searchsorted(ends, np.arange(3000), side="right")
    places = np.arange(3000) - np.array([0, *ends])[where]
    added, lengths = Segments(), []
    for count, shard in enumerate(shards, 1):
        added.add(shard)
        lengths.append([len(run.high) for run in added._runs])
        found = added.find(digests)
        assert (found[0] == np.where(where < count, where, -1)).all()
        assert (found[1] == np.where(where < count, places, -1)).all()
    assert all(first >= 2 * second for each in lengths for first, second in pairwise(each))
    assert max(map(len, lengths)) > 2
    for one, other in zip(added.find(digests), Segments(shards).find(digests), strict=True):
        assert (one == other).all()
    assert (Segments().find(digests)[0] == -1).all() and Segments(shards).find([bytes(16)])[0] == -1
