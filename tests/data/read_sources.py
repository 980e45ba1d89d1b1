"""What the reader of sources finds, and files to read, for tests of the formats."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data import formats
from data.documents import Document, Rejected
from data.formats import Found

MOST = 10**6


def found(*sources: Path, most: int = MOST) -> list[Found]:
    return [record for unit in formats.plan(sources) for record in formats.read(unit, most)]


def text_of(record: Found) -> str:
    """The texts and files of a document, or the rule that refused it in brackets."""
    if isinstance(record.document, Rejected):
        return f"[{record.document.rule}]"
    return "+".join(part.text or part.data.decode() for part in record.document.parts)


def texts(records: list[Found]) -> list[str]:
    return [text_of(record) for record in records]


def groups_of(records: list[Found]) -> dict[str, str]:
    return {record.document.id: text_of(record) for record in records if isinstance(record.document, Document)}


def only(records: list[Found]) -> Document:
    [record] = records
    assert isinstance(record.document, Document), record
    return record.document


def refused(records: list[Found], rule: str) -> str:
    [record] = records
    assert isinstance(record.document, Rejected) and record.document.rule == rule, record
    return record.document.reason


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def tree(folder: Path, files: Mapping[str, bytes | Callable[[Path], None]]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return folder
