"""Which documents share a row, and which row comes n-th.

A *cycle* is a sequence of documents in which every source has its share of the tokens: the source that lasts longest
appears once, the others as often as their share asks for, each of their epochs in an order of its own. The cycle is cut
into windows, and each window is packed by itself into rows of so many tokens, tiles and windows of sound.
Prefix sums over the rows of the windows find row n without the documents before it. After the last row of a cycle comes
the next cycle, which visits the same windows, and the rows in each, in another order; so no row, however far, costs
more than the packing of one cycle.

A *size* is what a document takes of a row: (tokens, tiles, windows of sound).
"""

import functools
import itertools
import math
import threading
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from data.shuffle import shuffled

ROWS_OF_A_WINDOW = 32
"""A window has documents for about so many rows at least: its last row is seldom full."""

Size = tuple[int, int, int]

_MOST_STATES = 2**18
"""Of the search for the fullest row; a row of 8,192 tokens with 3 tiles free has 114,695."""


class Packing:
    """The order of packed rows, a pure function of its arguments."""

    def __init__(
        self,
        sizes: Sequence[np.ndarray],
        shares: Sequence[float],
        room: Size,
        window: int,
        seed: int,
        row_parts: int = 1,
    ):
        """Rows are packed when they are asked for.

        Args:
            sizes: for each source, those of its documents, [documents, 3]; none above `room`.
            shares: for each source, its share of the tokens, above zero.
            room: of a row, in the order of a size.
            window: documents packed together, at least.
            seed: decides every order.
            row_parts: equal parts of a row; only a document that begins where a part does goes beyond its end.
        """
        self._sizes, self._room, self._row_parts, self._seed = sizes, room, row_parts, seed
        # Documents per token of the mixture, and how many tokens of the mixture it takes to use every source up.
        means = [np.asarray(size.mean(axis=0, dtype=np.float64)) for size in sizes]
        rates = [share / sum(shares) / float(mean[0]) for share, mean in zip(shares, means, strict=True)]
        tokens = max(len(size) / rate for rate, size in zip(rates, sizes, strict=True))
        self.documents_per_cycle = tuple(max(round(rate * tokens), 1) for rate in rates)
        """For each source, how many documents a cycle takes from it."""
        documents = sum(self.documents_per_cycle)
        taken = np.average(means, axis=0, weights=self.documents_per_cycle)
        of_a_row = max(mean / most for mean, most in zip(taken.tolist(), room, strict=True) if most)
        self._windows = math.ceil(documents / max(window, ROWS_OF_A_WINDOW / of_a_row))
        self._ends: list[int] = []  # rows up to the end of each window, as far as they are known
        self._lock = threading.Lock()
        # Each instance has caches of its own, as large as a run needs to go on without packing a window twice.
        self._packed = functools.lru_cache(maxsize=4096)(self._pack)
        self._cycle_order = functools.lru_cache(maxsize=2)(self._permute_cycle)

    def row(self, n: int) -> list[tuple[int, int, int]]:
        """The documents in row n, in order, as (source, document, where it begins)."""
        cycle = 0
        if not self._covers(n):
            cycle, n = divmod(n, self._ends[-1])
        if cycle == 0:
            ends, windows = self._ends, None  # the documents of the first cycle are in random order already
        else:
            ends, windows = self._cycle_order(cycle)
        at = bisect_right(ends, n)
        window = at if windows is None else int(windows[at])
        rows = self._packed(window)
        order = np.random.default_rng([self._seed, 2, cycle, window]).permutation(len(rows))
        return rows[order[n - (int(ends[at - 1]) if at else 0)]]

    def _covers(self, n: int) -> bool:
        """Packs windows until row n is reached; False if the cycle has no such row."""
        with self._lock:
            while len(self._ends) < self._windows and (not self._ends or n >= self._ends[-1]):
                rows = self._packed(len(self._ends))
                self._ends.append((self._ends[-1] if self._ends else 0) + len(rows))
            return n < self._ends[-1]

    def _pack(self, window: int) -> list[list[tuple[int, int, int]]]:
        documents: list[tuple[int, int]] = []
        sizes: list[Size] = []
        for source, total in enumerate(self.documents_per_cycle):
            first, last = (total * w // self._windows for w in (window, window + 1))
            numbers = self._stream(source, first, last)
            documents += zip(itertools.repeat(source), numbers.tolist())
            sizes += map(tuple, self._sizes[source][numbers].tolist())
        rows = pack_rows(sizes, self._room, self._row_parts)
        return [[(*documents[i], start) for i, start in row] for row in rows]

    def _stream(self, source: int, first: int, last: int) -> np.ndarray:
        """Documents first to last - 1 of the source's epochs, one after the other."""
        count = len(self._sizes[source])
        places = np.arange(first, last)
        epochs = places // count
        numbers = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            numbers[of_epoch] = shuffled(places[of_epoch] % count, count, (self._seed, source, epoch))
        return numbers

    def _permute_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows up to the end of each window, windows) in the order in which this cycle visits the windows."""
        windows = np.random.default_rng([self._seed, 1, cycle]).permutation(self._windows)
        return np.cumsum(np.diff([0, *self._ends])[windows]), windows


def pack_rows(sizes: Sequence[Size], room: Size, parts: int = 1) -> list[list[tuple[int, int]]]:
    """Packs documents of these sizes into rows.

    Each row takes the longest document that is left, and then those that, of all subsets, leave the fewest tokens
    unused (a subset-sum, where best fit adds one document at a time and leaves twice to five times as much).

    In rows of several parts the same is done part by part: the longest document that fits in the rest of the row, and
    those that fill the part in which it ends. So a document that crosses the edge of a part begins at one.

    Returns:
        for each row, its documents and where they begin, in order.
    """
    left = sorted(range(len(sizes)), key=lambda i: -sizes[i][0])
    tokens = room[0]
    part = tokens // parts
    rows = []
    while left:
        row: list[tuple[int, int]] = []
        at, rest = 0, room
        while at < tokens:
            rest = (tokens - at, rest[1], rest[2])
            longest = next((i for i in left if _fits(sizes[i], rest)), None)
            if longest is None:
                break
            end = at + sizes[longest][0]
            edge = -(-end // part) * part
            _, tiles, windows = _less(rest, sizes[longest])
            others = [i for i in left if i != longest]
            chosen = [longest, *_fullest(others, sizes, (edge - end, tiles, windows))]
            for i in chosen:
                row.append((i, at))
                at, rest = at + sizes[i][0], _less(rest, sizes[i])
            taken = set(chosen)
            left = [i for i in left if i not in taken]
            at = edge
        rows.append(row)
    return rows


def _fits(size: Size, room: Size) -> bool:
    return size[0] <= room[0] and size[1] <= room[1] and size[2] <= room[2]


def _less(room: Size, size: Size) -> Size:
    return room[0] - size[0], room[1] - size[1], room[2] - size[2]


def _fullest(left: list[int], sizes: Sequence[Size], room: Size) -> list[int]:
    """The documents out of `left` that fill the room best; of several ways, one that takes the longer documents.

    Where tiles and windows make that too large a search, each document in turn that still fits.
    """
    fitting = [i for i in left if _fits(sizes[i], room)]
    tokens, tiles, windows = room
    # Most often tiles and windows are no hindrance, and then what fills the tokens best is the best.
    taken = _subset(fitting, [(sizes[i][0], 0, 0) for i in fitting], (tokens, 0, 0))
    if sum(sizes[i][1] for i in taken) <= tiles and sum(sizes[i][2] for i in taken) <= windows:
        return taken
    if (2 * tokens + 1) * (2 * tiles + 1) * (windows + 1) <= _MOST_STATES:
        return _subset(fitting, [sizes[i] for i in fitting], room)
    taken = []
    for i in fitting:
        if _fits(sizes[i], room):
            taken.append(i)
            room = _less(room, sizes[i])
    return taken


def _subset(documents: list[int], sizes: list[Size], room: Size) -> list[int]:
    """The subset of the documents that has the most tokens in the room; all of them fit it alone."""
    # Bit (w * by_window + t * by_tile + n) of `sums` is set if some of the documents seen so far have n tokens, t tiles
    # and w windows together. The strides leave room for one addition to overflow, which the mask then clears.
    by_tile = 2 * room[0] + 1
    by_window = by_tile * (2 * room[1] + 1)
    starts = [w * by_window + t * by_tile for w in range(room[2] + 1) for t in range(room[1] + 1)]
    every = (1 << (room[0] + 1)) - 1
    mask = sum(every << start for start in starts)
    full = sum(1 << (start + room[0]) for start in starts)
    places = [tokens + tiles * by_tile + windows * by_window for tokens, tiles, windows in sizes]
    sums, before = 1, []
    for place in places:
        before.append(sums)
        sums |= (sums << place) & mask
        if sums & full:
            break
    by_start = [((sums >> start) & every).bit_length() - 1 for start in starts]
    most = max(by_start)
    state = starts[by_start.index(most)] + most
    taken = []
    for n in reversed(range(len(before))):
        if not before[n] >> state & 1:
            taken.append(documents[n])
            state -= places[n]
    return taken
