"""Documents cut to fit a row, against a derivation token by token."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.index import Index
from data.items import COUNTS, Room, cut

FILE = st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
DOCUMENT = st.tuples(st.integers(1, 25), st.lists(st.tuples(st.integers(0, 25), FILE), max_size=5))
"""(tokens of text, (tokens of text before it, its size) of each file)."""


def index_of(documents) -> tuple[Index, np.ndarray]:
    """The index of these documents, and the sizes of their files."""
    places = [sorted(min(at, tokens) for at, _ in files) for tokens, files in documents]
    sizes = [size for _, files in documents for _, size in files]
    empty = np.zeros(len(documents), np.int32)
    index = Index(
        tokens=np.array([tokens for tokens, _ in documents], np.int32),
        file_starts=np.cumsum([0, *(len(files) for _, files in documents)]),
        kinds=np.zeros(len(sizes), np.uint8),
        places=np.array([place for of in places for place in of], np.int32),
        facts=np.zeros((len(sizes), 3), np.int32),
        held_out=empty.astype(bool),
        sources=empty,
        shards=empty,
        records=empty,
        nbytes=empty.astype(np.int64),
        stored_names=("",),
    )
    return index, np.array(sizes, np.int32).reshape(-1, 3)


def slow_pieces(tokens: int, places, sizes, room: Room) -> list[tuple[int, int]] | None:
    """(start, stop) of each piece: the longest that the row holds from there on, of all that cut no file."""
    owners: list[int] = []  # of each token, the file that it stands for, or -1
    files = list(zip(places, range(len(places)), strict=True))
    for at in range(tokens + 1):
        for _, file in [entry for entry in files if entry[0] == at]:
            owners += [file] * int(sizes[file][0])
        owners += [-1] * (at < tokens)
    if any(size[0] > room.tokens - 1 or size[1] > room.tiles or size[2] > room.windows for size in sizes):
        return None

    def holds(start: int, stop: int) -> bool:
        inside = {owner for owner in owners[start:stop] if owner >= 0}
        whole = all(owners[start:stop].count(file) == sizes[file][0] for file in inside)
        taken = [sum(int(sizes[file][k]) for file in inside) for k in (1, 2)]
        fits = stop - start + (start > 0) <= room.tokens and taken[0] <= room.tiles and taken[1] <= room.windows
        return whole and fits

    pieces, at = [], 0
    while at < len(owners):
        stop = max(stop for stop in range(at + 1, len(owners) + 1) if holds(at, stop))
        pieces.append((at, stop))
        at = stop
    return pieces


@given(st.lists(DOCUMENT, min_size=1, max_size=6), st.integers(3, 14), st.integers(0, 5), st.integers(0, 5))
def test_pieces_are_as_long_as_can_be_and_cut_no_file(documents, tokens, tiles, windows):
    room = Room(tokens, tiles, windows)
    index, sizes = index_of(documents)
    expected, counts = [], dict.fromkeys(COUNTS, 0)
    for n in range(len(documents)):
        files = slice(index.file_starts[n], index.file_starts[n + 1])
        pieces = slow_pieces(int(index.tokens[n]), index.places[files].tolist(), sizes[files], room)
        long = pieces is None or len(pieces) > 1
        counts["long"] += long
        if pieces is None:
            counts["unfit"] += 1
            continue
        counts["pieces"] += len(pieces) * long
        expected += [(n, *piece) for piece in pieces]
    found = cut(index, np.arange(len(documents)), sizes, room, "split")
    items = list(zip(*(found[name].tolist() for name in ("documents", "starts", "stops")), strict=True))
    assert items == expected
    assert dict(zip(COUNTS, found["counts"].tolist(), strict=True)) == counts
    assert (found["sizes"][:, 0] == found["stops"] - found["starts"] + (found["starts"] > 0)).all()
    assert (found["sizes"] <= room).all()
    first = {n: (start, stop) for n, start, stop in reversed(expected)}
    truncated = cut(index, np.arange(len(documents)), sizes, room, "truncate")
    assert dict(zip(truncated["documents"].tolist(), truncated["stops"].tolist(), strict=True)) == {
        n: stop for n, (_, stop) in first.items()
    }
    dropped = cut(index, np.arange(len(documents)), sizes, room, "drop")
    whole = [n for n in first if sum(of == n for of, _, _ in expected) == 1]
    assert dropped["documents"].tolist() == sorted(whole)
