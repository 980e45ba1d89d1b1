"""The index of one shard of a target cache: digests of its segments, sorted, with their places; and that of all shards.

Letters: R records of the shard, N of a run of shards.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from data.open_files import check_limit
from data.target_records import DIGEST_BYTES
from sharding.errors import UserError

SUFFIX = ".index"
COST_SUFFIX = ".json"
MAGIC = b"targets1"
_HEAD = struct.Struct("<8s16s6QII")
"""Magic, `ShardFacts`, checksum of the arrays, checksum of what stands before it."""
_ARRAYS = (("high", "<u8"), ("low", "<u8"), ("places", "<u4"), ("tokens", "<u4"))


class Entry(NamedTuple):
    """A record, in the order in which they were written."""

    digest: bytes
    tokens: int


class ShardFacts(NamedTuple):
    """What an index says of its shard as a whole."""

    cache: bytes
    """Digest of the cache's header."""
    records: int
    tokens: int
    ids: int
    largest_id: int
    record_bytes: int
    """Of the records alone."""
    file_bytes: int
    """Of the shard's file."""


class ShardIndex(NamedTuple):
    """The arrays [R], sorted by digest."""

    facts: ShardFacts
    high: np.ndarray
    """uint64, the first half of the digest as a big-endian number."""
    low: np.ndarray
    places: np.ndarray
    """uint32, in the shard."""
    tokens: np.ndarray
    """uint32, of each segment."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """The index in this file.

        Raises:
            UserError: it cannot be read or is damaged.
        """
        try:
            data = path.read_bytes()
        except (OSError, MemoryError) as error:
            check_limit(path, error)
            raise UserError(f"{path}: cannot be read ({error}). Give the same command again when it can.") from error
        try:
            head = data[: _HEAD.size]
            if (
                len(head) < _HEAD.size
                or head[:8] != MAGIC
                or zlib.crc32(head[:-4]) != int.from_bytes(head[-4:], "little")
            ):
                raise ValueError("its beginning is not that of an index")
            _, *fields, checksum, _ = _HEAD.unpack(head)
            facts = ShardFacts(*fields)
            expected = _HEAD.size + facts.records * sum(np.dtype(dtype).itemsize for _, dtype in _ARRAYS)
            if len(data) != expected or not facts.records:
                raise ValueError(f"found {len(data):,} bytes, expected {expected:,}")
            raw = np.frombuffer(data, np.uint8, offset=_HEAD.size)
            if zlib.crc32(raw.data) != checksum:
                raise ValueError("the checksum does not fit the bytes")
        except ValueError as error:
            raise UserError(
                f"{path}: is damaged ({error}). Copy it again; or remove it and its shard, and `drover teach` makes them "
                "again."
            ) from error
        arrays, at = {}, 0
        for name, dtype in _ARRAYS:
            stop = at + facts.records * np.dtype(dtype).itemsize
            arrays[name], at = raw[at:stop].view(dtype), stop
        return cls(facts, **arrays)


class _Run(NamedTuple):
    """Segments of some shards, arrays [N] sorted by `high`."""

    high: np.ndarray
    low: np.ndarray
    shards: np.ndarray
    """uint32, the place of the shard in the order in which shards were added."""
    places: np.ndarray

    @classmethod
    def of(cls, runs: "Sequence[_Run]") -> Self:
        """All of these in one."""
        columns = ([run[i] for run in runs] for i in range(len(cls._fields)))
        high = np.concatenate(next(columns))
        order = np.argsort(high)
        return cls(high[order], *(np.concatenate(column)[order] for column in columns))

    def find(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """int64: which entries have these digests, -1 for those that none has."""
        at = np.searchsorted(self.high, high)
        while True:  # most often once: first halves that are equal are rare
            last = np.minimum(at, len(self.high) - 1)
            alike = (at < len(self.high)) & (self.high[last] == high)
            found = alike & (self.low[last] == low)
            if not (others := alike & ~found).any():
                return np.where(found, at, -1)
            at = at + others


class Segments:
    """Where the segments of all shards are, in memory: 24 bytes each.

    They are sorted together, so that a look-up takes as long whatever the number of shards. What is added later are runs of
    their own, each at least twice as long as the next: so a segment is sorted again only as often as the whole doubles.
    """

    def __init__(self, shards: Sequence[ShardIndex] = ()):
        self._shards = len(shards)
        self._runs = [_Run.of([_run(i, shard) for i, shard in enumerate(shards)])] if shards else []

    def add(self, shard: ShardIndex) -> None:
        """One more, after those that are there."""
        self._runs.append(_run(self._shards, shard))
        self._shards += 1
        while len(self._runs) > 1 and len(self._runs[-2].high) < 2 * len(self._runs[-1].high):
            self._runs[-2:] = [_Run.of(self._runs[-2:])]

    def find(self, digests: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(shard, place in it) of each, int64; -1 for those that no shard has."""
        shards, places = np.full(len(digests), -1), np.full(len(digests), -1)
        high, low = halves(digests)
        for run in self._runs:
            at = run.find(high, low)
            here = at >= 0
            shards[here], places[here] = run.shards[at[here]], run.places[at[here]]
        return shards, places


def _run(number: int, shard: ShardIndex) -> _Run:
    return _Run(shard.high, shard.low, np.full(len(shard.high), number, np.uint32), shard.places)


class Progress(NamedTuple):
    """Of records."""

    records: int
    tokens: int
    bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.tokens, 1)

    @classmethod
    def of(cls, facts: Sequence[ShardFacts]) -> Self:
        return cls(*(sum(getattr(f, name) for f in facts) for name in ("records", "tokens", "record_bytes")))


def write_index(
    path: Path, cache: bytes, entries: Sequence[Entry], ids: int, largest_id: int, sizes: tuple[int, int]
) -> None:
    """Writes the index of a shard, whole or not at all; `sizes` are `record_bytes` and `file_bytes`."""
    high, low = halves([entry.digest for entry in entries])
    order = np.lexsort((low, high))
    tokens = np.array([entry.tokens for entry in entries], np.int64)
    arrays = {"high": high, "low": low, "places": np.arange(len(entries)), "tokens": tokens}
    body = b"".join(arrays[name][order].astype(dtype).tobytes() for name, dtype in _ARRAYS)
    head = _HEAD.pack(MAGIC, cache, len(entries), int(tokens.sum()), ids, largest_id, *sizes, zlib.crc32(body), 0)[:-4]
    write_whole(path, head + zlib.crc32(head).to_bytes(4, "little") + body)


class Cost(NamedTuple):
    """What it took to make the targets of a cache."""

    device_seconds: float
    tokens: int
    """Those whose cost is known."""

    @classmethod
    def of(cls, shards: Sequence[tuple[Path, ShardFacts]]) -> Self:
        """Of these shards, from the files beside those that have one.

        Raises:
            UserError: one of the files is damaged.
        """
        seconds, tokens = 0.0, 0
        for shard, facts in shards:
            path = shard.with_suffix(COST_SUFFIX)
            try:
                seconds += _cost(path.read_text(encoding="utf-8"))
                tokens += facts.tokens
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                check_limit(path, error)
                raise UserError(
                    f"{path}: is damaged ({error!r}). Copy it again; or remove it, and what its shard cost is not counted."
                ) from error
        return cls(seconds, tokens)


def _cost(text: str) -> float:
    seconds = json.loads(text)["device_seconds"]
    if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"found {seconds!r} seconds")
    return seconds


def write_cost(path: Path, device_seconds: float) -> None:
    """Writes beside a shard what it took to make it, whole or not at all."""
    write_whole(path, json.dumps({"device_seconds": device_seconds}).encode() + b"\n")


def halves(digests: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of digests as numbers, uint64."""
    joined = np.frombuffer(b"".join(digests), ">u8").reshape(-1, DIGEST_BYTES // 8)
    return joined[:, 0].astype(np.uint64), joined[:, 1].astype(np.uint64)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    beside = path.with_name(f".{path.name}")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
