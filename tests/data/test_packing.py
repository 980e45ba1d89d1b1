"""No row overflows, no document is lost, and any row is found without the rows before it."""

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Packing, balanced, pack_rows
from data.positions import Position, Positions
from data.shuffle import shuffled
from sharding.errors import UserError

DOCUMENTS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4), st.integers(0, 3)), max_size=40)
LARGE = st.sampled_from([1, 128])
"""Tokens are so many times as many: then tiles and windows are too many for a search of the fullest row."""


@given(DOCUMENTS, st.integers(60, 90), st.integers(4, 7), st.integers(3, 5), LARGE)
def test_every_document_is_in_one_row_and_no_row_overflows(documents, tokens, tiles, windows, large):
    documents, tokens = [(large * length, *rest) for length, *rest in documents], large * tokens
    lengths = [d[0] for d in documents]
    rows = pack_rows(documents, (tokens, tiles, windows))
    assert sorted(i for row in rows for i, _ in row) == list(range(len(documents)))
    for row in rows:
        assert row
        assert [start for _, start in row] == [sum(lengths[i] for i, _ in row[:n]) for n in range(len(row))]
        assert sum(lengths[i] for i, _ in row) <= tokens
        assert sum(documents[i][1] for i, _ in row) <= tiles
        assert sum(documents[i][2] for i, _ in row) <= windows


@given(DOCUMENTS, st.sampled_from([2, 3, 4]), st.integers(15, 25), st.integers(4, 7), LARGE)
def test_in_rows_of_parts_only_documents_that_begin_with_a_part_cross_its_edge(documents, parts, part, tiles, large):
    part *= large
    documents = [(min(large * length, parts * part), tiles, windows) for length, tiles, windows in documents]
    rows = pack_rows(documents, (parts * part, tiles, 3), parts)
    assert sorted(i for row in rows for i, _ in row) == list(range(len(documents)))
    for row in rows:
        assert row
        assert row[0][1] == 0
        end = 0
        for i, start in row:
            assert start >= end
            end = start + documents[i][0]
            assert start % part == 0 or start // part == (end - 1) // part
        assert end <= parts * part
        assert sum(documents[i][1] for i, _ in row) <= tiles


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=9),
    st.integers(3, 6),
    st.integers(2, 3),
)
def test_each_row_is_as_full_as_the_documents_left_allow(documents, tiles, windows):
    lengths, tokens = [d[0] for d in documents], 30
    left = set(range(len(documents)))
    for row in ([i for i, _ in row] for row in pack_rows(documents, (tokens, tiles, windows))):
        first = max(left, key=lambda i: (lengths[i], -i))
        assert row[0] == first
        others = sorted(left - {first})
        fullest = 0
        for subset in range(2 ** len(others)):  # all of them
            chosen = [first, *(i for k, i in enumerate(others) if subset >> k & 1)]
            if sum(documents[i][1] for i in chosen) <= tiles and sum(documents[i][2] for i in chosen) <= windows:
                used = sum(lengths[i] for i in chosen)
                fullest = used if fullest < used <= tokens else fullest
        assert sum(lengths[i] for i in row) == fullest
        left -= set(row)


def test_large_rows_take_their_share_of_tiles_first_and_are_full_to_the_end() -> None:
    """Texts with pictures whose tiles nearly use up the room for them: the longest first and then what fills the rest would
    leave pictures alone for the last rows, half empty."""
    random = np.random.default_rng(0)
    texts = [(int(n), 0, 0) for n in random.lognormal(6.4, 1.35, 150).clip(16, 6000)]
    pictures = [(80 + 144 * int(n), int(n), 0) for n in random.choice([1, 2, 5, 8], 240)]
    room = (8192, 28, 0)
    least = np.sum(texts + pictures, axis=0)[:2] / room[:2]  # 44 rows for the tokens, 36 for the tiles
    assert least[0] > least[1] > 0.8 * least[0]
    assert len(pack_rows(texts + pictures, room)) <= least[0] + 2  # 57 without


def small_packing(sizes, shares: Any, window=16, seed=0, **options: Any) -> tuple[Packing, list[np.ndarray]]:
    rng = np.random.default_rng(1)
    lengths = [rng.integers(5, 60, size) for size in sizes]
    tiles = [rng.integers(0, 3, size) for size in sizes]
    three = [np.column_stack([n, t, np.zeros_like(n)]) for n, t in zip(lengths, tiles, strict=True)]
    by_row: Any = shares if callable(shares) else lambda row: shares
    return Packing(dict(zip("abc", three, strict=False)), by_row, (64, 4, 0), window, seed, **options), lengths


def documents_in_order(packing: Packing, rows: range) -> list[tuple[int, int]]:
    return [(source, document) for n in rows for source, document, _ in packing.row(n)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.05, 1)), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_each_document_comes_once_an_epoch_whatever_the_mixture(sources, window, seed):
    packing, lengths = small_packing([size for size, _ in sources], [share for _, share in sources], window, seed)
    state = packing.position(150)
    seen = [np.zeros(len(length), int) for length in lengths]
    for source, document in documents_in_order(packing, range(state.row)):
        seen[source][document] += 1
    for counts, taken in zip(seen, state.taken, strict=True):
        epochs, rest = divmod(taken, len(counts))
        assert set(counts) <= {epochs, epochs + 1}
        assert (counts == epochs + 1).sum() == rest


def test_sources_have_their_share_of_the_tokens_from_the_start():
    packing, lengths = small_packing([3000, 500], [0.7, 0.3], window=64)
    for rows in (range(200), range(200, 400)):
        tokens = np.zeros(2)
        for source, document in documents_in_order(packing, rows):
            tokens[source] += lengths[source][document]
        assert abs(tokens[0] / tokens.sum() - 0.7) < 0.04


def test_shares_of_a_long_run_are_exact_however_small_a_source_is():
    packing, lengths = small_packing([400, 300], [0.995, 0.005], window=8)
    taken = packing.position(6000).taken
    tokens = [count * length.mean() for count, length in zip(taken, lengths, strict=True)]  # whichever were taken
    assert abs(tokens[1] / sum(tokens) - 0.005) < 1e-4


def test_a_row_is_the_same_whatever_was_asked_before():
    rows = [small_packing([200, 30], [0.5, 0.5])[0].row(n) for n in range(150)]
    packing, _ = small_packing([200, 30], [0.5, 0.5])
    assert [packing.row(n) for n in reversed(range(150))] == rows[::-1]


def test_windows_are_kept_by_their_documents_and_those_of_a_batch_in_any_case(monkeypatch):
    sizes = {"a": np.tile([[1, 0, 0]], (30_000, 1))}
    packing = Packing(sizes, lambda row: (1.0,), (512, 0, 0), 16, 0)  # 16,384 documents a window, of 32 rows
    monkeypatch.setattr("data.packing._KEPT_WINDOWS", (2, 256))
    monkeypatch.setattr("data.packing._KEPT_DOCUMENTS", 5 * 16_384)
    packed: list[int] = []
    inner = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda state: packed.append(state.row) or inner(state))
    first = [packing.row(n) for n in range(8 * 32)]
    assert sum(len(window.documents) for window in packing._kept.values()) == 5 * 16_384
    assert [packing.row(n) for n in range(3 * 32, 8 * 32)] == first[3 * 32 :] and packed == list(range(0, 8 * 32, 32))
    monkeypatch.setattr("data.packing._KEPT_DOCUMENTS", 0)
    assert [packing.row(n) for n in range(4 * 32)] == first[: 4 * 32] and len(packing._kept) == 2
    assert [packing.row(n) for n in range(2 * 32, 4 * 32)] == first[2 * 32 : 4 * 32] and len(packed) == 8 + 4


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 400), st.integers(1, 3))
def test_from_a_position_later_rows_are_found_without_what_lies_before(n, count):
    shares = [1.0, 0.3, 0.05][:count]
    packing, _ = small_packing([200, 30, 7][:count], shares)
    names = ["a", "b", "c"][:count]
    kept = json.loads(json.dumps(Position.from_array(packing.position(n).as_array()).plain(names)))
    known = Positions(count, given=Position.from_plain(kept, names))
    again, _ = small_packing([200, 30, 7][:count], shares, known=known)
    packed: list[int] = []
    inner = again._pack
    again._packed = lambda state: packed.append(state.row) or inner(state)  # pyright: ignore[reportAttributeAccessIssue]
    assert [again.row(m) for m in range(n, n + 20)] == [packing.row(m) for m in range(n, n + 20)]
    assert min(packed) == packing.position(n).row
    if n:
        assert again.row(n // 2) == packing.row(n // 2)  # what lies before is found as well, from the start


def test_shares_may_change_and_every_document_still_comes_once_an_epoch():
    def shares(row: int) -> tuple[float, ...]:
        return (1.0, 0.0) if row < 40 else (0.2, 0.8)

    packing, lengths = small_packing([150, 90], shares)
    before = documents_in_order(packing, range(40))
    assert {source for source, _ in before} == {0}
    later = packing.position(80)
    tokens = np.zeros(2)
    for source, document in documents_in_order(packing, range(packing.position(100).row, packing.position(300).row)):
        tokens[source] += lengths[source][document]
    assert abs(tokens[1] / tokens.sum() - 0.8) < 0.05
    whole = documents_in_order(packing, range(later.row))
    for source in range(2):
        first_epoch = [document for of, document in whole if of == source][: len(lengths[source])]
        assert len(set(first_epoch)) == len(first_epoch)


def test_a_source_that_is_used_up_leaves_its_share_to_the_others_and_then_there_are_none():
    packing, lengths = small_packing([50, 400], [0.5, 0.5], caps=lambda row: (2.0, 1.5))
    seen = [np.zeros(len(length), int) for length in lengths]
    n = 0
    with pytest.raises(UserError, match=r"data\.max_epochs: row [\d,]+ cannot be filled"):
        while True:
            for source, document, _ in packing.row(n):
                seen[source][document] += 1
            n += 1
    assert set(seen[0]) == {2}
    assert seen[1].sum() == 600 and set(seen[1]) == {1, 2}


def test_epochs_and_seeds_differ_in_order():
    packing, _ = small_packing([100], [1.0])
    documents = [document for _, document in documents_in_order(packing, range(200))]
    first, second = documents[:64], documents[100:164]
    assert first != second
    assert small_packing([100], [1.0], seed=1)[0].row(0) != packing.row(0)


def test_a_tiny_share_costs_nothing_until_its_rows_are_asked_for():
    packing, _ = small_packing([2000, 400], [1.0, 1e-7], window=64)
    start = time.perf_counter()
    packing.row(100)
    assert time.perf_counter() - start < 5


@given(st.lists(st.floats(0, 10), max_size=40))
def test_balancing_keeps_every_row(costs):
    assert sorted(balanced(costs)) == list(range(len(costs)))


def test_shares_of_a_batch_cost_about_the_same():
    costs = np.random.default_rng(0).lognormal(0, 1, 64).tolist()
    for parts in (2, 4, 8):
        sums = np.array([costs[i] for i in balanced(costs)]).reshape(parts, -1).sum(axis=1)
        unsorted = np.array(costs).reshape(parts, -1).sum(axis=1)
        assert sums.max() / sums.mean() < 1.12 < unsorted.max() / unsorted.mean()


@pytest.mark.parametrize(("rows", "parts"), [(24, 2), (24, 4), (24, 8), (15, 3), (60, 2), (60, 4), (60, 12)])
def test_shares_by_the_smallest_prime_factors_cost_about_the_same(rows, parts):
    random = np.random.default_rng(0)
    ordered, drawn = [], []
    for _ in range(50):
        costs = random.lognormal(0, 0.5, rows)
        for found, order in ((ordered, balanced(costs.tolist())), (drawn, list(range(rows)))):
            sums = costs[order].reshape(parts, -1).sum(axis=1)
            found.append(sums.max() / sums.mean())
    assert np.mean(ordered) - 1 < 0.45 * (np.mean(drawn) - 1)


def test_a_source_without_a_share_changes_no_row_wherever_it_stands():
    random = np.random.default_rng(0)
    sizes = {name: np.column_stack([random.integers(3, 60, 90), *np.zeros((2, 90), int)]) for name in "bcdefghijk"}
    shares = random.uniform(0.1, 1, len(sizes)).tolist()
    more = {"a": sizes["b"][::-1], **sizes, "z": sizes["c"][::-1]}
    few = Packing(sizes, lambda row: shares, (64, 0, 0), 16, 0)
    many = Packing(more, lambda row: [0.0, *shares, 0.0], (64, 0, 0), 16, 0)
    for n in range(100):
        assert [(source + 1, *place) for source, *place in few.row(n)] == many.row(n)


@given(st.integers(1, 5000), st.integers(0, 2**40))
def test_shuffled_is_a_bijection(count, key):
    order = shuffled(np.arange(count), count, (key, 1))
    assert sorted(order.tolist()) == list(range(count))


def test_shuffled_looks_random_and_depends_on_the_key():
    count = 10_007
    order = shuffled(np.arange(count), count, (1, 2))
    assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < 0.03
    assert abs(np.mean(np.abs(np.diff(order))) / count - 1 / 3) < 0.02
    assert (order == shuffled(np.arange(count), count, (1, 3))).mean() < 0.01
    far = shuffled(np.array([0, 10**15 - 1]), 10**15, (1, 2))
    assert ((far >= 0) & (far < 10**15)).all()


@pytest.mark.parametrize("tokens", [512, 2048])
def test_packing_wastes_less_than_three_per_cent(tokens):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.normal(105, 19, 180).clip(60, 190), rng.uniform(400, 512, 30)]).astype(int).tolist()
    rows = pack_rows([(length, 1, 0) for length in lengths], (tokens, 64, 0))
    assert sum(lengths) / (tokens * len(rows)) > 0.97
