"""No row overflows, no document is lost, and any row is found without the rows before it."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Packing, pack_rows

DOCUMENTS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4), st.integers(0, 3)), max_size=40)


@given(DOCUMENTS, st.integers(60, 90), st.integers(4, 7), st.integers(3, 5))
def test_every_document_is_in_one_row_and_no_row_overflows(documents, tokens, tiles, windows):
    lengths = [d[0] for d in documents]
    rows = pack_rows(documents, (tokens, tiles, windows))
    assert sorted(i for row in rows for i, _ in row) == list(range(len(documents)))
    for row in rows:
        assert row
        assert [start for _, start in row] == [sum(lengths[i] for i, _ in row[:n]) for n in range(len(row))]
        assert sum(lengths[i] for i, _ in row) <= tokens
        assert sum(documents[i][1] for i, _ in row) <= tiles
        assert sum(documents[i][2] for i, _ in row) <= windows


@given(DOCUMENTS, st.sampled_from([2, 3, 4]), st.integers(15, 25), st.integers(4, 7))
def test_in_rows_of_parts_only_documents_that_begin_with_a_part_cross_its_edge(documents, parts, part, tiles):
    documents = [(min(length, parts * part), tiles, windows) for length, tiles, windows in documents]
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


def small_packing(sizes, shares, window=16, seed=0) -> tuple[Packing, list[np.ndarray]]:
    rng = np.random.default_rng(1)
    lengths = [rng.integers(5, 60, size) for size in sizes]
    tiles = [rng.integers(0, 3, size) for size in sizes]
    sizes = [np.column_stack([n, t, np.zeros_like(n)]) for n, t in zip(lengths, tiles, strict=True)]
    return Packing(sizes, shares, (64, 4, 0), window, seed), lengths


def rows_per_cycle(packing: Packing) -> int:
    rows, documents = 0, 0
    while documents < sum(packing.documents_per_cycle):
        documents += len(packing.row(rows))
        rows += 1
    return rows


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.05, 1)), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_a_cycle_has_each_document_as_often_as_any_other_of_its_source(sources, window, seed):
    packing, lengths = small_packing([size for size, _ in sources], [share for _, share in sources], window, seed)
    count = rows_per_cycle(packing)
    for cycle in range(2):
        seen = [np.zeros(len(length), int) for length in lengths]
        for n in range(count):
            for source, document, _ in packing.row(cycle * count + n):
                seen[source][document] += 1
        assert [int(s.sum()) for s in seen] == list(packing.documents_per_cycle)
        assert all(s.max() - s.min() <= 1 for s in seen)
        assert any(s.min() == s.max() == 1 for s in seen)  # the one that lasts longest


def test_sources_have_their_share_of_the_tokens_from_the_start():
    packing, lengths = small_packing([3000, 500], [0.7, 0.3], window=64)
    for rows in (range(200), range(200, 400)):
        tokens = np.zeros(2)
        for n in rows:
            for source, document, _ in packing.row(n):
                tokens[source] += lengths[source][document]
        assert abs(tokens[0] / tokens.sum() - 0.7) < 0.03


def test_a_row_is_the_same_whatever_was_asked_before():
    rows = [small_packing([200, 30], [0.5, 0.5])[0].row(n) for n in range(150)]
    packing, _ = small_packing([200, 30], [0.5, 0.5])
    assert [packing.row(n) for n in reversed(range(150))] == rows[::-1]


def test_cycles_and_seeds_differ_in_order():
    packing, _ = small_packing([100], [1.0])
    count = rows_per_cycle(packing)
    cycles = [[packing.row(c * count + n) for n in range(count)] for c in range(3)]
    assert cycles[0] != cycles[1] != cycles[2]
    assert sorted(map(sorted, cycles[0])) == sorted(map(sorted, cycles[1]))
    assert small_packing([100], [1.0], seed=1)[0].row(0) != packing.row(0)


def test_a_far_row_costs_at_most_one_cycle():
    packing, _ = small_packing([2000, 400], [0.5, 0.5], window=64)
    start = time.perf_counter()
    packing.row(10**12)
    packing.row(10**12 + 1)
    assert time.perf_counter() - start < 5


def test_a_tiny_share_costs_nothing_until_its_rows_are_asked_for():
    packing, _ = small_packing([2000, 400], [1.0, 1e-7], window=64)
    start = time.perf_counter()
    packing.row(100)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("tokens", [512, 2048])
def test_packing_wastes_less_than_three_per_cent(tokens):
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.normal(105, 19, 180).clip(60, 190), rng.uniform(400, 512, 30)]).astype(int).tolist()
    rows = pack_rows([(length, 1, 0) for length in lengths], (tokens, 64, 0))
    assert sum(lengths) / (tokens * len(rows)) > 0.97
