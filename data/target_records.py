"""The bytes of a teacher's targets for one segment. `docs/TARGET_CACHE.md` has them bit by bit.

Letters: n tokens of the segment, m distinct ids of all its tokens, K ids of a token at most.
"""

import dataclasses
import struct
import zlib
from typing import NamedTuple, Self

import numpy as np

DIGEST_BYTES = 16
MAX_COUNT = 2**16 - 1
MAX_VOCAB = 2**25
"""A window of four bytes holds an id wherever in a byte it begins."""
LARGEST = 65504.0
"""Of the numbers of a record: they are float16."""
_HEAD = struct.Struct("<I16sIIII")
"""Checksum of what follows it, digest, n, tokens that have a target, m, bits of the counts below their highest ones."""


class Damaged(Exception):
    """Bytes that are no record, or not the one that was asked for."""


@dataclasses.dataclass(frozen=True)
class RecordFormat:
    """What all records of a cache have in common."""

    vocab_size: int
    draws: int = 0
    """Sum of the counts of every token that has a target; 0 for the `top_k` ids of it, which have no counts."""
    top_k: int = 0
    weighted: bool = False
    """Whether each id has a weight: of drawn ones its share of the draws times its importance, count / draws x p / q; of one
    of the top k, its probability."""

    def __post_init__(self):
        if not 0 < self.vocab_size <= MAX_VOCAB:
            raise ValueError(f"vocab_size: found {self.vocab_size}, expected 1 to {MAX_VOCAB}")
        if min(self.draws, self.top_k) != 0 or not 0 < self.draws + self.top_k <= MAX_COUNT:
            raise ValueError(f"found draws {self.draws} and top_k {self.top_k}, expected one of them, to {MAX_COUNT}")
        if self.top_k > self.vocab_size:
            raise ValueError(f"top_k: found {self.top_k}, expected at most the vocabulary of {self.vocab_size}")

    @property
    def id_bits(self) -> int:
        """Bits of an id: 18 for 202,048. At least 4."""
        return max(4, (self.vocab_size - 1).bit_length())


class Targets(NamedTuple):
    """What a teacher says of the tokens of a segment."""

    starts: np.ndarray
    """int64 [n + 1]: the ids of token i are ids[starts[i]:starts[i + 1]], ascending. None: the token has no target."""
    ids: np.ndarray
    """int32 [m]."""
    counts: np.ndarray
    """int32 [m], draws of each id; 1 in records without counts."""
    weights: np.ndarray | None
    """float32 [m], stored as float16: off by a part in 2048 at most, by 3e-8 below 6e-5."""
    target_log_prob: np.ndarray
    """float32 [n], in nats, of the hard target; stored as `weights` are. 0 where there is no target, like the next two."""
    entropy: np.ndarray
    """float32 [n], in nats; stored as `weights` are."""
    correct: np.ndarray
    """bool [n]: the hard target is the most likely id."""

    @property
    def tokens(self) -> int:
        """n."""
        return len(self.starts) - 1

    @classmethod
    def of(
        cls,
        ids_nK: np.ndarray,
        counts_nK: np.ndarray,
        weights_nK: np.ndarray | None,
        target_log_prob: np.ndarray,
        entropy: np.ndarray,
        correct: np.ndarray,
    ) -> Self:
        """From rows of ids in any order; those with a count of 0 are left out."""
        used_nK = np.asarray(counts_nK) > 0
        order_nK = np.argsort(np.where(used_nK, ids_nK, MAX_VOCAB), axis=1, kind="stable")
        ordered_nK = np.take_along_axis(used_nK, order_nK, axis=1)

        def kept(array: np.ndarray, dtype: type) -> np.ndarray:
            return np.take_along_axis(np.asarray(array), order_nK, axis=1)[ordered_nK].astype(dtype)

        return cls(
            np.concatenate([[0], np.cumsum(used_nK.sum(axis=1))]),
            kept(ids_nK, np.int32),
            kept(counts_nK, np.int32),
            None if weights_nK is None else kept(weights_nK, np.float32),
            np.asarray(target_log_prob, np.float32),
            np.asarray(entropy, np.float32),
            np.asarray(correct, bool),
        )

    def rows(self, values: np.ndarray, width: int) -> np.ndarray:
        """`ids`, `counts` or `weights` as rows [n, width], 0 after the last of a token.

        Raises:
            ValueError: a token has more than `width`.
        """
        numbers = np.diff(self.starts)
        if self.tokens and numbers.max() > width:
            raise ValueError(f"found {numbers.max()} ids of a token, expected at most {width}")
        rows = np.zeros((self.tokens, width), values.dtype)
        rows[np.arange(width) < numbers[:, None]] = values
        return rows


def encode(digest: bytes, targets: Targets, form: RecordFormat) -> bytes:
    """The record of a segment.

    Raises:
        ValueError: the targets are not what `form` and `Targets` say, or hold what is not finite.
    """
    n, m = targets.tokens, len(targets.ids)
    ids, counts = np.asarray(targets.ids), np.asarray(targets.counts)
    numbers = np.diff(targets.starts)
    _check(len(digest) == DIGEST_BYTES, f"a digest has {len(digest)} bytes, expected {DIGEST_BYTES}")
    _check(
        n > 0 and targets.starts[0] == 0 and targets.starts[-1] == m and (numbers >= 0).all(), "starts are not in order"
    )
    _check(all(len(a) == n for a in (targets.target_log_prob, targets.entropy, targets.correct)), "lengths differ")
    _check(len(counts) == m and (targets.weights is not None) == form.weighted, "counts or weights are missing")
    _check(not m or (ids.min() >= 0 and ids.max() < form.vocab_size), "an id is outside the vocabulary")
    _check(_ascending(ids, targets.starts), "the ids of a token are not distinct and ascending")
    present = numbers > 0
    p = int(present.sum())
    if form.draws:
        _check(not m or (counts.min() > 0 and counts.max() <= MAX_COUNT), f"a count is not in 1 to {MAX_COUNT}")
        sums = np.diff(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])[targets.starts])
        _check((sums[present] == form.draws).all(), f"the counts of a token do not add up to {form.draws}")
        below, streams = _packed_counts(counts)
    else:
        _check((numbers[present] == form.top_k).all(), f"a token has not {form.top_k} ids")
        _check((counts == 1).all(), "a count is not 1")
        below, streams = 0, []
    body = [
        *([] if p == n else [_packed_bits(present)]),
        _packed_bits(np.asarray(targets.correct, bool)[present]),
        _halves(targets.target_log_prob[present], "target_log_prob"),
        _halves(targets.entropy[present], "entropy"),
        *([] if targets.weights is None else [_halves(targets.weights, "weights")]),
        _packed(ids, form.id_bits),
        *streams,
    ]
    record = _HEAD.pack(0, digest, n, p, m, below)[4:] + b"".join(body)
    return zlib.crc32(record).to_bytes(4, "little") + record


def decode(data: bytes, form: RecordFormat, digest: bytes | None = None) -> Targets:
    """The targets of a record, of the segment with this digest. Takes at most some hundred times the memory of `data`.

    Raises:
        Damaged: the bytes were changed, or the record is of another segment or cache.
    """
    if len(data) < _HEAD.size:
        raise Damaged(f"found {len(data)} bytes, expected at least {_HEAD.size}")
    checksum, found, n, p, m, below = _HEAD.unpack_from(data)
    if zlib.crc32(memoryview(data)[4:]) != checksum:
        raise Damaged("the checksum does not fit the bytes")
    if digest is not None and found != digest:
        raise Damaged(f"found the record of segment {found.hex()}, expected {digest.hex()}")
    sizes = (
        0 if p == n else _bytes(n),
        _bytes(p),
        2 * p,
        2 * p,
        2 * m * form.weighted,
        _bytes(m * form.id_bits),
        *((_bytes(m + below), _bytes(below)) if form.draws else ()),
    )
    if p > n or len(data) != _HEAD.size + sum(sizes):
        raise Damaged(
            f"found {len(data):,} bytes, expected {_HEAD.size + sum(sizes):,} for {n:,} tokens with {m:,} ids"
        )
    raw, parts, at = np.frombuffer(data, np.uint8), [], _HEAD.size
    for size in sizes:
        parts.append(raw[at : at + size])
        at += size
    mask, flags, log_probs, entropies, ratios, packed, *streams = parts
    present = np.ones(n, bool) if p == n else _bits(mask, n)
    if present.sum() != p:
        raise Damaged(f"found {present.sum():,} tokens with targets, expected {p:,}")
    ids = _unpacked(packed, m, form.id_bits)
    if form.draws:
        counts = _unpacked_counts(streams[0], streams[1], m, below)
        ends = _ends(counts, p, form.draws)
    else:
        counts, ends = np.ones(m, np.int32), np.arange(1, p + 1) * form.top_k
        if m != p * form.top_k:
            raise Damaged(f"found {m:,} ids, expected {form.top_k} for each of {p:,} tokens")
    numbers = np.zeros(n, np.int64)
    numbers[present] = np.diff(ends, prepend=0)
    starts = np.concatenate([[0], np.cumsum(numbers)])
    if m and ids.max() >= form.vocab_size:
        raise Damaged(f"found id {ids.max():,}, expected ids below {form.vocab_size:,}")
    if not _ascending(ids, starts):
        raise Damaged("the ids of a token are not distinct and ascending")

    def spread(values: np.ndarray) -> np.ndarray:
        if p == n:
            return values
        of_all = np.zeros(n, values.dtype)
        of_all[present] = values
        return of_all

    return Targets(
        starts,
        ids,
        counts,
        _floats(ratios) if form.weighted else None,
        spread(_floats(log_probs)),
        spread(_floats(entropies)),
        spread(_bits(flags, p)),
    )


def _check(holds: bool | np.bool_, message: str) -> None:
    if not holds:
        raise ValueError(f"targets: {message}")


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _ascending(ids: np.ndarray, starts: np.ndarray) -> bool:
    larger = np.ones(len(ids) + 1, bool)
    larger[1:-1] = ids[1:] > ids[:-1]
    larger[starts] = True
    return bool(larger.all())


def _halves(values: np.ndarray, name: str) -> bytes:
    with np.errstate(over="ignore"):
        halves = np.asarray(values).astype("<f2")
    _check(np.isfinite(halves).all(), f"{name} holds what is not finite in float16")
    return halves.tobytes()


def _floats(raw: np.ndarray) -> np.ndarray:
    floats = raw.view("<f2").astype(np.float32)
    if not np.isfinite(floats).all():
        raise Damaged("found a number that is not finite")
    return floats


def _packed_bits(bits: np.ndarray) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def _bits(raw: np.ndarray, number: int) -> np.ndarray:
    return np.unpackbits(raw, count=number, bitorder="little").view(bool)


def _packed(values: np.ndarray, width: int) -> bytes:
    """`width` bits a value, lowest first. Eight values fill `width` bytes, so all eighth ones lie alike."""
    groups = max(1, _bytes(len(values)))
    padded = np.zeros((groups, 8), np.uint32)
    padded.reshape(-1)[: len(values)] = values
    packed = np.zeros(groups * width + 4, np.uint8)
    for lane in range(8):
        byte, shift = divmod(lane * width, 8)
        window = np.ndarray((groups,), "<u4", packed, byte, (width,))
        window |= padded[:, lane] << np.uint32(shift)
    return packed[: _bytes(len(values) * width)].tobytes()


def _unpacked(raw: np.ndarray, number: int, width: int) -> np.ndarray:
    groups = max(1, _bytes(number))
    padded = np.zeros(groups * width + 4, np.uint8)
    padded[: len(raw)] = raw
    values = np.empty((groups, 8), np.uint32)
    for lane in range(8):
        byte, shift = divmod(lane * width, 8)
        window = np.ndarray((groups,), "<u4", padded, byte, (width,))
        values[:, lane] = (window >> np.uint32(shift)) & np.uint32(2**width - 1)
    return values.reshape(-1)[:number].view(np.int32)


def _packed_counts(counts: np.ndarray) -> tuple[int, list[bytes]]:
    """Elias' gamma code in two streams: how many bits a count has, in unary; its bits below the highest one."""
    lengths = np.frexp(counts)[1].astype(np.int64) - 1
    ends = np.cumsum(lengths + 1)
    below = int(lengths.sum())
    unary = np.zeros(len(counts) + below, bool)
    unary[ends - 1] = True
    owners = np.repeat(np.arange(len(counts)), lengths)
    places = np.arange(below) - (np.cumsum(lengths) - lengths)[owners]
    return below, [_packed_bits(unary), _packed_bits((counts[owners] >> places) & 1)]


def _unpacked_counts(unary: np.ndarray, rest: np.ndarray, number: int, below: int) -> np.ndarray:
    ends = np.flatnonzero(_bits(unary, number + below))
    if len(ends) != number or (number and ends[-1] != number + below - 1) or (below and not number):
        raise Damaged(f"found {len(ends):,} counts, expected {number:,}")
    lengths = np.diff(ends, prepend=-1) - 1
    large = np.flatnonzero(lengths)
    lengths = lengths[large]
    if len(large) and lengths.max() > 15:
        raise Damaged(f"found a count of {lengths.max() + 1} bits, expected at most 16")
    offsets = np.cumsum(lengths) - lengths
    padded = np.concatenate([rest, np.zeros(4, np.uint8)])
    windows = np.ndarray((len(rest) + 1,), "<u4", padded, 0, (1,))
    highest = np.left_shift(1, lengths)
    counts = np.ones(number, np.int32)
    counts[large] = highest + ((windows[offsets >> 3] >> (offsets & 7)) & (highest - 1))
    return counts


def _ends(counts: np.ndarray, tokens: int, draws: int) -> np.ndarray:
    """int64 [tokens]: where the ids of each end, since the counts of each add up to the same."""
    sums = np.cumsum(counts, dtype=np.int64)
    ends = np.flatnonzero(sums % draws == 0) + 1
    if len(ends) != tokens or (sums[-1] if len(sums) else 0) != tokens * draws:
        raise Damaged(f"the counts do not add up to {draws} for each of {tokens:,} tokens")
    return ends
