"""Bars for long work: on a terminal alone, so that logs hold no control codes."""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from data.prepare import Told

SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def byte_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` bytes are done; yields what is to be called with the bytes of each piece of work."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


@contextlib.contextmanager
def work_bar(title: str, total: int, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Shows how many pieces of work are done and the time that is left; yields what is to be called after each, with what
    there is to say. Without a terminal, a line from time to time, with the time that is left at the pace since the last.
    `quiet`: shows nothing, another process does."""
    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        done, told, last = 0, 0, time.monotonic()

        def advance(text: str) -> None:
            nonlocal done, told, last
            done += 1
            progress.update(task, completed=done, description=f"{title}: {text}")
            since = time.monotonic() - last
            if not console.is_terminal and since > SECONDS_BETWEEN_LINES:
                left = datetime.timedelta(seconds=round(since / (done - told) * (total - done)))
                told, last = done, last + since
                console.print(f"{title}: {done} of {total}, {text}, {left} left", soft_wrap=True)

        yield advance


@contextlib.contextmanager
def prepare_bar(title: str) -> Iterator[Callable[["Told"], None]]:
    """Shows how much of the input is prepared; without a terminal, a line from time to time."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        last = time.monotonic()

        def tell(told: "Told") -> None:
            nonlocal last
            counts = f"{told.read:,} records, {told.rejected:,} rejected"
            progress.update(task, total=told.total, completed=told.done, description=f"{title}: {counts}")
            if not console.is_terminal and time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                console.print(f"{title}: {told.done / max(told.total, 1):.0%}, {counts}")

        yield tell
