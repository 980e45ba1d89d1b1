"""Which documents share a row, and which row comes n-th.

A *cycle* is a sequence of documents in which every source has its share of the tokens: the source that lasts longest
appears once, the others as often as their share asks for, each of their epochs in an order of its own. The cycle is cut
into windows, and each window is packed by itself into rows of S tokens and M tiles.
Prefix sums over the rows of the windows find row n without the documents before it. After the last row of a cycle comes
the next cycle, which visits the same windows, and the rows in each, in another order; so no row, however far, costs
more than the packing of one cycle.
"""

import functools
import math
import threading
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np


class Packing:
    """The order of packed rows, a pure function of its arguments."""

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        tile_counts: Sequence[np.ndarray],
        shares: Sequence[float],
        tokens_per_row: int,
        tiles_per_row: int,
        window: int,
        seed: int,
        row_parts: int = 1,
    ):
        """Rows are packed when they are asked for.

        Args:
            lengths: for each source, tokens of its documents; none above `tokens_per_row`.
            tile_counts: for each source, tiles of its documents; none above `tiles_per_row`.
            shares: for each source, its share of the tokens, above zero.
            tokens_per_row: S.
            tiles_per_row: M.
            window: documents packed together.
            seed: decides every order.
            row_parts: equal parts of a row; only a document that begins where a part does goes beyond its end.
        """
        self._lengths, self._tile_counts = lengths, tile_counts
        self._room = (tokens_per_row, tiles_per_row, row_parts)
        self._seed = seed
        # Documents per token of the mixture, and how many tokens of the mixture it takes to use every source up.
        rates = [share / sum(shares) / float(np.mean(length)) for share, length in zip(shares, lengths, strict=True)]
        tokens = max(len(length) / rate for rate, length in zip(rates, lengths, strict=True))
        self.documents_per_cycle = tuple(max(round(rate * tokens), 1) for rate in rates)
        """For each source, how many documents a cycle takes from it."""
        self._windows = math.ceil(sum(self.documents_per_cycle) / window)
        self._ends: list[int] = []  # rows up to the end of each window, as far as they are known
        self._lock = threading.Lock()
        # Each instance has caches of its own, as large as a run needs to go on without packing a window twice.
        self._packed = functools.lru_cache(maxsize=4096)(self._pack)
        self._epoch_order = functools.lru_cache(maxsize=16)(self._permute_epoch)
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
        documents = []
        for source, total in enumerate(self.documents_per_cycle):
            first, last = (total * w // self._windows for w in (window, window + 1))
            documents += [(source, self._stream(source, i)) for i in range(first, last)]
        lengths = [int(self._lengths[source][i]) for source, i in documents]
        tiles = [int(self._tile_counts[source][i]) for source, i in documents]
        return [[(*documents[i], start) for i, start in row] for row in pack_rows(lengths, tiles, *self._room)]

    def _stream(self, source: int, i: int) -> int:
        """Document i of the source's epochs, one after the other."""
        epoch, i = divmod(i, len(self._lengths[source]))
        return int(self._epoch_order(source, epoch)[i])

    def _permute_epoch(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, source, epoch]).permutation(len(self._lengths[source]))

    def _permute_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows up to the end of each window, windows) in the order in which this cycle visits the windows."""
        windows = np.random.default_rng([self._seed, 1, cycle]).permutation(self._windows)
        return np.cumsum(np.diff([0, *self._ends])[windows]), windows


def pack_rows(
    lengths: Sequence[int], tile_counts: Sequence[int], tokens: int, tiles: int, parts: int = 1
) -> list[list[tuple[int, int]]]:
    """Packs documents into rows of so many tokens and tiles.

    Each row takes the longest document that is left, and then those that, of all subsets, leave the fewest tokens
    unused (a subset-sum, where best fit adds one document at a time and leaves twice to five times as much).

    In rows of several parts the same is done part by part: the longest document that fits in the rest of the row, and
    those that fill the part in which it ends. So a document that crosses the edge of a part begins at one.

    Returns:
        for each row, its documents and where they begin, in order.
    """
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    part = tokens // parts
    rows = []
    while left:
        row: list[tuple[int, int]] = []
        at, tiles_left = 0, tiles
        while at < tokens:
            longest = next((i for i in left if lengths[i] <= tokens - at and tile_counts[i] <= tiles_left), None)
            if longest is None:
                break
            end = at + lengths[longest]
            edge = -(-end // part) * part
            others = [i for i in left if i != longest]
            chosen = [longest, *_fullest(others, lengths, tile_counts, edge - end, tiles_left - tile_counts[longest])]
            for i in chosen:
                row.append((i, at))
                at, tiles_left = at + lengths[i], tiles_left - tile_counts[i]
            taken = set(chosen)
            left = [i for i in left if i not in taken]
            at = edge
        rows.append(row)
    return rows


def _fullest(left: list[int], lengths: Sequence[int], tile_counts: Sequence[int], tokens: int, tiles: int) -> list[int]:
    """The documents out of `left` that fill the room best; of several ways, one that takes the longer documents."""
    # Bit (t * stride + n) of `sums` is set if some of the documents seen so far have n tokens and t tiles together.
    # The stride leaves room for one addition to overflow, which the mask then clears.
    stride = 2 * tokens + 1
    mask = sum(((1 << (tokens + 1)) - 1) << (t * stride) for t in range(tiles + 1))
    full = sum(1 << (t * stride + tokens) for t in range(tiles + 1))
    sums, before, seen = 1, [], []
    for i in left:
        if lengths[i] <= tokens and tile_counts[i] <= tiles:
            before.append(sums)
            seen.append(i)
            sums |= (sums << (tile_counts[i] * stride + lengths[i])) & mask
            if sums & full:
                break
    by_tiles = [((sums >> (t * stride)) & ((1 << (tokens + 1)) - 1)).bit_length() - 1 for t in range(tiles + 1)]
    most = max(by_tiles)
    state = by_tiles.index(most) * stride + most
    taken = []
    for i, sums in zip(reversed(seen), reversed(before), strict=True):
        if not sums >> state & 1:
            taken.append(i)
            state -= tile_counts[i] * stride + lengths[i]
    return taken
