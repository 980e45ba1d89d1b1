"""Files that stay open. A process may have so many of them and no more: 1,024, most often."""

import errno
import os
import resource
from pathlib import Path

import numpy as np

from sharding.errors import UserError

_SMALL = 2**16
"""Bytes up to which an array is read: one that is mapped holds a file descriptor for as long as it lives."""


def limit() -> int:
    """Files that this process may have open at once."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def check_limit(path: Path, error: Exception) -> None:
    """Raises a UserError where opening a file failed since too many are open; nothing is wrong with the file then."""
    # ArrayRecord raises RuntimeError, which has the reason as text alone.
    if getattr(error, "errno", None) == errno.EMFILE or os.strerror(errno.EMFILE) in str(error):
        raise UserError(
            f"{path}: cannot be opened, since this process has {limit():,} files open already, as many as it may. Raise the "
            "limit (ulimit -n 65536), or use fewer data sets at once."
        ) from error


def mapped(path: Path) -> np.ndarray:
    """An array of a .npy file, mapped from disk unless it is small.

    Raises:
        UserError: too many files are open.
        Exception: the file is missing or damaged; NumPy and zipfile raise errors of many kinds.
    """
    try:
        small = path.stat().st_size <= _SMALL
        return np.asarray(np.load(path, mmap_mode=None if small else "r", allow_pickle=False))
    except Exception as error:
        check_limit(path, error)
        raise
