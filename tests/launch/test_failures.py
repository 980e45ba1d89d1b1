"""Errors become one message with a cure, wherever a library has wrapped them."""

import errno
import os
from pathlib import Path

import pytest

from launch.failures import cure, report
from sharding.errors import UserError

WORKDIR = Path("runs/x")


def system_error(code: int, path: str | None = None) -> OSError:
    return OSError(code, os.strerror(code), path) if path else OSError(code, os.strerror(code))


def wrapped(error: Exception) -> Exception:
    """As a library raises it: another type, the cause below it."""
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("save failed") from cause
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped], ids=["bare", "wrapped"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("say this"), ["say this"]),
        (system_error(errno.ENOSPC, "/data/file"), ["/data/file: the disk is full", "Free some space"]),
        (system_error(errno.ENOSPC), ["runs/x: the disk is full"]),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device [/a/b]"), ["runs/x: the disk is full"]),
        (system_error(errno.EACCES, "/root/x"), ["/root/x: Permission denied", "--workdir"]),
        (system_error(errno.EROFS, "/usr/x"), ["/usr/x: Read-only file system"]),
        (MemoryError(), ["out of memory", "--config.optimizer.accumulate"]),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), ["allocating 8 bytes", "batch_size"]),
    ],
    ids=str,
)
def test_what_the_user_can_cure_names_the_cure(error, told, wrap):
    message = cure(wrap(error), WORKDIR)
    assert message
    for part in told:
        assert part in message


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("x"), FileNotFoundError(2, "No such file", "x")])
def test_a_bug_is_not_blamed_on_the_user(error):
    assert cure(error, WORKDIR) is None


def test_a_failure_that_was_handled_is_not_the_cause():
    try:
        try:
            raise system_error(errno.EACCES, "/probe")
        except OSError:
            raise ValueError("a bug") from None
    except ValueError as error:
        assert cure(error, WORKDIR) is None


def test_a_traceback_that_the_run_directory_cannot_hold_goes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    status, text = report(ValueError("a bug"), "drover train", tmp_path / "never made", show_traceback=False)
    (written,) = tmp_path.glob("crash-*.txt")
    assert status == 1 and str(written) in text


def test_a_traceback_that_nothing_can_hold_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "gone"))
    status, text = report(ValueError("a bug"), "drover train", None, show_traceback=False)
    assert status == 1 and "here it is:" in text
