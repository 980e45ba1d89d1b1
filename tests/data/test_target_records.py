"""A record gives back what went in, is what the page on the format says, and is refused when it was damaged."""

import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.target_records import Damaged, RecordFormat, Targets, decode, encode

DIGEST = bytes(range(16))
LLAMA = 202_048


def drawn(rng: np.random.Generator, n: int, form: RecordFormat, absent: float = 0.0, skew: float = 1.5) -> Targets:
    """Targets of n tokens, by a loop over them."""
    starts, ids, counts = [0], [], []
    for _ in range(n):
        if rng.random() >= absent:
            if form.draws:
                draws = np.minimum(rng.zipf(skew, form.draws) - 1, form.vocab_size - 1)
                found, numbers = np.unique(draws * 7919 % form.vocab_size, return_counts=True)
            else:
                found = np.sort(rng.choice(form.vocab_size, form.top_k, replace=False))
                numbers = np.ones(form.top_k)
            ids += found.tolist()
            counts += numbers.tolist()
        starts.append(len(ids))
    present = np.diff(starts) > 0
    return Targets(
        np.array(starts),
        np.array(ids, np.int32),
        np.array(counts, np.int32),
        rng.random(len(ids), np.float32) if form.weighted else None,
        (-np.abs(rng.normal(0, 6, n)) * present).astype(np.float32),
        (rng.gamma(2, 1, n) * present).astype(np.float32),
        (rng.random(n) < 0.5) & present,
    )


def slowly_decoded(data: bytes, form: RecordFormat) -> list[tuple]:
    """Bit by bit, as docs/TARGET_CACHE.md has it: (ids, counts, weights, log-probability, entropy, correct) of each token."""
    checksum, _, n, p, m, below = struct.unpack_from("<I16sIIII", data)
    assert checksum == zlib.crc32(data[4:])
    at = 36

    def bits(number: int) -> list[int]:
        nonlocal at
        part = data[at : at + (number + 7) // 8]
        at += len(part)
        return [part[i // 8] >> (i % 8) & 1 for i in range(number)]

    def halves(number: int) -> list[float]:
        nonlocal at
        at += 2 * number
        return list(struct.unpack_from(f"<{number}e", data, at - 2 * number))

    def number(found: list[int]) -> int:
        return sum(bit << i for i, bit in enumerate(found))

    present = [1] * n if p == n else bits(n)
    flags, log_probs, entropies = bits(p), halves(p), halves(p)
    weights = halves(m) if form.weighted else [None] * m
    stream = bits(m * form.id_bits)
    ids = [number(stream[i * form.id_bits : (i + 1) * form.id_bits]) for i in range(m)]
    counts = [1] * m
    if form.draws:
        unary, rest = bits(m + below), bits(below)
        for i in range(m):
            length = unary.index(1)
            counts[i] = 2**length + number(rest[:length])
            unary, rest = unary[length + 1 :], rest[length:]
        assert not unary and not rest
    assert at == len(data)
    tokens, first = [], 0
    for is_there in present:
        if not is_there:
            tokens.append(([], [], [], 0.0, 0.0, 0))
            continue
        last = first + form.top_k
        while sum(counts[first:last]) < form.draws:
            last += 1
        facts = log_probs.pop(0), entropies.pop(0), flags.pop(0)
        tokens.append((ids[first:last], counts[first:last], weights[first:last], *facts))
        first = last
    assert first == m
    return tokens


@st.composite
def cases(draw) -> tuple[RecordFormat, Targets]:
    vocab = draw(st.sampled_from([2, 5, 16, 17, 256, 257, 8192, LLAMA, 2**25]) | st.integers(2, 2**25))
    top_k = draw(st.integers(0, min(vocab, 9)))
    draws = 0 if top_k else draw(st.integers(1, 60) | st.sampled_from([1000, 65535]))
    form = RecordFormat(vocab, draws, top_k, draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, 40)) if draws <= 60 else 3
    return form, drawn(rng, n, form, draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.sampled_from([1.1, 2.0, 5.0])))


@given(cases())
@settings(max_examples=150)
def test_records_give_back_what_went_in(case) -> None:
    form, targets = case
    data = encode(DIGEST, targets, form)
    found = decode(data, form, DIGEST)
    assert found.starts.tolist() == targets.starts.tolist()
    assert found.ids.tolist() == targets.ids.tolist() and found.counts.tolist() == targets.counts.tolist()
    assert found.correct.tolist() == targets.correct.tolist()
    assert (found.weights is None) == (targets.weights is None)
    for got, want in zip(found[3:6], targets[3:6], strict=True):
        if want is not None:
            assert got is not None
            np.testing.assert_allclose(got, want, rtol=2**-11, atol=3e-8)
    assert encode(DIGEST, found, form) == data
    assert [array.dtype for array in found if array is not None] == [
        array.dtype for array in targets if array is not None
    ]


@given(cases())
@settings(max_examples=60)
def test_records_are_what_the_page_on_the_format_says(case) -> None:
    form, targets = case
    if form.draws > 60:
        return
    data = encode(DIGEST, targets, form)
    found = decode(data, form)
    assert data[4:20] == DIGEST
    for i, (ids, counts, weights, log_prob, entropy, correct) in enumerate(slowly_decoded(data, form)):
        span = slice(found.starts[i], found.starts[i + 1])
        assert found.ids[span].tolist() == ids and found.counts[span].tolist() == counts
        assert found.weights is None or found.weights[span].tolist() == weights
        assert (found.target_log_prob[i], found.entropy[i], found.correct[i]) == (log_prob, entropy, correct)


def test_rows_of_ids_in_any_order_become_targets_and_rows_again() -> None:
    ids = np.array([[9, 2, 2, 5], [7, 0, 1, 3], [4, 4, 4, 4]])
    counts = np.array([[1, 3, 0, 0], [0, 2, 1, 1], [0, 0, 0, 0]])
    weights = np.array([[0.25, 4, 9, 9], [9, 1, 2, 3], [9, 9, 9, 9]])
    targets = Targets.of(ids, counts, weights, np.zeros(3), np.zeros(3), np.zeros(3))
    assert targets.ids.tolist() == [2, 9, 0, 1, 3] and targets.counts.tolist() == [3, 1, 2, 1, 1]
    assert targets.weights is not None and targets.weights.tolist() == [4, 0.25, 1, 2, 3]
    assert targets.starts.tolist() == [0, 2, 5, 5]
    assert targets.rows(targets.ids, 4).tolist() == [[2, 9, 0, 0], [0, 1, 3, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="found 3 ids of a token, expected at most 2"):
        targets.rows(targets.ids, 2)


@pytest.mark.parametrize("draws, most", [(12, 20), (25, 29), (50, 43)])
def test_bytes_of_a_token(draws: int, most: float) -> None:
    """Of Zipf-like distributions with an entropy of 2 nats: ids of 18 bits, counts, 4 bytes of facts."""
    rng = np.random.default_rng(0)
    p = np.arange(1, LLAMA + 1) ** -2.0
    while (entropy := float(-(p / p.sum() * np.log(p / p.sum())).sum())) < 2:
        p **= 0.98
    assert 2 <= entropy < 2.1
    ids = np.sort(rng.permutation(LLAMA)[rng.choice(LLAMA, (2000, draws), p=p / p.sum())], axis=1)
    rows = [np.unique(row, return_counts=True) for row in ids]
    starts = np.cumsum([0, *(len(found) for found, _ in rows)])
    found, counts = (np.concatenate(part) for part in zip(*rows, strict=True))
    form = RecordFormat(LLAMA, draws)
    nothing = np.zeros(2000)
    data = encode(DIGEST, Targets(starts, found, counts, None, nothing, nothing, nothing), form)
    assert form.id_bits == 18
    assert len(data) / 2000 < most
    assert len(data) / 2000 < 36 + (draws - 12)


def test_a_million_tokens_are_decoded_in_a_second() -> None:
    form = RecordFormat(LLAMA, 12)
    one = drawn(np.random.default_rng(1), 500, form)
    starts = np.concatenate([[0], (np.arange(200)[:, None] * len(one.ids) + one.starts[1:]).ravel()])
    rest = {name: np.tile(array, 200) for name, array in one._asdict().items() if array is not None}
    targets = one._replace(**rest | {"starts": starts})
    data = encode(DIGEST, targets, form)
    times = []
    for _ in range(5):
        began = time.process_time()
        decode(data, form)
        times.append(time.process_time() - began)
    assert targets.tokens / min(times) > 1e6


FORMS = [RecordFormat(LLAMA, 12), RecordFormat(300, 3, 0, True), RecordFormat(8192, 0, 5, True)]


@pytest.mark.parametrize("form", FORMS)
def test_truncated_and_changed_records_are_refused(form: RecordFormat) -> None:
    rng = np.random.default_rng(2)
    data = encode(DIGEST, drawn(rng, 30, form, 0.2), form)
    for size in range(len(data)):
        with pytest.raises(Damaged):
            decode(data[:size], form, DIGEST)
    with pytest.raises(Damaged, match="checksum"):
        decode(data + b"\0", form, DIGEST)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged, match="checksum"):
            decode(bytes(changed), form, DIGEST)


@pytest.mark.parametrize("form", FORMS)
def test_bytes_with_a_right_checksum_that_are_no_record_end_well(form: RecordFormat) -> None:
    """As of another version or by malice: an error or targets that hold together, and no large allocation."""
    rng = np.random.default_rng(3)
    data = encode(DIGEST, drawn(rng, 60, form, 0.2), form)
    refused = 0
    tracemalloc.start()
    for trial in range(1200):
        changed = bytearray(data[: rng.integers(4, len(data) + 1)] if trial % 4 == 0 else data)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(20, 36) if trial % 3 == 0 and len(changed) > 36 else rng.integers(4, len(changed) + 1)
            changed[at : at + 1] = rng.bytes(1)
        changed[:4] = zlib.crc32(changed[4:]).to_bytes(4, "little")
        try:
            found = decode(bytes(changed), form)
        except Damaged:
            refused += 1
            continue
        assert encode(bytes(changed[4:20]), found, form)  # which checks all that targets promise
    assert refused > 300
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_huge_numbers_in_a_record_allocate_nothing() -> None:
    for numbers in ((2**32 - 1,) * 4, (2**32 - 1, 0, 0, 0), (1, 1, 2**32 - 1, 0), (1, 1, 1, 2**32 - 1), (1, 2, 1, 0)):
        record = DIGEST + struct.pack("<IIII", *numbers) + bytes(200)
        with pytest.raises(Damaged, match=r"found 236 bytes, expected [\d,]+ for"):
            decode(zlib.crc32(record).to_bytes(4, "little") + record, FORMS[0])


def test_a_record_of_another_segment_or_form_is_refused() -> None:
    targets = drawn(np.random.default_rng(4), 20, FORMS[0])
    data = encode(DIGEST, targets, FORMS[0])
    with pytest.raises(Damaged, match="found the record of segment 000102"):
        decode(data, FORMS[0], bytes(16))
    for form in (RecordFormat(LLAMA, 11), RecordFormat(LLAMA, 0, 5), RecordFormat(LLAMA, 12, 0, True)):
        with pytest.raises(Damaged):
            decode(data, form, DIGEST)
    with pytest.raises(Damaged, match="expected ids below 200,000"):
        large = targets._replace(
            ids=np.where(np.arange(len(targets.ids)) == targets.starts[1] - 1, 202_000, targets.ids)
        )
        decode(encode(DIGEST, large, FORMS[0]), RecordFormat(200_000, 12), DIGEST)


def test_targets_that_cannot_be_are_not_written() -> None:
    form = RecordFormat(100, 4)
    good = Targets.of(np.array([[1, 2, 9]]), np.array([[2, 1, 1]]), None, np.array([-1.0]), np.ones(1), np.ones(1))
    encode(DIGEST, good, form)
    for change, message in (
        ({"ids": np.array([1, 2, 100])}, "outside the vocabulary"),
        ({"ids": np.array([-1, 2, 9])}, "outside the vocabulary"),
        ({"ids": np.array([1, 1, 9])}, "distinct and ascending"),
        ({"ids": np.array([1, 9, 2])}, "distinct and ascending"),
        ({"counts": np.array([2, 1, 2])}, "add up to 4"),
        ({"counts": np.array([4, 1, -1])}, "a count is not in"),
        ({"weights": np.ones(3, np.float32)}, "counts or weights"),
        ({"entropy": np.array([np.nan])}, "entropy holds what is not finite"),
        ({"target_log_prob": np.array([-np.inf])}, "target_log_prob holds"),
        ({"target_log_prob": np.array([-1e5])}, "target_log_prob holds"),
        ({"correct": np.ones(2)}, "lengths differ"),
        ({"starts": np.array([0, 2])}, "starts are not in order"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(DIGEST, good._replace(**change), form)
    with pytest.raises(ValueError, match="has not 2 ids"):
        encode(DIGEST, good._replace(counts=np.ones(3, int)), RecordFormat(100, 0, 2))
    for draws, top_k in ((3, 3), (0, 0), (70_000, 0), (0, 101), (-1, 0)):
        with pytest.raises(ValueError):
            RecordFormat(100, draws, top_k)
