"""One unit of the input, prepared in a process of its own or in this one: its shard, its part of the index, its rejections.

What is held in memory does not grow with the unit, but for what the index is made of: some 60 bytes of each document, 20 of
each file, and each different `source`.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import formats
from data.documents import Rejected
from data.filters import check, load_classifier, transformed
from data.index import Part
from data.records import Entry, prepared
from data.shards import shard_name
from data.tokenizer import Tokenizer
from data.units import Unit

if TYPE_CHECKING:
    from data.prepare import Options

SHARD_OPTIONS = "group_size:1,uncompressed"
_ENTRIES = 4096
"""Entries of the index that are kept as objects, many times as large, before they become arrays."""
_MOST = 2**62


class Progress:
    """How far each unit is, for all processes to see."""

    def __init__(self, context: BaseContext, units: int):
        self._shared = context.RawArray("q", 3 * units)

    @property
    def table(self) -> np.ndarray:
        """int64 [units, 3]: bytes done, records read, records rejected."""
        return np.frombuffer(self._shared, np.int64).reshape(-1, 3)


_worker: tuple[Path, "Options", Tokenizer, Progress, Any]


def start(work: Path, options: "Options", tokenizer: Tokenizer, progress: Progress) -> None:
    """Runs first in each worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes, and the parent ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use(work, options, tokenizer, progress)


def use(work: Path, options: "Options", tokenizer: Tokenizer, progress: Progress) -> None:
    """What `prepare_unit` works with."""
    global _worker
    classify = load_classifier(options.classifier) if options.classifier else None
    _worker = work, options, tokenizer, progress, classify


def _end_with_parent() -> None:
    """A parent that was killed can tell nobody: its workers would go on, and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def prepare_unit(i: int, unit: Unit) -> None:
    """Prepares unit i."""
    work, options, tokenizer, progress, classify = _worker
    table, dtype = progress.table, token_dtype(tokenizer.size)
    entries, blocks = list[Entry](), list[Part]()
    read = rejected = 0
    with (
        _whole(work.parent / "shards" / shard_name(i), work) as shard,
        _whole(work / Part.rejections(i), work) as rejections,
        _ShardWriter(shard) as writer,
        rejections.open("w", encoding="utf-8") as refused,
    ):
        for found in formats.read(unit, options.most):
            read += found.records
            try:
                document = found.document
                if isinstance(document, Rejected):
                    raise document
                if options.transforms:
                    document = transformed(document, options.transforms)
                record, entry = prepared(document, found.where, tokenizer, dtype, options.most)
                check(document, entry, options.filters, classify)
            except Rejected as reason:
                rejected += found.records
                line = {"where": found.where, "rule": reason.rule, "reason": reason.reason}
                line |= {"records": found.records} if found.records > 1 else {}
                refused.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                writer.write(record)
                entries.append(entry)
                if len(entries) == _ENTRIES:
                    blocks.append(Part.of(entries))
                    entries.clear()
            table[i] = unit.nbytes * min(found.share, 1), min(read, _MOST), min(rejected, _MOST)
    Part.joined([*blocks, Part.of(entries)]).write(work, i, read, rejected)
    table[i] = unit.nbytes, min(read, _MOST), min(rejected, _MOST)


def token_dtype(size: int) -> np.dtype:
    """How tokens are stored."""
    return np.dtype("<u2" if size <= 2**16 else "<u4")


@contextlib.contextmanager
def _whole(path: Path, work: Path) -> Iterator[Path]:
    """Where to write a file that has its name once it is complete, and is gone where it is not."""
    # Named by the process: of two that are at the same unit, neither may finish the file of the other.
    unfinished = work / f"{path.name}.{os.getpid()}"
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


class _ShardWriter:
    """An ArrayRecord file. Use it in a `with`."""

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._writer = ArrayRecordWriter(str(path), SHARD_OPTIONS)

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._said_plainly(self._writer.close)

    def write(self, record: bytes) -> None:
        self._said_plainly(self._writer.write, record)

    @staticmethod
    def _said_plainly(write: Callable[..., None], *arguments: bytes) -> None:
        """The library raises RuntimeError, of a full disk too."""
        try:
            write(*arguments)
        except RuntimeError as error:
            raise OSError(str(error)) from error
