"""The work of preparing data: units, each read alone in any process, and the records that they give."""

from typing import Any, Literal, NamedTuple

from data.documents import Document, Rejected

Format = Literal["jsonl", "parquet", "tar", "files", "built in"]


class Unit(NamedTuple):
    """A part of the input that is read as one."""

    format: Format
    path: str
    """Of the file, or of the folder; the name of a built-in source."""
    label: str
    """The same in ids: from the name of the source on."""
    start: int = 0
    """Byte of a JSONL file, row group of a Parquet file, number of a built-in document."""
    stop: int = 0
    first: int = 1
    """Number of its first line or row, from 1."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Of a folder: the files of each document, relative to it."""
    nbytes: int = 1
    """About how much there is to read, for the progress bar."""
    parameters: tuple[Any, ...] = ()
    """Of a built-in source."""


class Found(NamedTuple):
    """One record of the input."""

    where: str
    """File and line, row or member, from the name of the source on."""
    document: Document | Rejected
    share: float
    """Of the unit, which has been read so far."""
    records: int = 1
    """That it stands for: more than one where the rest of a row group is lost."""
