"""The files that a data set is made from: cut into units of work, and read record by record.

A unit is read alone, in any process, and gives the same records each time. Nothing that is found in it ends the reading:
what cannot be used is given as `Rejected`, so that read = written + rejected. One record is held in memory at a time, of
at most `most` bytes; of a Parquet file, a page of each column beside, as large as its maker made them.
"""

import itertools
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data import builtin
from data.documents import Document, Rejected, parse, with_files
from data.files import MB, from_json, read_within, shown, too_large
from data.groups import UNREAD, Stream, from_folder, from_tar, share_of, stem, unpacking
from data.units import Format, Found, Unit
from sharding.errors import UserError

ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
}
UNIT_BYTES = 4 * MB
"""How much of a JSONL file is one unit at least; of larger ones a 256th, but at most 256 MB."""
UNIT_DOCUMENTS = 500
"""Documents of a folder in one unit."""
_BLOCK = 4 * MB


def plan(sources: Sequence[Path]) -> list[Unit]:
    """The units of the sources, in their order; files of a folder in the order of their names.

    A folder that holds JSONL, Parquet or tar files is read as these, and its other files where records name them. In
    any other folder (and in tar files), files whose names differ in their extension alone are one document.

    Raises:
        UserError: a source does not exist, cannot be read, is of no known format, or is named like another.
    """
    units: list[Unit] = []
    labels: dict[str, Path] = {}
    for source in sources:
        label = shown(source.resolve().name)
        if label in labels:
            raise UserError(
                f"{source}: is named like {labels[label]}, and ids of documents begin with that name. Rename one, or "
                "prepare them apart."
            )
        labels[label] = source
        try:
            if source.is_dir():
                units += _plan_folder(source, label)
            elif not source.is_file():
                raise UserError(f"{source}: there is no such file or folder. Check the path.")
            elif source.is_symlink():
                raise UserError(f"{source}: is a symbolic link. Name the file that it leads to.")
            elif found := format_of(source.name):
                units += _plan_file(found, source, label)
            else:
                raise UserError(f"{source}: found no known format, expected {', '.join(ENDINGS)} or a folder.")
        except OSError as error:
            raise UserError(f"{error.filename or source}: cannot be read ({error.strerror or error}).") from error
    return units


def beside_records(source: Path) -> int:
    """Files of a folder that are read only where records name them: others than JSONL, Parquet and tar files, beside such."""
    names = _names(source) if source.is_dir() else []
    others = sum(format_of(name) is None for name in names)
    return others if others < len(names) else 0


def format_of(name: str) -> Format | None:
    """The format of a file with many records by its name."""
    return next((found for ending, found in ENDINGS.items() if name.lower().endswith(ending)), None)


def read(unit: Unit, most: int, media: bool = True) -> Iterator[Found]:
    """The documents of a unit with the bytes of their files, each of at most `most` bytes in all. Without `media`, files
    are not read, and have `UNREAD` in place of their bytes."""
    if unit.format == "built in":
        yield from builtin.read(unit)
    elif unit.format != "files" and (rejected := _no_file(Path(unit.path))):
        yield Found(unit.label, rejected, 1.0)
    elif unit.format == "jsonl":
        yield from _read_jsonl(unit, most, media)
    elif unit.format == "parquet":
        yield from _read_parquet(unit, most, media)
    else:
        path, label = Path(unit.path), unit.label
        tar = unit.format == "tar"
        groups = from_tar(path, label, most, media) if tar else from_folder(path, unit.groups, label, most, media)
        for group in groups:
            yield Found(f"{unit.label}/{group.name}", group.document, group.share)


def _plan_folder(folder: Path, label: str) -> Iterator[Unit]:
    names = _names(folder)
    many = sorted(name for name in names if format_of(name))
    for name in many:
        found, path, own = format_of(name) or "jsonl", folder / name, os.path.join(label, shown(name))
        if _no_file(path):
            yield Unit(found, str(path), own)  # reading it says so
        else:
            yield from _plan_file(found, path, own)
    if many:
        return
    names.sort(key=lambda name: (stem(name), name))
    groups = [tuple(group) for _, group in itertools.groupby(names, key=stem)]
    for start in range(0, len(groups), UNIT_DOCUMENTS):
        batch = tuple(groups[start : start + UNIT_DOCUMENTS])
        size = sum(os.lstat(folder / name).st_size for group in batch for name in group)
        yield Unit("files", str(folder), label, groups=batch, nbytes=size)


def _names(folder: Path) -> list[str]:
    """The files below a folder, relative to it. A link to a folder is not followed, and is told of like one to a file."""
    names = []
    for path, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in folders if os.path.islink(os.path.join(path, name))]
        names += [
            os.path.relpath(os.path.join(path, name), folder) for name in files + linked if not name.startswith(".")
        ]
    return names


def _raise(error: OSError) -> None:
    raise error


def _no_file(path: Path) -> Rejected | None:
    """Why a file with records is not opened, in a folder; of a pipe, it would wait for ever.

    Raises:
        UserError: it is gone since it was found.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: is gone, and was there when the work began. Put it back; the same command goes on where it was."
        ) from error
    if stat.S_ISLNK(mode):
        return Rejected("link", f"{path.name}: is a link. Name the file that it leads to as a source of its own.")
    if not stat.S_ISREG(mode):
        return Rejected("file type", f"{path.name}: is no regular file, though it is named like one")
    return None


def _plan_file(found: Format, path: Path, label: str) -> Iterator[Unit]:
    size = path.stat().st_size
    if found == "jsonl" and path.suffix.lower() != ".gz":
        yield from _plan_jsonl(path, label)
    elif found == "parquet":
        yield from _plan_parquet(path, label, size)
    else:
        yield Unit(found, str(path), label, nbytes=size)


def _plan_jsonl(path: Path, label: str) -> Iterator[Unit]:
    """Cut at the ends of lines; lines are counted, so that each has its number."""
    start, first, at, line = 0, 1, 0, 1
    least = min(max(path.stat().st_size // 256, UNIT_BYTES), 256 * MB)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            last = block.rfind(b"\n")
            lines = block.count(b"\n")
            if last >= 0 and at + last + 1 - start >= least:
                stop = at + last + 1
                yield Unit("jsonl", str(path), label, start, stop, first, nbytes=stop - start)
                start, first = stop, line + lines
            line, at = line + lines, at + len(block)
    if at > start:
        yield Unit("jsonl", str(path), label, start, at, first, nbytes=at - start)


def _plan_parquet(path: Path, label: str, size: int) -> Iterator[Unit]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    except (ArrowException, OSError, ValueError):
        yield Unit("parquet", str(path), label, nbytes=size)  # reading it says what is wrong
        return
    row = 1
    for i, group in enumerate(groups):
        yield Unit("parquet", str(path), label, i, i + 1, row, nbytes=size // len(groups))
        row += group.num_rows


def _read_jsonl(unit: Unit, most: int, media: bool) -> Iterator[Found]:
    path, number = Path(unit.path), unit.first
    with unpacking(path) as raw:
        file: Any = raw
        size = path.stat().st_size
        if path.suffix.lower() == ".gz":
            file = Stream(raw, size, most)
        else:
            raw.seek(unit.start)
        left = whole = unit.stop - unit.start if unit.stop else None

        def found(document: Document | Rejected) -> Found:
            share = share_of(raw, size) if left is None or whole is None else 1 - (left - taken) / whole
            return Found(where, document, share)

        while left is None or left > 0:
            where = f"{unit.label}:{number}"
            try:
                line = file.readline(most + 1)
                taken = len(line)
                if taken > most and not line.endswith(b"\n"):
                    while block := file.readline(_BLOCK):
                        taken += len(block)
                        if block.endswith(b"\n"):
                            break
                    yield found(too_large("the line", taken, most))
                elif not line:
                    return
                elif line.removeprefix(b"\xef\xbb\xbf").strip():
                    yield found(_document(partial(from_json, line, "the line"), where, path, most, media))
            except (OSError, EOFError, zlib.error) as error:
                reason = f"the rest of the file cannot be read, from this line on ({error})"
                yield Found(where, Rejected("damaged", reason), 1.0)
                return
            number += 1
            if left is not None:
                left -= taken


def _read_parquet(unit: Unit, most: int, media: bool) -> Iterator[Found]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    row, path, rows, problem = unit.first, Path(unit.path), 0, None
    try:
        with ParquetFile(path, buffer_size=MB, page_checksum_verification=True) as file:
            groups = range(unit.start, unit.stop)
            rows = sum(file.metadata.row_group(i).num_rows for i in groups)
            # Row by row: a value that is stored once and repeated takes its size in each row of a batch.
            for batch in file.iter_batches(batch_size=1, row_groups=groups):
                where = f"{unit.label}:{row}"
                share = (row + 1 - unit.first) / max(rows, 1)
                yield Found(where, _document(partial(_row, batch, most), where, path, most, media), share)
                row += 1
    except (ArrowException, OSError, ValueError) as error:  # of the names of its columns, too
        problem = error
    lost = unit.first + rows - row
    if lost > 0:
        reason = (
            f"rows {row:,} to {row + lost - 1:,}, the rest of the row group, cannot be read ({problem or 'they end'})"
        )
        yield Found(f"{unit.label}:{row}", Rejected("damaged", reason), 1.0, lost)
    elif problem:
        yield Found(f"{unit.label}:{row}", Rejected("damaged", f"the file cannot be read ({problem})"), 1.0)


def _row(batch: Any, most: int) -> Any:
    from pyarrow import ArrowException

    if batch.nbytes > most:
        raise too_large("the row", batch.nbytes, most)
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise Rejected("utf-8", f"found no UTF-8 ({error.reason})") from None
    except (ArrowException, ValueError, OverflowError) as error:  # a date beyond those of Python
        raise Rejected("schema", f"the row holds a value that cannot be read ({error})") from None


def _document(record: Callable[[], Any], default_id: str, beside: Path, most: int, media: bool) -> Document | Rejected:
    """The document of a record, with the bytes of its files, which lie in the folder of `beside`."""
    left = most

    def read_part(path: str) -> bytes:
        nonlocal left
        if not media:
            return UNREAD
        data = read_within(beside.parent, path, left)
        left -= len(data)
        return data

    try:
        return with_files(parse(record(), default_id), read_part)
    except Rejected as rejected:
        return rejected
