"""Files that stay open, and what keeps a whole one from being read. A process may have 1,024 open, most often."""

import errno
import os
import resource
from pathlib import Path

import numpy as np

from sharding.errors import UserError

_SMALL = 2**16
"""Bytes up to which an array is read: one that is mapped holds a file descriptor for as long as it lives."""
_DISK = "The disk or the network that it is on failed. See the system's log (dmesg), and give the same command again."
_CURES = {
    errno.ENFILE: "The machine has as many files open as it may. End other processes, or raise sysctl fs.file-max.",
    errno.ENOMEM: "No memory is left. End other processes, or take a machine with more.",
    errno.EACCES: "This user may not. Change the permissions of it and of the folders that it is in.",
    errno.EIO: f"{_DISK} If it stays so, copy the file again from elsewhere.",
    errno.ESTALE: _DISK,
    errno.ETIMEDOUT: _DISK,
}
"""What to do where a file may be whole and cannot be used."""


def limit() -> int:
    """Files that this process may have open at once."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def check_limit(path: Path, error: Exception) -> None:
    """Raises a UserError where a file could not be used for a reason that is not in the file: too many are open, no memory is
    left, the disk failed."""

    # ArrayRecord raises RuntimeError, which has the reason as text alone.
    def due_to(number: int) -> bool:
        return getattr(error, "errno", None) == number or os.strerror(number) in str(error)

    if isinstance(error, MemoryError):
        raise UserError(f"{path}: cannot be used (out of memory). {_CURES[errno.ENOMEM]}") from error
    for number, cure in _CURES.items():  # the text of ENFILE begins with that of EMFILE
        if due_to(number):
            raise UserError(f"{path}: cannot be used ({os.strerror(number)}). {cure}") from error
    if due_to(errno.EMFILE):
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
