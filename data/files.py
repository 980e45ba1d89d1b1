"""Files of a data set that anybody may have made: read within a folder, up to a size, never through a link."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from data.documents import Kind, Rejected

TEXTS = (".txt", ".md")
EXTENSIONS: dict[Kind, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "video": (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".ogv"),
    "audio": (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
}
"""How files of a kind end, in lower case."""
MB = 10**6


def shown(name: str) -> str:
    """The name of a file as text; bytes in it that are no UTF-8, as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def kind_of(name: str) -> Kind | None:
    """The kind of a file by its name; None where no kind ends so."""
    extension = os.path.splitext(name)[1].lower()
    if extension in TEXTS:
        return "text"
    return next((kind for kind, extensions in EXTENSIONS.items() if extension in extensions), None)


def read_within(folder: Path, path: str, most: int) -> bytes:
    """The bytes of `folder`/`path`, a regular file of at most so many bytes.

    Raises:
        Rejected: the path leaves the folder or goes through a link, there is no such file, or it is too large.
    """
    if "://" in path or path.startswith("data:"):
        raise Rejected("path", f"{path}: found an address, expected the path of a file. Download it first.")
    names = Path(path).parts
    if Path(path).is_absolute() or ".." in names or "\0" in path:
        raise Rejected("path", f"{path}: leaves the folder of the record, expected a path below it")
    at = folder
    try:
        for name in names:
            at = at / name
            if stat.S_ISLNK(at.lstat().st_mode):
                raise Rejected("link", f"{path}: goes through a symbolic link, which may lead anywhere")
        return read_file(at, path, most)
    except (FileNotFoundError, NotADirectoryError):
        raise Rejected("missing file", f"{path}: there is no such file in {folder}") from None
    except OSError as error:
        raise Rejected("unreadable", f"{path}: {error.strerror or error}") from None


def read_file(file: Path, name: str, most: int) -> bytes:
    """The bytes of a regular file, not through a link in its last place; `Rejected` where it is none or too large."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):  # open() would refuse a folder, and leave it open
            raise Rejected("file type", f"{name}: is no regular file")
        if status.st_size > most:
            raise too_large(name, status.st_size, most)
        with open(descriptor, "rb", closefd=False) as opened:
            return opened.read(most + 1)
    finally:
        os.close(descriptor)


def too_large(name: str, found: int, most: int) -> Rejected:
    return Rejected("too large", f"{name}: found {found:,} bytes, expected at most {most:,} (--max-record-mb)")


def decoded(data: bytes, name: str) -> str:
    """The text of these bytes; `Rejected` where they are no UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("utf-8", f"{name}: found no UTF-8 at byte {error.start} ({error.reason})") from None


def from_json(data: bytes, name: str) -> Any:
    """What this JSON says; `Rejected` where it is none."""
    try:
        return json.loads(decoded(data, name))
    except (ValueError, RecursionError) as error:
        raise Rejected("json", f"{name}: found no JSON ({error})") from None
