"""Which documents share a row, and which row comes n-th.

Every source is a stream of documents: its epochs one after the other, each in an order of its own, so that every document
comes once an epoch. The streams are taken window by window: each window has documents of the sources by their shares at its
first row, and is packed by itself into rows of so many tokens, tiles and windows of sound. A `Position` says where a window
begins; from one of them, any later row is found without what lies before. Nothing depends on the number of a source among
the others, so that sources may be added.

A *size* is what a document takes of a row: (tokens, tiles, windows of sound).
"""

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data.positions import RECENT, Position, Positions
from data.shuffle import shuffled
from sharding.errors import UserError

ROWS_OF_A_WINDOW = 32
"""A window has documents for about so many rows at least: its last row is seldom full."""

Size = tuple[int, int, int]

_KEPT_WINDOWS = (32, 256)
"""Packed windows that are kept: so many at least, for batches of up to 1,024 rows, and at most."""
_KEPT_DOCUMENTS = 2**20
"""Of the windows beyond the least; each takes 24 bytes."""
_MOST_STATES = 2**18
"""Of the search for the fullest row; a row of 8,192 tokens with 3 tiles free has 114,695."""


class _Window(NamedTuple):
    """Documents that were packed together."""

    documents: np.ndarray
    """int64 [documents, 3]: (source, document, where it begins in its row), row after row."""
    ends: np.ndarray
    """int64 [rows], the documents up to the end of each row."""
    after: Position
    """Where the next window begins."""

    def row(self, i: int) -> list[tuple[int, int, int]]:
        return list(map(tuple, self.documents[self.ends[i - 1] if i else 0 : self.ends[i]].tolist()))


class Packing:
    """The order of packed rows, a pure function of its arguments but for the position, from which no row depends."""

    def __init__(
        self,
        sizes: Mapping[str, np.ndarray],
        shares: Callable[[int], Sequence[float]],
        room: Size,
        window: int,
        seed: int,
        row_parts: int = 1,
        caps: Callable[[int], Sequence[float]] | None = None,
        known: Positions | None = None,
    ):
        """Rows are packed when they are asked for.

        Args:
            sizes: by the name of each source, which decides its order, those of its documents, [documents, 3]; none above
                `room`.
            shares: gives each source's share of the tokens in a window by its first row.
            room: of a row, in the order of a size.
            window: documents packed together, at least.
            seed: decides every order.
            row_parts: equal parts of a row; only a document that begins where a part does goes beyond its end.
            caps: gives how often each source may be gone through, by a window's first row; None for no limit.
            known: positions that were found earlier for the same arguments: rows after each of them are found at once.
        """
        self._names, self._sizes = list(sizes), list(sizes.values())
        self._shares, self._room, self._caps = shares, room, caps
        self._least, self._seed, self._row_parts = window, seed, row_parts
        self._means: list[Sequence[float]] = [size.mean(axis=0, dtype=np.float64).tolist() for size in self._sizes]
        self._known = Positions(len(sizes)) if known is None else known
        self._at, self._end = Position.start(len(sizes)), 0  # the window that was asked for last, and the row after it
        self._lock = threading.RLock()
        self._kept: OrderedDict[Position, _Window] = OrderedDict()

    def row(self, n: int) -> list[tuple[int, int, int]]:
        """The documents in row n, in order, as (source, document, where it begins).

        Raises:
            UserError: every source has been gone through as often as it may be.
        """
        state = self.position(n)
        window = self._packed(state)
        order = np.random.default_rng([self._seed, 2, state.row]).permutation(len(window.ends))
        return window.row(order[n - state.row])

    def position(self, n: int) -> Position:
        """Where the window of row n begins; packs windows from the last known position on until it is reached."""
        with self._lock:
            if not self._at.row <= n < self._end:
                state, walked = self._known.before(n), 0
                while (after := self._packed(state).after).row <= n:
                    self._known.add(after)
                    state, walked = after, walked + 1
                if walked > RECENT:  # a jump, which another process need not make again
                    self._known.save()
                self._at, self._end = state, after.row
            return self._at

    def taken(self, n: int) -> list[float]:
        """Documents of each source before row n, as if those of a window came evenly."""
        state = self.position(n)
        window = self._packed(state)
        part = (n - state.row) / len(window.ends)
        return [first + part * (last - first) for first, last in zip(state.taken, window.after.taken, strict=True)]

    def _packed(self, state: Position) -> _Window:
        """The window that begins here. As many are kept as a run needs to go on without packing one twice."""
        with self._lock:
            if window := self._kept.get(state):
                self._kept.move_to_end(state)
                return window
            self._kept[state] = window = self._pack(state)
            least, most = _KEPT_WINDOWS
            kept = sum(len(one.documents) for one in self._kept.values())
            while len(self._kept) > most or (len(self._kept) > least and kept > _KEPT_DOCUMENTS):
                kept -= len(self._kept.popitem(last=False)[1].documents)
            return window

    def _pack(self, state: Position) -> _Window:
        """Packs the window that begins here."""
        taken, owed = self._take(state)
        documents: list[tuple[int, int]] = []
        sizes: list[Size] = []
        for source, (first, last) in enumerate(zip(state.taken, taken, strict=True)):
            numbers = self._stream(source, first, last)
            documents += zip(itertools.repeat(source), numbers.tolist())
            sizes += map(tuple, self._sizes[source][numbers].tolist())
        rows = pack_rows(sizes, self._room, self._row_parts)
        placed = np.array([(*documents[i], start) for row in rows for i, start in row], np.int64)
        return _Window(placed, np.cumsum(list(map(len, rows))), Position(state.row + len(rows), taken, owed))

    def _take(self, state: Position) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Documents of each source up to the end of the window, and what it is still owed then."""
        caps = self._caps(state.row) if self._caps else [float("inf")] * len(self._sizes)
        left = [cap * len(size) - taken for cap, size, taken in zip(caps, self._sizes, state.taken, strict=True)]
        shares = [share if rest >= 1 else 0.0 for share, rest in zip(self._shares(state.row), left, strict=True)]
        if not any(shares):
            raise UserError(
                f"data.max_epochs: row {state.row:,} cannot be filled, every source of the mixture has been gone through as "
                "often as it may be. Raise data.max_epochs, add data, or lower steps."
            )
        # Documents for each token of the mixture, and for how many tokens there is one window of documents.
        # Sums are exact, so that a source without a share makes no difference to the others.
        all_shares = math.fsum(shares)
        rates = [share / all_shares / mean[0] for share, mean in zip(shares, self._means, strict=True)]
        documents = math.fsum(rates)
        means = (math.fsum(rate * mean[k] for rate, mean in zip(rates, self._means, strict=True)) for k in range(3))
        of_a_row = max(size / documents / most for size, most in zip(means, self._room, strict=True) if most)
        tokens = max(self._least, ROWS_OF_A_WINDOW / of_a_row) / documents
        taken, owed = list(state.taken), list(state.owed)
        while taken == list(state.taken):
            for i, rate in enumerate(rates):
                owed[i] += rate * tokens
                more = int(min(owed[i], state.taken[i] + left[i] - taken[i]))
                taken[i] += more
                owed[i] = min(owed[i] - more, 1.0 - 2**-53)
        return tuple(taken), tuple(owed)

    def _stream(self, source: int, first: int, last: int) -> np.ndarray:
        """Documents first to last - 1 of the source's epochs, one after the other."""
        count = len(self._sizes[source])
        places = np.arange(first, last)
        epochs = places // count
        numbers = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            numbers[of_epoch] = shuffled(places[of_epoch] % count, count, (self._seed, self._names[source], epoch))
        return numbers


def row_cost(sizes: Iterable[Size], room: Size) -> float:
    """What a row of documents of these sizes costs a device, about: squares of their lengths (attention) as parts of that of
    a whole row, and tiles and windows of sound as parts of those that a row holds."""
    tokens, tiles, windows = room
    cost = 0.0
    for size in sizes:
        cost += (size[0] / tokens) ** 2 + size[1] / max(tiles, 1) + size[2] / max(windows, 1)
    return cost


def balanced(costs: Sequence[float]) -> list[int]:
    """An order of rows in which equal shares of a batch cost about the same, whichever number of them it is cut into.

    The same for any number of devices, so that a batch is the same batch on any mesh. It is cut by its smallest prime factor
    again and again: 24 rows into 2, 4 and 8 shares that cost alike; of others, such as 12, nothing is promised.
    """

    def arranged(rows: list[int]) -> list[int]:
        count = next((n for n in range(2, len(rows)) if len(rows) % n == 0), 1)
        if count == 1:
            return rows
        # From the dearest on, each to the cheapest part that has room (the greedy rule for equal counts).
        parts: list[list[int]] = [[] for _ in range(count)]
        sums = [0.0] * count
        for row in sorted(rows, key=lambda i: (-costs[i], i)):
            to = min((k for k in range(count) if len(parts[k]) < len(rows) // count), key=lambda k: (sums[k], k))
            parts[to].append(row)
            sums[to] += costs[row]
        return [row for part in parts for row in arranged(part)]

    return arranged(list(range(len(costs))))


def pack_rows(sizes: Sequence[Size], room: Size, parts: int = 1) -> list[list[tuple[int, int]]]:
    """Packs documents of these sizes into rows.

    Each row takes the longest document that is left, and then those that, of all subsets, leave the fewest tokens
    unused (a subset-sum, where best fit adds one document at a time and leaves twice to five times as much).

    In rows of several parts the same is done part by part: the longest document that fits in the rest of the row, and
    those that fill the part in which it ends. So a document that crosses the edge of a part begins at one.

    In rows too large for a search that counts tiles and windows as well, documents with these come first until a row has its
    fair share: else the last rows would be full of tiles and half full of tokens.

    Returns:
        for each row, its documents and where they begin, in order.
    """
    left = sorted(range(len(sizes)), key=lambda i: -sizes[i][0])
    tokens = room[0]
    part = tokens // parts
    totals: Size = (sum(n for n, _, _ in sizes), sum(n for _, n, _ in sizes), sum(n for _, _, n in sizes))
    rows = []
    while left:
        row: list[tuple[int, int]] = []
        at, rest = 0, room
        fair = None if _searchable(room) else _fair_share(totals, room)
        while at < tokens:
            rest = (tokens - at, rest[1], rest[2])
            longest = next((i for i in left if _fits(sizes[i], rest)), None)
            if longest is None:
                break
            end = at + sizes[longest][0]
            edge = -(-end // part) * part
            _, tiles, windows = _less(rest, sizes[longest])
            due = fair and (fair[0] - (room[1] - tiles), fair[1] - (room[2] - windows))
            chosen = [longest, *_fullest(left, longest, sizes, (edge - end, tiles, windows), due)]
            for i in chosen:
                row.append((i, at))
                at, rest = at + sizes[i][0], _less(rest, sizes[i])
                totals = _less(totals, sizes[i])
            taken = set(chosen)
            left = [i for i in left if i not in taken]
            at = edge
        assert row, "a document is larger than a row"
        rows.append(row)
    return rows


def _fits(size: Size, room: Size) -> bool:
    return size[0] <= room[0] and size[1] <= room[1] and size[2] <= room[2]


def _less(room: Size, size: Size) -> Size:
    return room[0] - size[0], room[1] - size[1], room[2] - size[2]


def _searchable(room: Size) -> bool:
    """Whether a search of the fullest such row, tiles and windows counted, is small enough."""
    return (2 * room[0] + 1) * (2 * room[1] + 1) * (room[2] + 1) <= _MOST_STATES


def _fair_share(left: Size, room: Size) -> tuple[float, float]:
    """Tiles and windows of each row, if all that is left is spread evenly over the fewest rows that could hold it."""
    rows = max(size / most for size, most in zip(left, room, strict=True) if most)
    return left[1] / rows, left[2] / rows


def _fullest(
    left: list[int], but: int, sizes: Sequence[Size], room: Size, due: tuple[float, float] | None
) -> list[int]:
    """The documents out of `left`, `but` one, that fill the room best; of several ways, one that takes the longer documents.

    With `due`, tiles and windows that the row should have, documents with these are taken until it has them, or until an
    eighth of the room is left. If tiles or windows hinder what fills the rest, and subsets are too many to search, each
    document in turn that still fits is taken.
    """
    taken = _owed([i for i in left if i != but], sizes, room, due) if due else []
    for i in taken:
        room = _less(room, sizes[i])
    gone = {but, *taken}

    def fitting() -> Iterator[int]:
        return (i for i in left if i not in gone and _fits(sizes[i], room))

    # Most often tiles and windows are no hindrance, and then what fills the tokens best is the best.
    fullest = _subset(fitting(), sizes, room, (1, 0, 0))
    if sum(sizes[i][1] for i in fullest) <= room[1] and sum(sizes[i][2] for i in fullest) <= room[2]:
        return taken + fullest
    if _searchable(room):
        by_tile = 2 * room[0] + 1
        return taken + _subset(fitting(), sizes, room, (1, by_tile, by_tile * (2 * room[1] + 1)))
    for i in left:
        if i not in gone and _fits(sizes[i], room):
            taken.append(i)
            room = _less(room, sizes[i])
    return taken


def _owed(documents: list[int], sizes: Sequence[Size], room: Size, due: tuple[float, float]) -> list[int]:
    """Documents with tiles or windows, until the row has those that are due."""
    spare, tiles, windows = room[0] // 8, *due
    taken = []
    for i in documents:
        needed = (sizes[i][1] > 0 and tiles > 0) or (sizes[i][2] > 0 and windows > 0)
        if needed and _fits((sizes[i][0] + spare, *sizes[i][1:]), room):
            taken.append(i)
            room, tiles, windows = _less(room, sizes[i]), tiles - sizes[i][1], windows - sizes[i][2]
    return taken


def _subset(documents: Iterable[int], sizes: Sequence[Size], room: Size, strides: Size) -> list[int]:
    """The subset of the documents that has the most tokens in the room; all of them fit it alone. What has the stride 0 is
    not looked at."""
    # Bit (w * by_window + t * by_tile + n) of `sums` is set if some of the documents seen so far have n tokens, t tiles
    # and w windows together. The strides leave room for one addition to overflow, which the mask then clears.
    _, by_tile, by_window = strides
    tiles, windows = room[1] if by_tile else 0, room[2] if by_window else 0
    starts = [w * by_window + t * by_tile for w in range(windows + 1) for t in range(tiles + 1)]
    every = (1 << (room[0] + 1)) - 1
    mask = sum(every << start for start in starts)
    full = sum(1 << (start + room[0]) for start in starts)
    sums, before, seen, places = 1, [], [], []
    for i in documents:
        place = sizes[i][0] + sizes[i][1] * by_tile + sizes[i][2] * by_window
        before.append(sums)
        seen.append(i)
        places.append(place)
        sums |= (sums << place) & mask
        if sums & full:
            break
    by_start = [((sums >> start) & every).bit_length() - 1 for start in starts]
    most = max(by_start)
    state = starts[by_start.index(most)] + most
    taken = []
    for n in reversed(range(len(before))):
        if not before[n] >> state & 1:
            taken.append(seen[n])
            state -= places[n]
    return taken
