"""What the command line says when something goes wrong: one message with its cure, a traceback only on request."""

import contextlib
import datetime
import errno
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from launch import __version__
from sharding.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def report(error: BaseException, command: str, workdir: Path | None, show_traceback: bool) -> tuple[int, str]:
    """What to say on stderr of what happened, and the exit status.

    Args:
      error: what ended the command.
      command: `drover train`, for the beginning of the message.
      workdir: the run directory where there is one; a crash writes its traceback there.
      show_traceback: say the traceback too.

    Returns:
      The exit status, 130 after Ctrl-C, 2 for what the user can cure, 1 for anything else; and the text.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130, f"\n{command}: interrupted"
    message = cure(error, workdir)
    lines = ["".join(traceback.format_exception(error)).rstrip()] if show_traceback else []
    if message is not None:
        return 2, "\n".join([*lines, f"{command}: {message}"])
    lines.append(f"{command}: crashed: {traceback.format_exception_only(error)[-1].strip()}")
    if not show_traceback:
        lines.append(f"This is probably a mistake in Drover, not yours. {_keep_traceback(error, workdir)}")
    return 1, "\n".join(lines)


def cure(error: BaseException, workdir: Path | None) -> str | None:
    """What to say of an error that the user can cure; None for any other.

    Libraries wrap what the system told them, so the whole chain of causes is searched.
    """
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause)
        where = getattr(cause, "filename", None) or workdir or "it"
        code = cause.errno if isinstance(cause, OSError) else None
        if code in FULL or os.strerror(errno.ENOSPC).lower() in str(cause).lower():
            return (
                f"{where}: the disk is full. Free some space and start the same command again (a run goes on from its "
                "last checkpoint), or give another run directory with --workdir."
            )
        if code in REFUSED:
            return (
                f"{where}: {os.strerror(code)}. Make it accessible to this user, or give another run directory with "
                "--workdir."
            )
        if isinstance(cause, MemoryError) or "RESOURCE_EXHAUSTED" in str(cause):
            return (
                f"out of memory: {str(cause).strip().splitlines()[0] if str(cause) else 'no details'}\n"
                "Make a step smaller: raise --config.optimizer.accumulate (same batch in more pieces), set "
                "--config.model.remat=full, or lower --config.data.batch_size."
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _keep_traceback(error: BaseException, workdir: Path | None) -> str:
    """Writes the traceback to the run directory, or to the temporary folder where that cannot be; says where."""
    now = datetime.datetime.now()
    text = (
        f"{now:%Y-%m-%d %H:%M:%S}  {shlex.join(sys.argv)}\n"
        f"drover {__version__}, Python {platform.python_version()} on {platform.platform()}\n\n"
        + "".join(traceback.format_exception(error))
    )
    name = f"crash-{now:%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    folders = [workdir] if workdir is not None and workdir.is_dir() else []
    for folder in [*folders, Path(tempfile.gettempdir())]:
        with contextlib.suppress(OSError):
            (folder / name).write_text(text)
            return f"The traceback is in {folder / name}; --traceback prints it here."
    return f"The traceback could be written nowhere, so here it is:\n\n{text}"
