"""Files that are one document together: in a folder or a tar file, those whose names differ in their extension alone."""

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.documents import FORMS, MEDIA, Document, Rejected, parse, with_files
from data.files import MB, decoded, from_json, kind_of, read_within, shown, too_large

FILES_OF_A_DOCUMENT = 1000
UNREAD = b"unread"
"""In place of the bytes of an image, a video or a sound, where only texts are asked for."""
_LONGEST_PATH = 4096
_ASIDE_BYTES = 10_000
_BLOCK = 4 * MB
_EXTRA_BYTES = 2**20
"""Of headers of a tar file that say more of one file (a long name, attributes), or of all that follow."""
_BOMB_RATIO, _BOMB_BYTES = 200, 1000 * MB
"""A compressed file that grows to more than so many times its size, and more than so many bytes, is given up."""

Reader = Callable[[int], bytes]
"""Gives the bytes of a file, so many at most, or raises `Rejected`."""


class Group(NamedTuple):
    """The document of some files."""

    name: str
    """Of its first file."""
    document: Document | Rejected
    share: float
    """Of all there is to read, which has been read so far."""


def unpacking(path: Path) -> Any:
    """The file, opened; what gzip packed, as it was before."""
    return gzip.open(path) if path.suffix.lower() in (".gz", ".tgz") else path.open("rb")


def share_of(file: Any, size: int) -> float:
    """How much has been read of what `unpacking` opened, a file of `size` bytes on disk."""
    on_disk: Any = file.fileobj if isinstance(file, gzip.GzipFile) else file
    return on_disk.tell() / max(size, 1)


def stem(name: str) -> tuple[str, str]:
    """Folder, and name without its ending: what files of one document of a folder share. Of `cat.jpg.json`, beside
    `cat.jpg`, it is `cat`; of `2024.01.02.txt`, `2024.01.02`."""
    folder, base = os.path.split(name)
    base, _ = os.path.splitext(base)
    while _kind(base):
        base, _ = os.path.splitext(base)
    return folder, base


def member_stem(name: str) -> tuple[str, str]:
    """The same in a tar file: as in WebDataset, up to the first dot of the name."""
    folder, base = os.path.split(name)
    return folder, base.split(".", 1)[0]


def from_folder(
    folder: Path, groups: Sequence[Sequence[str]], label: str, most: int, media: bool = True
) -> Iterator[Group]:
    """The documents of these files, whose names are relative to the folder; without `media`, `UNREAD` in their place."""

    def reader(name: str) -> Reader:
        return lambda left: read_within(folder, name, left) if media or kind_of(name) not in MEDIA else UNREAD

    for i, group in enumerate(groups, start=1):
        yield _group({name: reader(name) for name in group}, stem, label, most, i / len(groups))


def from_tar(path: Path, label: str, most: int, media: bool = True) -> Iterator[Group]:
    """The documents of a tar file, of members that follow each other, as in WebDataset; without `media`, `UNREAD` in their
    place.

    What cannot be read on is one rejected document.
    """
    at, left, size = path.name, most, path.stat().st_size
    group: dict[str, Reader] = {}
    with unpacking(path) as raw:
        try:
            stream = Stream(raw, size, most)
            with _Tar.open(fileobj=stream, mode="r:", tarinfo=_Member) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
                while (member := tar.next()) is not None:
                    if len(member.name) > _LONGEST_PATH:
                        raise tarfile.TarError(f"a name of {len(member.name):,} characters follows")
                    at = shown(member.name)
                    if member.isdir() or any(part[0] == "." and part != ".." for part in Path(member.name).parts):
                        continue  # hidden, as macOS adds ._cat.jpg
                    if group and member_stem(member.name) != member_stem(next(iter(group))):
                        yield _group(group, member_stem, label, most, share_of(raw, size))
                        group, left = {}, most
                    if len(group) <= FILES_OF_A_DOCUMENT:  # one more than there may be tells that there are too many
                        data = _member(tar, member, left, media)
                        if member.name in group:
                            data = Rejected("duplicate file", f"{member.name}: is there twice")
                        left -= len(data) if isinstance(data, bytes) else 0
                        group[member.name] = _given(data)
            if stream.last != bytes(tarfile.BLOCKSIZE):
                raise tarfile.TarError("it ends without the mark of its end, or has bytes that are no header")
            # A header of zeros looks like the end, too, as does the end of the first of several files in one.
            while rest := stream.read(_BLOCK):
                if rest.count(0) != len(rest):
                    raise tarfile.TarError("more follows the mark of its end")
            if group:
                yield _group(group, member_stem, label, most, 1.0)
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, IndexError, RecursionError) as error:
            # What was not finished before may lack a file: it is part of what is lost.
            name = shown(next(iter(group), at))
            yield Group(name, Rejected("damaged", f"the rest of the file cannot be read, from {at} on ({error})"), 1.0)


class _Tar(tarfile.TarFile):
    """A tar file that is read once, of bounded memory."""

    extra_bytes = extra_bytes_of_all = 0
    """Of headers that say more of the next file, and of all that follow."""

    def next(self) -> tarfile.TarInfo | None:
        self.members.clear()  # it would keep them all  # pyright: ignore[reportAttributeAccessIssue]
        self.extra_bytes = 0
        return super().next()


class _Member(tarfile.TarInfo):
    """A file of a `_Tar`. Maps of sparse files are passed over, since these are refused: they may be of any length."""

    def _proc_member(self, tar: Any) -> tarfile.TarInfo:  # for subclasses to override, as the library says
        if self.type == tarfile.XGLTYPE:
            tar.extra_bytes_of_all += self.size
        elif self.type in (
            tarfile.XHDTYPE,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        ):
            tar.extra_bytes += self.size
        if self.size < 0 or max(tar.extra_bytes, tar.extra_bytes_of_all) > _EXTRA_BYTES:
            raise tarfile.ReadError(f"it has headers of a file with more than {_EXTRA_BYTES:,} bytes, or fewer than 0")
        return super()._proc_member(tar)  # pyright: ignore[reportAttributeAccessIssue]

    def _proc_sparse(self, tar: Any) -> tarfile.TarInfo:
        _, more, _ = self._sparse_structs  # pyright: ignore[reportAttributeAccessIssue]
        while more:
            block = tar.fileobj.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"{self.name} is cut short")
            more = block[504]
        self.sparse = b""
        return self._proc_builtin(tar)  # pyright: ignore[reportAttributeAccessIssue]

    def _proc_gnusparse_00(self, member: tarfile.TarInfo, *_: Any) -> None:
        member.sparse = b""

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


def _group(
    group: Mapping[str, Reader], stem_of: Callable[[str], tuple[str, str]], label: str, most: int, share: float
) -> Group:
    first = next(iter(group))
    folder, base = stem_of(first)
    return Group(shown(first), _grouped(os.path.join(folder, base), label, group, most), share)


def _given(data: bytes | Rejected) -> Reader:
    def read(_: int) -> bytes:
        if isinstance(data, Rejected):
            raise data
        return data

    return read


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, left: int, media: bool) -> bytes | Rejected:
    if member.issym() or member.islnk():
        return Rejected("link", f"{member.name}: is a link, expected a file")
    if not member.isreg() or member.sparse is not None:
        return Rejected("file type", f"{member.name}: is no regular file")
    if member.name.startswith("/") or ".." in Path(member.name).parts:
        return Rejected("path", f"{member.name}: leaves the folder, expected a path below it")
    if member.size > left:
        return too_large(member.name, member.size, left)
    if not media and kind_of(member.name) in MEDIA:
        return UNREAD
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return data


def _grouped(stem: str, label: str, group: Mapping[str, Reader], most: int) -> Document | Rejected:
    """The document of files that belong together: by their json file if it is a record, else files, then texts."""
    default_id = shown(os.path.join(label, stem))
    try:
        if len(group) > FILES_OF_A_DOCUMENT:
            raise Rejected("too large", f"found more than {FILES_OF_A_DOCUMENT:,} files of one document")
        contents: dict[str, bytes] = {}
        aside: dict[str, str] = {}
        record: Any = {}
        of_json, left = "", most
        # What is of no kind comes last: alone, it is no document.
        for name, read in sorted(group.items(), key=lambda file: _kind(file[0]) is None):
            kind = _kind(name)
            if kind is None and not (contents or record):
                raise _of_no_kind(name)
            data = read(left)
            left -= len(data)
            if kind == "json" and of_json:
                raise Rejected("duplicate file", f"{name}: found a second .json beside {of_json}, expected one")
            if kind == "json":
                of_json, record = name, from_json(data, name)
            elif kind:
                contents[name] = data
            else:
                aside[shown(name[len(stem) + 1 :])] = _aside(data, name)
        if isinstance(record, dict) and all(record.get(name) is None for name in (*FORMS, *MEDIA)):
            document = parse({**record, "parts": _parts(contents)}, default_id)
        else:
            document = _with_others(parse(record, default_id, bool(contents)), record, contents, most)
        return replace(document, metadata={**aside, **(document.metadata or {})} or None)
    except Rejected as rejected:
        return rejected


def _with_others(document: Document, record: Mapping[str, Any], contents: Mapping[str, bytes], most: int) -> Document:
    """The document of a .json with its files: media that it does not name come first, and texts last if it has none.

    A list of parts or messages names all of its files. What has no place in the document is refused.
    """
    left, others = most, dict(contents)

    def named(path: str) -> bytes:
        nonlocal left
        for name, data in contents.items():
            if path in (name, os.path.basename(name)):
                if len(data) > left:  # a record may name a file many times
                    raise too_large(name, len(data), left)
                left -= len(data)
                others.pop(name, None)
                return data
        raise Rejected("missing file", f"{path}: is not among {', '.join(contents) or 'no files'}")

    document = with_files(document, named)
    for form in FORMS:
        refused = (name for name in others if form != "text" or kind_of(name) == "text")
        if record.get(form) is not None and (name := next(refused, None)):
            expected = "no text beside it" if form == "text" else "the path of each file beside it in one of them"
            raise Rejected(
                "unnamed file", f"{name}: is not in the document, whose .json has {form}, expected {expected}"
            )
    if not others:
        return document
    more = parse({"parts": _parts(others)}, document.id, True).parts
    media, texts = (tuple(part for part in more if (part.kind == "text") == is_text) for is_text in (False, True))
    return replace(document, parts=(*media, *document.parts, *texts))


def _kind(name: str) -> str | None:
    return "json" if name.lower().endswith(".json") else kind_of(name)


def _aside(data: bytes, name: str) -> str:
    """A small text of no kind, such as a class's number, beside files of a document."""
    if len(data) > _ASIDE_BYTES:
        raise _of_no_kind(name)
    try:
        return decoded(data, name)
    except Rejected:
        raise _of_no_kind(name) from None


def _of_no_kind(name: str) -> Rejected:
    return Rejected(
        "file type",
        f"{name}: found {os.path.splitext(name)[1] or 'no extension'}, expected .json, a text, an image, a video or a sound; "
        f"or, beside one of these, UTF-8 of at most {_ASIDE_BYTES:,} bytes, which is kept as metadata",
    )


def _parts(contents: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Parts of files by their names, texts last."""
    parts = []
    for name, data in contents.items():
        if not data:
            raise Rejected("empty", f"{name}: found a file of zero bytes")
        kind = kind_of(name)
        parts.append({"type": kind, "text": decoded(data, name)} if kind == "text" else {"type": kind, "data": data})
    return sorted(parts, key=lambda part: part["type"] == "text")


class Stream:
    """A file that is read forwards, and fails where it grows out of proportion to its size on disk."""

    def __init__(self, file: IO[bytes], size: int, most: int):
        """`size`: bytes on disk; `most`: bytes that may be asked for at once."""
        self._file, self._most, self._limit = file, most, max(_BOMB_RATIO * size, _BOMB_BYTES)
        self._at = 0
        self.last = b""
        """What was read last."""

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int) -> int:
        if offset < self._at:
            raise OSError("it refers to bytes before those that were read")
        if not isinstance(self._file, gzip.GzipFile):
            self._at = self._file.seek(offset)
        while self._at < offset and self.read(min(offset - self._at, _BLOCK)):
            pass
        return self._at

    def read(self, size: int = -1) -> bytes:
        if size > self._most + _BLOCK:
            raise OSError(f"it has a header of {size:,} bytes")
        return self._counted(self._file.read(size))

    def readline(self, size: int) -> bytes:
        return self._counted(self._file.readline(size))

    def _counted(self, data: bytes) -> bytes:
        self._at += len(data)
        self.last = data
        if self._at > self._limit:
            raise OSError(f"it holds more than {self._limit:,} bytes, more than {_BOMB_RATIO} times its size on disk")
        return data
