"""What a segment is called, from what a model is fed of it; and the random keys of its tokens.

Letters: B rows, S sequence, M slots of media, P tokens of a slot, n tokens of a segment.
"""

import hashlib
import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from data.target_records import DIGEST_BYTES

MEDIA = (("image_positions", "image_tiles", "|u1"), ("audio_positions", "audio_frames", "<f4"))
"""(where the tokens of a slot stand, what is in the slot, its type) of each medium; see `data.pipeline.Dataset.batch`."""


class Segment(NamedTuple):
    """Where a segment stands in a batch, and its digest."""

    row: int
    start: int
    stop: int
    digest: bytes


def segment_digests(batch: Mapping[str, np.ndarray], recipe: bytes) -> list[Segment]:
    """The segments of a batch, by row and start.

    A digest is over token ids, hard targets, the media of the segment with the places of their tokens counted from its
    start, and the recipe. Where the segment stands, what stands beside it, the shape of the batch, the numbers of media
    slots and the loss weights do not matter.

    Args:
        batch: `tokens`, `targets`, `segment_ids` [B, S], 0 at padding; of each medium its positions [B, M, P], -1 for
            what is not used, and contents [B, M, ...].
        recipe: what else decides what the model is fed, such as how images become tiles.

    Raises:
        ValueError: a segment is not in one piece, a slot is not within one segment, or a medium is unknown.
    """
    if unknown := {name for name in batch if name.endswith("_positions")} - {names[0] for names in MEDIA}:
        raise ValueError(f"{min(unknown)}: is of no medium that digests know")
    tokens_BS, targets_BS = (
        np.asarray(batch[name]).astype("<i4", casting="same_kind") for name in ("tokens", "targets")
    )
    spans, runs_BS = _spans(np.asarray(batch["segment_ids"]))
    hashes = []
    for row, start, stop in spans:
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"segment")
        digest.update(struct.pack("<QQ", len(recipe), stop - start) + recipe)
        digest.update(np.ascontiguousarray(tokens_BS[row, start:stop]).data)
        digest.update(np.ascontiguousarray(targets_BS[row, start:stop]).data)
        hashes.append(digest)
    for name, contents, dtype in MEDIA:
        if name in batch:
            positions_BMP = np.asarray(batch[name])
            media_BM = np.asarray(batch[contents]).astype(dtype, casting="safe", copy=False)
            for run, slots in _slots(positions_BMP, runs_BS, name).items():
                row, start, _ = spans[run]
                hashes[run].update(f"{contents} {len(slots)};".encode())
                for slot in slots:
                    places_P = positions_BMP[row, slot].astype(np.int64)
                    media = media_BM[row, slot]
                    hashes[run].update(struct.pack(f"<{1 + media.ndim}Q", len(places_P), *media.shape))
                    hashes[run].update(np.where(places_P >= 0, places_P - start, -1).astype("<i4").data)
                    hashes[run].update(np.ascontiguousarray(media).data)
    return [Segment(*span, digest.digest()) for span, digest in zip(spans, hashes, strict=True)]


def _spans(segment_ids_BS: np.ndarray) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """(row, start, stop) of each segment, and which of these a place is in, int64 [B, S]; -1 at padding."""
    B, S = segment_ids_BS.shape
    padded = np.zeros((B, S + 2), np.int64)
    padded[:, 1:-1] = segment_ids_BS
    changes = np.diff(padded, axis=1) != 0
    rows, starts = np.nonzero(changes[:, :-1] & (padded[:, 1:-1] != 0))
    _, stops = np.nonzero(changes[:, 1:] & (padded[:, 1:-1] != 0))
    of_row = np.column_stack([rows, segment_ids_BS[rows, starts]])
    _, first, numbers = np.unique(of_row, axis=0, return_index=True, return_counts=True)
    if (numbers > 1).any():
        row, segment = of_row[first[np.argmax(numbers)]]
        raise ValueError(f"segment_ids: segment {segment} of row {row} is in several pieces")
    runs_BS = np.full((B, S), -1)
    for i, (row, start, stop) in enumerate(zip(rows, starts, stops + 1, strict=True)):
        runs_BS[row, start:stop] = i
    return list(zip(rows.tolist(), starts.tolist(), (stops + 1).tolist(), strict=True)), runs_BS


def _slots(positions_BMP: np.ndarray, runs_BS: np.ndarray, name: str) -> dict[int, list[int]]:
    """The slots of each segment that has any, in the order of their places in it."""
    used_BMP = positions_BMP >= 0
    if (positions_BMP >= runs_BS.shape[1]).any():
        raise ValueError(f"{name}: found {positions_BMP.max()}, expected places below {runs_BS.shape[1]}")
    rows_B11 = np.arange(len(positions_BMP))[:, None, None]
    runs_BMP = np.where(used_BMP, runs_BS[rows_B11, np.maximum(positions_BMP, 0)], -2)
    found: dict[int, list[tuple[int, int]]] = {}
    for row, slot in np.argwhere(used_BMP.any(axis=2)).tolist():
        used_P = used_BMP[row, slot]
        runs = np.unique(runs_BMP[row, slot][used_P])
        if len(runs) > 1 or runs[0] < 0:
            raise ValueError(f"{name}: slot {slot} of row {row} is not within one segment")
        first = int(positions_BMP[row, slot][used_P].min())
        found.setdefault(int(runs[0]), []).append((first, slot))
    return {run: [slot for _, slot in sorted(slots)] for run, slots in found.items()}


def token_keys(digest: bytes, offsets: np.ndarray, recipe: bytes) -> np.ndarray:
    """The random key of each token's draws, uint32 [n, 2]: the low and the high half of a word of 64 bits.

    With a, b the two little-endian words of blake2b(recipe, key=digest) and mix the finaliser of splitmix64 (Steele, Lea
    and Flood 2014), the word is mix(mix(a + offset x 0x9E3779B97F4A7C15) xor b). Each step is one to one, so offsets of a
    segment never share a key.

    Args:
        digest: of the segment.
        offsets: [n], of the tokens from its start.
        recipe: of the draws.
    """
    words = hashlib.blake2b(recipe, digest_size=16, key=digest, person=b"token keys").digest()
    a, b = np.frombuffer(words, "<u8").astype(np.uint64)
    with np.errstate(over="ignore"):  # modulo 2^64
        mixed = _mix(_mix(a + np.asarray(offsets).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ b)
    return np.column_stack([mixed & np.uint64(0xFFFFFFFF), mixed >> np.uint64(32)]).astype(np.uint32)


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
