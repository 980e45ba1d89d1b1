"""What is known of every document of a prepared data set without reading it: arrays, mapped from disk.

Letters: N documents, F files of all documents.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from data.documents import MEDIA
from data.open_files import check_limit, mapped
from data.records import DIGEST_BYTES, FACTS, Entry
from sharding.errors import UserError

FORMAT = 2
"""Of a prepared data set; another one cannot be read."""
NAMES = "names.json"
"""Of the index: the values of `source`."""
SOURCES_NAMED = 20
"""Values of `source` that are counted one by one in dataset.json."""
_OF_FILES = ("kinds", "places", "facts")
"""Arrays of the index with an entry for each file; the others have one for each document."""


@dataclass(frozen=True)
class Part:
    """The entries of one unit of work, documents in the order of its shard."""

    tokens: np.ndarray
    """int32 [N]."""
    file_counts: np.ndarray
    """int32 [N]."""
    kinds: np.ndarray
    """uint8 [F], places in `MEDIA`."""
    places: np.ndarray
    """int32 [F], tokens of the document's text before the file."""
    facts: np.ndarray
    """int32 [F, 3], see `data.records.FACTS`."""
    splits: np.ndarray
    """uint8 [N]: 0 undecided, 1 train, 2 held out."""
    sources: np.ndarray
    """int32 [N], places in `names`."""
    id_digests: np.ndarray
    """uint8 [N, 16]."""
    content_digests: np.ndarray
    nbytes: np.ndarray
    """int64 [N], of the records."""
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Self:
        names = tuple(sorted({entry.source for entry in entries}))
        numbers = {name: i for i, name in enumerate(names)}

        def files(name: str, width: tuple[int, ...] = ()) -> np.ndarray:
            return np.array([value for entry in entries for value in getattr(entry, name)], np.int32).reshape(
                -1, *width
            )

        def digests(name: str) -> np.ndarray:
            joined = b"".join(getattr(entry, name) for entry in entries)
            return np.frombuffer(joined, np.uint8).reshape(-1, DIGEST_BYTES)

        return cls(
            tokens=np.array([entry.tokens for entry in entries], np.int32),
            file_counts=np.array([len(entry.kinds) for entry in entries], np.int32),
            kinds=files("kinds").astype(np.uint8),
            places=files("places"),
            facts=files("facts", (FACTS,)),
            splits=np.array([entry.split for entry in entries], np.uint8),
            sources=np.array([numbers[entry.source] for entry in entries], np.int32),
            id_digests=digests("id_digest"),
            content_digests=digests("content_digest"),
            nbytes=np.array([entry.nbytes for entry in entries], np.int64),
            names=names,
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        names = tuple(sorted({name for part in parts for name in part.names}))
        places = {name: i for i, name in enumerate(names)}
        arrays = {}
        for field in dataclasses.fields(cls):
            if field.name == "sources":
                numbers = [np.array([places[name] for name in part.names], np.int32)[part.sources] for part in parts]
                arrays["sources"] = np.concatenate(numbers)
            elif field.name != "names":
                arrays[field.name] = np.concatenate([getattr(part, field.name) for part in parts])
        return cls(**arrays, names=names)

    def write(self, folder: Path, i: int, read: int, rejected: int) -> None:
        """Keeps the part of unit i, with how many of its records were read and rejected, whole or not at all."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "names"}
        _write(folder / f"{i:06d}.json", json.dumps({"names": self.names, "counts": [read, rejected]}))
        beside = folder / f".{i:06d}.npz"
        with beside.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(folder / f"{i:06d}.npz")

    @staticmethod
    def exists(folder: Path, i: int) -> bool:
        return (folder / f"{i:06d}.npz").exists()

    @staticmethod
    def counts(folder: Path, i: int) -> tuple[int, int]:
        """(records read, records rejected)."""
        read, rejected = json.loads((folder / f"{i:06d}.json").read_text())["counts"]
        return read, rejected

    @classmethod
    def read(cls, folder: Path, i: int) -> Self:
        names = tuple(json.loads((folder / f"{i:06d}.json").read_text())["names"])
        with np.load(folder / f"{i:06d}.npz", allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files}, names=names)

    @staticmethod
    def rejections(i: int) -> str:
        """The file beside it, with a line of JSON for each record of unit i that was rejected."""
        return f"{i:06d}.rejected.jsonl"


@dataclass(frozen=True)
class Index:
    """The documents of a data set, in their order."""

    tokens: np.ndarray
    """int32 [N], of their texts."""
    file_starts: np.ndarray
    """int64 [N + 1]: the files of document n are file_starts[n] to file_starts[n + 1] - 1."""
    kinds: np.ndarray
    places: np.ndarray
    facts: np.ndarray
    held_out: np.ndarray
    """bool [N]."""
    sources: np.ndarray
    shards: np.ndarray
    """int32 [N]."""
    records: np.ndarray
    """int32 [N], places in the shard."""
    nbytes: np.ndarray
    stored_names: tuple[str, ...] | Path
    """What `sources` are places in, or the file that says so: there may be as many names as documents, and a run needs none."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def names(self) -> tuple[str, ...]:
        """What `sources` are places in; read when it is asked for.

        Raises:
            UserError: the file is missing or damaged.
        """
        if isinstance(self.stored_names, tuple):
            return self.stored_names
        try:
            return tuple(json.loads(self.stored_names.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            check_limit(self.stored_names, error)
            raise _damaged(self.stored_names, error) from error

    @classmethod
    def of(cls, part: Part, shards: np.ndarray, records: np.ndarray, kept: np.ndarray, held_out: float) -> Self:
        """The index of the documents that are kept; `held_out` is the share of those that do not say their split."""
        starts = np.concatenate([[0], np.cumsum(part.file_counts)])
        files = np.repeat(kept, part.file_counts)
        # A pure function of the id, so that a document stays on its side whatever is added to the data.
        hashes = part.id_digests[kept, :8].copy().view("<u8").ravel() / 2.0**64
        undecided = part.splits[kept] == 0
        out = (part.splits[kept] == 2) | (undecided & (hashes < held_out))
        if held_out and not out.any() and undecided.sum() > 1:  # of a few documents, the one that comes first
            out[np.argmin(np.where(undecided, hashes, 2))] = True
        return cls(
            tokens=part.tokens[kept],
            file_starts=np.concatenate([[0], np.cumsum(np.diff(starts)[kept])]),
            kinds=part.kinds[files],
            places=part.places[files],
            facts=part.facts[files],
            held_out=out,
            sources=part.sources[kept],
            shards=shards[kept],
            records=records[kept],
            nbytes=part.nbytes[kept],
            stored_names=part.names,
        )

    def facts_of(self) -> dict[str, Any]:
        """Counts for dataset.json; of many sources, those of the largest."""
        names = self.names
        counts = np.bincount(self.sources, minlength=len(names))
        largest = np.argsort(-counts, kind="stable")[:SOURCES_NAMED].tolist()
        others = len(names) - len(largest), int(counts.sum() - counts[largest].sum())
        return {
            "held_out": int(self.held_out.sum()),
            "tokens": int(self.tokens.sum(dtype=np.int64)),
            "files": {kind: int((self.kinds == i).sum()) for i, kind in enumerate(MEDIA)},
            "bytes": int(self.nbytes.sum()),
            "documents_by_source": {names[i]: int(counts[i]) for i in largest},
            "other_sources": dict(zip(("sources", "documents"), others, strict=True)),
        }

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        _write(folder / NAMES, json.dumps(self.names, ensure_ascii=False))
        for name in _ARRAYS:
            with open(folder / f"{name}.npy", "wb") as file:
                np.save(file, getattr(self, name))
                file.flush()
                os.fsync(file.fileno())

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The index in this folder, mapped from disk.

        Raises:
            UserError: a file is missing or damaged, or too many files are open.
        """
        arrays: dict[str, np.ndarray] = {}
        for name in _ARRAYS:
            path = folder / f"{name}.npy"
            try:
                arrays[name] = mapped(path)
            except UserError:
                raise
            except Exception as error:  # of NumPy, of zipfile: whatever damaged bytes lead to
                check_limit(path, error)
                raise _damaged(path, error) from error
        documents = len(arrays["tokens"])
        files = int(arrays["file_starts"][-1]) if len(arrays["file_starts"]) else 0
        for name, array in arrays.items():
            expected = files if name in _OF_FILES else documents + (name == "file_starts")
            if len(array) != expected:
                raise UserError(
                    f"{folder / name}.npy: found {len(array):,} entries, expected {expected:,}. Copy it again, or prepare "
                    "the data again."
                )
        return cls(**arrays, stored_names=folder / NAMES)


_ARRAYS = tuple(field.name for field in dataclasses.fields(Index) if field.name != "stored_names")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: is missing or damaged ({error}). Prepare the data again.")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
