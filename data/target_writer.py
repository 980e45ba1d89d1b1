"""Writes the cache of a teacher's targets: any number of processes, each of which may be killed at any moment.

CACHE/NNNNNN.array_record   process i of n writes the shards i, i + n, i + 2n, ...
CACHE/NNNNNN.json           what it took to make it, if that is known
CACHE/NNNNNN.index          comes last, whole: with it the shard counts
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from data.open_files import check_limit
from data.shards import shard_name
from data.target_cache import Header, finished_shards
from data.target_index import COST_SUFFIX, SUFFIX, Entry, Progress, Segments, ShardIndex, write_cost, write_index
from data.target_records import Targets, encode
from sharding.errors import UserError

SHARD_BYTES = 32 * 2**20
"""Of the records of a shard at most, until `SHARE` allows more: what a killed process loses."""
SHARE = 64
"""A shard may have one part in so many of what its process has finished before: so a kill costs no larger part of the time, and
a cache of terabytes has some thousands of shards."""
LARGEST_SHARD = 2**30
_SHARD_OPTIONS = "group_size:1,uncompressed"


class TargetWriter:
    """Writes a cache, or goes on with one. Use it in a `with`: left by an error, it drops the shard that it is at.

    Any number of processes may write at the same time, each with its own number. A process that is killed loses the shard
    that it is at; if the same segments come in the same order again, the files will be the same as if nothing had happened:
    a shard ends by the bytes of its records, and of those in the finished shards of the same part, alone.

    Attributes:
        found: what the folder held at the start, of all processes.
        written: by this process since.
    """

    def __init__(
        self, folder: Path, header: Header, process: int = 0, processes: int = 1, shard_bytes: int = SHARD_BYTES
    ):
        """
        Args:
            folder: of the cache; made if it is not there.
            header: of the cache; must be the same in all processes, but for the teacher's name.
            process: number of this one.
            processes: how many write.
            shard_bytes: a shard has records of this size at most, or of a `SHARE`th of all that this process's finished shards
                have (up to `LARGEST_SHARD`), or one.

        Raises:
            UserError: the folder is the cache of something else, damaged, written by another process with this number, or
                cannot be written.
        """
        if not 0 <= process < processes:
            raise ValueError(f"process {process} of {processes}")
        self._folder, self._form = folder, header.record_format
        self._process, self._processes, self._shard_bytes = process, processes, shard_bytes
        self._shard: _Shard | None = None
        with self._plainly():
            folder.mkdir(parents=True, exist_ok=True)
            self._cache = header.write(folder).digest
            self._remove_leftovers()
            shards = finished_shards(folder, self._cache)
        self._segments = Segments([index for _, index in shards])
        mine = [index.facts for path, index in shards if int(path.stem) % processes == process]
        self._finished_bytes = Progress.of(mine).bytes
        self.found, self.written = Progress.of([index.facts for _, index in shards]), Progress(0, 0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.finish_shard()
        elif self._shard is not None:
            self._shard.drop()

    def done(self, digests: Sequence[bytes]) -> np.ndarray:
        """bool: which segments need not be done again. Of other processes it knows what they had finished at the start."""
        done = np.array([self._shard is not None and digest in self._shard.digests for digest in digests], bool)
        shards, _ = self._segments.find(digests)
        return done | (shards >= 0)

    def add(self, digests: Sequence[bytes], targets: Sequence[Targets], device_seconds: float = 0.0) -> np.ndarray:
        """Adds the targets of segments; bool, which of them were not there already.

        Args:
            digests: of the segments.
            targets: of each.
            device_seconds: what making them took, shared out among those that were not there; 0 if that is not known.

        Raises:
            ValueError: the targets are not what the header says.
            UserError: the folder cannot be written.
        """
        fresh = ~self.done(digests)
        added: set[bytes] = set()
        for i, digest in enumerate(digests):
            fresh[i] &= digest not in added
            added.add(digest)
        each = device_seconds / max(fresh.sum(), 1)
        for i in np.flatnonzero(fresh).tolist():
            self._add(digests[i], targets[i], each)
        return fresh

    def _add(self, digest: bytes, targets: Targets, device_seconds: float) -> None:
        record = encode(digest, targets, self._form)
        room = max(self._shard_bytes, min(self._finished_bytes // SHARE, LARGEST_SHARD))
        if self._shard is not None and self._shard.record_bytes + len(record) > room:
            self.finish_shard()
        with self._plainly():
            if self._shard is None:
                self._shard = self._new_shard()
            self._shard.write(digest, targets, record)
            self._shard.device_seconds += device_seconds
        self.written = Progress(*(a + b for a, b in zip(self.written, (1, targets.tokens, len(record)), strict=True)))

    def finish_shard(self) -> None:
        """From here on, what was added counts. Called of itself where a shard is full, and at the end."""
        if self._shard is not None:
            with self._plainly():
                index = self._shard.finish(self._cache)
            self._segments.add(index)
            self._finished_bytes += index.facts.record_bytes
            self._shard = None

    def _new_shard(self) -> "_Shard":
        number = self._process
        while (lock := _created(self._folder / shard_name(number))) is None:
            number += self._processes
        return _Shard(self._folder / shard_name(number), lock)

    def _remove_leftovers(self) -> None:
        """Removes what was left by a process that was killed: shards without an index, and files half written."""
        unfinished = [path for path in self._folder.iterdir() if re.fullmatch(r"\d{6,}\.array_record", path.name)]
        for path in sorted(unfinished):
            number = int(path.stem)
            if number % self._processes == self._process and not path.with_suffix(SUFFIX).exists():
                lock = _locked(path, os.O_RDWR)
                if lock is None:
                    raise UserError(
                        f"{path}: is being written by another process. End that one first. Parts at the same time have to be "
                        "different ones, of as many processes each."
                    )
                if not path.with_suffix(SUFFIX).exists():  # it may have come before the lock was free
                    _remove_unfinished(path)
                os.close(lock)
        for path in self._folder.glob(".header.json.*"):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # ArrayRecord raises the latter, of a full disk too
            check_limit(self._folder, error)
            raise UserError(
                f"{self._folder}: cannot be written ({getattr(error, 'strerror', None) or error}). Make room, or give another "
                "folder; the same command goes on where it was stopped."
            ) from error


def _created(path: Path) -> int | None:
    """A new file, locked; None if there is one."""
    try:
        return _locked(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return None


def _locked(path: Path, flags: int) -> int | None:
    """A descriptor that keeps others from locking the file until it is closed; None if another process has."""
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return descriptor


def _remove_unfinished(shard: Path) -> None:
    """Removes a shard that has no index, and what was written beside it; itself last, for it says that there is something."""
    for suffix in (COST_SUFFIX, SUFFIX):
        shard.with_name(f".{shard.stem}{suffix}").unlink(missing_ok=True)
    shard.with_suffix(COST_SUFFIX).unlink(missing_ok=True)
    shard.unlink(missing_ok=True)


class _Shard:
    """A shard that is being written. Until its index is there, it does not count."""

    def __init__(self, path: Path, lock: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path, self._lock = path, lock
        self._writer = ArrayRecordWriter(str(path), _SHARD_OPTIONS)
        self._entries: list[Entry] = []
        self._ids = self._largest = 0
        self.device_seconds = 0.0
        self.digests: set[bytes] = set()
        self.record_bytes = 0

    def write(self, digest: bytes, targets: Targets, record: bytes) -> None:
        self._writer.write(record)
        self._entries.append(Entry(digest, targets.tokens))
        self.digests.add(digest)
        self._ids += len(targets.ids)
        self._largest = max(self._largest, int(targets.ids.max(initial=0)))
        self.record_bytes += len(record)

    def finish(self, cache: bytes) -> ShardIndex:
        self._writer.close()
        os.fsync(self._lock)
        if self.device_seconds:
            write_cost(self._path.with_suffix(COST_SUFFIX), self.device_seconds)
        path, size = self._path.with_suffix(SUFFIX), os.fstat(self._lock).st_size
        write_index(path, cache, self._entries, self._ids, self._largest, (self.record_bytes, size))
        os.close(self._lock)
        return ShardIndex.open(path)

    def drop(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._writer.close()
        if not self._path.with_suffix(SUFFIX).exists():  # what failed may have come after it
            _remove_unfinished(self._path)
        os.close(self._lock)
