"""What is packed: documents, and the pieces of those that do not fit a row.

Letters: N documents, I items, S tokens of a row.
"""

from typing import NamedTuple

import numpy as np

from data.config import Policy
from data.index import Index

COUNTS = ("long", "pieces", "truncated", "dropped", "unfit")
"""What `cut` counts: documents too long for a row, the pieces that they were split into, those cut off and dropped by the
policy, and those dropped since one of their files alone does not fit."""


class Room(NamedTuple):
    """What a row holds."""

    tokens: int
    tiles: int
    windows: int


def cut(index: Index, numbers: np.ndarray, file_sizes: np.ndarray, room: Room, policy: Policy) -> dict[str, np.ndarray]:
    """The items of these documents, in their order.

    Args:
        index: of the data set.
        numbers: int64 [N], documents to take.
        file_sizes: int32 [files of the data set, 3], tokens, tiles and windows of each.
        room: of a row; no item takes more.
        policy: what becomes of a document that takes more: pieces, its first piece, or nothing.

    Returns:
        `documents` int64 [I]; `starts` and `stops` int32 [I], which of the document's tokens, those of files included; a
        piece that does not begin the document begins with one more token, begin-of-text. `sizes` int32 [I, 3], tokens,
        that one included, tiles and windows; `counts`, of `COUNTS`.
    """
    starts = index.file_starts
    sums = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(file_sizes, axis=0, dtype=np.int64)])
    totals = sums[starts[numbers + 1]] - sums[starts[numbers]]
    totals[:, 0] += index.tokens[numbers]
    long = (totals > np.array(room)).any(axis=1)
    counts = dict.fromkeys(COUNTS, 0) | {"long": int(long.sum())}
    rows = []
    for n in numbers[long].tolist():
        files = slice(starts[n], starts[n + 1])
        pieces = _pieces(int(index.tokens[n]), index.places[files], file_sizes[files], room)
        if pieces is None:
            counts["unfit"] += 1
        elif policy == "drop":
            counts["dropped"] += 1
        elif policy == "truncate":
            counts["truncated"] += 1
            rows.append((n, *pieces[0]))
        else:
            counts["pieces"] += len(pieces)
            rows += [(n, *piece) for piece in pieces]
    cut_up = np.array(rows, np.int64).reshape(-1, 6)
    whole = numbers[~long]
    kept = totals[~long]
    table = np.concatenate([np.column_stack([whole, np.zeros_like(whole), kept[:, 0], kept]), cut_up])
    table = table[np.argsort(table[:, 0], kind="stable")]
    return {
        "documents": table[:, 0],
        "starts": table[:, 1].astype(np.int32),
        "stops": table[:, 2].astype(np.int32),
        "sizes": table[:, 3:].astype(np.int32),
        "counts": np.array([counts[name] for name in COUNTS]),
    }


def _pieces(tokens: int, places: np.ndarray, sizes: np.ndarray, room: Room) -> list[tuple[int, ...]] | None:
    """(start, stop, length, tiles, windows) of each piece, as long as can be, no file cut; None where a file is too large."""
    if (sizes > (room.tokens - 1, room.tiles, room.windows)).any():
        return None
    ends = places + np.cumsum(sizes[:, 0])
    begins = ends - sizes[:, 0]
    total = tokens + int(sizes[:, 0].sum())
    pieces, at, file = [], 0, 0
    while at < total:
        again = int(at > 0)
        stop, tiles, windows = min(at + room.tokens - again, total), 0, 0
        while file < len(begins) and begins[file] < stop:
            more = tiles + int(sizes[file, 1]), windows + int(sizes[file, 2])
            if ends[file] > stop or more[0] > room.tiles or more[1] > room.windows:
                stop = int(begins[file])
                break
            (tiles, windows), file = more, file + 1
        pieces.append((at, stop, stop - at + again, tiles, windows))
        at = stop
    return pieces
