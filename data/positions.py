"""Where windows of documents begin, of which some are known: the others are found from the nearest before them.

A `Position` is a few numbers. `Positions` keeps a bounded number of them, spread over the rows that have been packed, in
memory and in a file that all processes share, so that a far row is found soon once any of them has been there.
"""

import contextlib
import os
import tempfile
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from data.open_files import mapped
from sharding.errors import UserError

MOST = 4096
"""Positions that are kept, at the least half as many: of so many equal parts of the rows, the first."""
RECENT = 256
"""Positions that are kept beside them, the latest: a run asks for one window after the other; further away is a jump."""
SAVE_EVERY = 1024
"""Windows packed before the file is written again; they take some seconds."""


@dataclass(frozen=True)
class Position:
    """Where a window begins."""

    row: int
    """Its first one."""
    taken: tuple[int, ...]
    """Documents that windows before it have of each source."""
    owed: tuple[float, ...]
    """Parts of a document that the source has not been given yet, from 0 to below 1."""

    @classmethod
    def start(cls, sources: int) -> Self:
        return cls(0, (0,) * sources, (0.0,) * sources)

    def as_array(self) -> np.ndarray:
        """float64 [1 + 2 x sources]; whole numbers up to 2^53 are exact."""
        return np.array([self.row, *self.taken, *self.owed], np.float64)

    @classmethod
    def from_array(cls, array: np.ndarray) -> Self:
        count = (len(array) - 1) // 2
        row, *rest = array.tolist()
        return cls(int(row), tuple(map(int, rest[:count])), tuple(rest[count:]))

    def plain(self, names: Sequence[str]) -> dict[str, Any]:
        """For JSON, by the names of the sources."""
        taken, owed = (dict(zip(names, values, strict=True)) for values in (self.taken, self.owed))
        return {"row": self.row, "taken": taken, "owed": owed}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], names: Sequence[str]) -> Self:
        """With sources that were not there then."""
        taken, owed = plain["taken"], plain["owed"]
        return cls(
            int(plain["row"]), tuple(taken.get(name, 0) for name in names), tuple(owed.get(name, 0.0) for name in names)
        )


class Positions:
    """The positions that are known, for one order of rows. Not safe for threads."""

    def __init__(self, sources: int, file: Path | None = None, given: Position | None = None):
        """With those in the file, if it is there.

        Args:
            sources: how many there are.
            file: where they are kept; its name stands for the order of rows. None keeps them in memory.
            given: one more, of a checkpoint. Then the file is read but not written: should the position be one of other
                data, which is found out later, other processes do not hear of it.

        Raises:
            UserError: the file is damaged, or too many files are open.
        """
        self._file, self._sources, self._writes = file, sources, given is None
        self._rows, self._known, self._apart = [0], [Position.start(sources)], 1
        self._recent: deque[Position] = deque(maxlen=RECENT)
        self._unsaved, self._new = 0, False
        for position in self._read():
            self._keep(position)
        if given is not None:
            self._recent.append(given)
            self._keep(given)

    def __len__(self) -> int:
        return len(self._known)

    def before(self, row: int) -> Position:
        """The last one known from which the row is found."""
        known = self._known[bisect_right(self._rows, row) - 1]
        recent = (position for position in self._recent if position.row <= row)
        return max(known, max(recent, key=lambda position: position.row, default=known), key=lambda each: each.row)

    def add(self, position: Position) -> None:
        """Takes note of one; from time to time, writes the file."""
        self._recent.append(position)
        self._new |= self._keep(position)
        self._unsaved += 1
        if self._unsaved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes what is known here and to other processes. They may write at the same time: the last one counts."""
        self._unsaved = 0
        if self._file is None or not self._writes or not self._new:
            return
        # It saves time and no more: where there is no room for it, or it cannot be read just then, a run goes on.
        with contextlib.suppress(OSError, UserError):
            for position in self._read():
                self._keep(position)
            beside, name = tempfile.mkstemp(dir=self._file.parent, prefix=f".{self._file.name}.")
            try:
                with open(beside, "wb") as file:
                    np.save(file, np.stack([position.as_array() for position in self._known]))
                os.replace(name, self._file)
            except OSError:
                os.unlink(name)
                raise
        self._new = False

    def _keep(self, position: Position) -> bool:
        """Keeps it unless another one of the same part of the rows is."""
        i = bisect_right(self._rows, position.row)
        if self._rows[i - 1] // self._apart == position.row // self._apart:
            return False
        self._rows.insert(i, position.row)
        self._known.insert(i, position)
        while len(self._known) > MOST:
            self._apart *= 2
            firsts = {p.row // self._apart: p for p in reversed(self._known)}
            self._known = sorted(firsts.values(), key=lambda p: p.row)
            self._rows = [p.row for p in self._known]
        return True

    def _read(self) -> list[Position]:
        if self._file is None:
            return []
        try:
            table = mapped(self._file)
            return [Position.from_array(array) for array in table.reshape(-1, 1 + 2 * self._sources)]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"data.cache_dir: {self._file} cannot be read ({error}). Delete it, and it is made anew."
            ) from error
