"""Records by shard and place, from ArrayRecord files that are opened when they are read and stay open for a while."""

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from data.open_files import check_limit, limit
from data.records import Record, unpacked
from sharding.errors import UserError

MOST_OPEN = 1024
"""Shards that stay open, of all data sets of a process; each takes some 20 kB. Not more than a quarter of the files that the
process may have open."""


class Shards:
    """The shards in a folder. Use it in a `with`, or close it. Safe for threads."""

    def __init__(self, folder: Path, dtype: np.dtype | str = "<u2"):
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._readers: dict[int, Any] = {}
        self._self: weakref.ref[Shards] = weakref.ref(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self):
        return Shards, (self._folder, self._dtype)

    def read(self, places: Sequence[tuple[int, int]]) -> list[Record]:
        """The records at these (shard, place in it), read together.

        Raises:
            UserError: a shard is missing or damaged, or too many files are open.
        """
        of_shard: dict[int, list[int]] = {}
        for i, (shard, _) in enumerate(places):
            of_shard.setdefault(shard, []).append(i)
        records: list[Any] = [None] * len(places)
        for shard, wanted in of_shard.items():
            try:
                with _lock:  # else another thread may close it
                    found = self._reader(shard).read([places[i][1] for i in wanted])
                for i, data in zip(wanted, found, strict=True):
                    records[i] = unpacked(data, self._dtype)
            except Exception as error:  # of the library, of msgpack, of NumPy: whatever damaged bytes lead to
                check_limit(self._path(shard), error)
                raise UserError(
                    f"{self._path(shard)}: is missing or damaged ({error}). Copy it again, or prepare the data again."
                ) from error
        return records

    def close(self) -> None:
        with _lock:
            for shard in list(self._readers):
                self._close(shard)

    def _close(self, shard: int) -> None:
        _latest.pop((self._self, shard), None)
        with contextlib.suppress(RuntimeError):  # of a damaged shard, which reading has told of
            self._readers.pop(shard).close()

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader

            while len(_latest) >= max(min(MOST_OPEN, limit() // 4), 1):
                (owner, oldest), _ = _latest.popitem(last=False)
                if (shards := owner()) is not None:  # else its readers are gone with it
                    shards._close(oldest)
            self._readers[shard] = ArrayRecordReader(str(self._path(shard)), "readahead_buffer_size:0")
        _latest[self._self, shard] = None
        _latest.move_to_end((self._self, shard))
        return self._readers[shard]

    def _path(self, shard: int) -> Path:
        return self._folder / shard_name(shard)


_latest: OrderedDict[tuple["weakref.ref[Shards]", int], None] = OrderedDict()
"""The readers that are open, those that were used last at the end."""
_lock = threading.RLock()


def shard_name(i: int) -> str:
    return f"{i:06d}.array_record"
