"""Records by shard and place, from ArrayRecord files that are opened when they are first read."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from data.records import Record, unpacked
from sharding.errors import UserError


class Shards:
    """The shards in a folder. Use it in a `with`, or close it."""

    def __init__(self, folder: Path, dtype: np.dtype | str = "<u2"):
        self._folder, self._dtype = folder, np.dtype(dtype)
        self._readers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self):
        return Shards, (self._folder, self._dtype)

    def read(self, places: Sequence[tuple[int, int]]) -> list[Record]:
        """The records at these (shard, place in it), read together.

        Raises:
            UserError: a shard is missing or damaged.
        """
        of_shard: dict[int, list[int]] = {}
        for i, (shard, _) in enumerate(places):
            of_shard.setdefault(shard, []).append(i)
        records: list[Any] = [None] * len(places)
        for shard, wanted in of_shard.items():
            try:
                found = self._reader(shard).read([places[i][1] for i in wanted])
                for i, data in zip(wanted, found, strict=True):
                    records[i] = unpacked(data, self._dtype)
            except Exception as error:  # of the library, of msgpack, of NumPy: whatever damaged bytes lead to
                raise UserError(
                    f"{self._path(shard)}: is missing or damaged ({error}). Copy it again, or prepare the data again."
                ) from error
        return records

    def close(self) -> None:
        for reader in self._readers.values():
            with contextlib.suppress(RuntimeError):  # of a damaged shard, which reading has told of
                reader.close()
        self._readers.clear()

    def _reader(self, shard: int) -> Any:
        if shard not in self._readers:
            from array_record.python.array_record_module import ArrayRecordReader

            self._readers[shard] = ArrayRecordReader(str(self._path(shard)), "readahead_buffer_size:0")
        return self._readers[shard]

    def _path(self, shard: int) -> Path:
        return self._folder / shard_name(shard)


def shard_name(i: int) -> str:
    return f"{i:06d}.array_record"
