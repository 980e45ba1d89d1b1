"""Files that are made once and kept: written beside their place and renamed into it, so that none is ever seen half."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from data.open_files import check_limit, mapped
from sharding.errors import UserError

_FORMAT = 4
"""Of everything that is kept: what another version has made is made anew."""


def name(kind: str, *parts: object) -> str:
    """Of what is made from these parts alone."""
    return f"{kind}-{hashlib.sha256(repr((_FORMAT, *parts)).encode()).hexdigest()[:32]}"


def text_file(folder: Path, name: str, make: Callable[[], str]) -> str:
    """The text of folder/name, made and kept if it is not there. `make` gives the same in every process.

    Raises:
        UserError: the folder cannot be written.
    """
    path = folder / name
    if text := _read(path):
        return text
    made = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix=f".{name}.", delete=False) as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return made


def arrays(folder: Path, name: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays kept in the folder folder/name, mapped from disk, made and kept if they are not there.

    Raises:
        UserError: the folder cannot be written, or too many files are open.
    """
    path = folder / name
    if not (path / "complete").exists():
        made = make()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
            try:
                for key, array in made.items():
                    with open(unfinished / f"{key}.npy", "wb") as file:
                        np.save(file, array)
                        file.flush()
                        os.fsync(file.fileno())
                (unfinished / "complete").touch()
                os.rename(unfinished, path)
            except OSError:
                shutil.rmtree(unfinished, ignore_errors=True)
                if not (path / "complete").exists():  # else another process made them first
                    raise
        except OSError as error:
            raise _unwritable(folder, error) from error
    try:
        return {file.stem: mapped(file) for file in sorted(path.glob("*.npy"))}
    except (OSError, ValueError, EOFError) as error:
        check_limit(path, error)
        raise UserError(
            f"data.cache_dir: {path} is damaged ({error}). Delete that folder, and it is made anew."
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir: cannot use {folder} ({error.strerror or error}). It keeps the tokenizer and the tokenised "
        "text. Make room or set data.cache_dir to a folder that can be read and written."
    )
