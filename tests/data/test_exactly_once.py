"""Every document once an epoch, and batch n the same rows, whatever the hosts, the interruptions and the mixture."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from data.config import DataConfig, MediaSpec
from data.mixture import Schedule, continued, names, options_of
from data.pipeline import Batch, Dataset, build_dataset
from data.prepare import Options, prepare

BATCH = 8


COUNTS = {"a": 60, "b": 70, "c": 300, "d": 40}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    """Of the sources b and c; a and d are there to be added, one before them and one after them by name."""
    folder = tmp_path_factory.mktemp("once")
    random = np.random.default_rng(0)
    for name, count in COUNTS.items():
        lines = [
            json.dumps({"id": f"{name}{i}", "text": f"{name}{i}" + " x" * int(random.integers(0, 24))})
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        options = Options("bytes", held_out=0, keep_duplicates=True)
        prepare([folder / f"{name}.jsonl"], folder / name, options, 0, lambda told: None)
    return DataConfig(
        mixture={"b": 0.3, "c": 0.7},
        paths={name: str(folder / name) for name in COUNTS},
        tokenizer=str(folder / "a"),
        sequence_length=64,
        batch_size=BATCH,
        window=16,
        workers=0,
        cache_dir=str(folder / "cache"),
    )


MIXTURES = [{"b": 0.3, "c": 0.7}, {"b": 0.6, "c": 0.4}, {"c": 1.0}]
ADDED = [{"a": 0.3, "b": 0.4, "c": 0.3}, {"b": 0.2, "c": 0.4, "d": 0.4}, {"a": 0.2, "d": 0.8}]
START = st.tuples(st.integers(1, 8), st.integers(1, 6), st.sampled_from(MIXTURES + ADDED))


def ids(dataset: Dataset, batch: Batch) -> list[str]:
    """Of the documents in a batch, read from its tokens."""
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            found.append(dataset.tokenizer.decode(tokens[segments == segment].tolist()).split()[0])
    return found


def made(dataset: Dataset, first: int, stop: int, rows: list[int]) -> Iterator[Batch]:
    """These rows of the batches: as a run has them if there are workers, else one by one."""
    if not dataset.config.workers:
        yield from (dataset.batch(n, rows) for n in range(first, stop))
        return
    with dataset.batches(first, stop, rows) as batches:
        yield from batches


@settings(deadline=None, max_examples=20)
@given(st.lists(START, min_size=1, max_size=5), st.integers(0, 2**40))
def test_every_document_comes_once_an_epoch_whatever_happens(config, starts, seed):
    """(hosts, batches until the next interruption, mixture) of each start."""
    check(config, starts, [0] * len(starts), seed)


SOME = st.sampled_from(MIXTURES + ADDED)


@settings(deadline=None, max_examples=2, phases=[Phase.generate])
@given(st.sampled_from([(2, 1), (1, 2)]), st.tuples(SOME, SOME), st.integers(1, 6), st.integers(0, 2**40))
def test_worker_processes_give_the_same(config, shape, mixtures, batches, seed):
    hosts, workers = shape
    check(config, [(1, batches, mixtures[0]), (hosts, 5, mixtures[1])], [0, workers], seed)


def check(config: DataConfig, starts: list[tuple[int, int, dict[str, float]]], workers: list[int], seed: int) -> None:
    """Goes through all starts; all that is kept between them is a few numbers.

    Hosts have 8 rows together, some one more than others. What they read is what one that knew the whole journal from the
    start would have read, and has every document of a source once an epoch, those of sources that came or went too.
    """
    config = dataclasses.replace(config, seed=seed)
    position, journal, n, seen, given, going = None, [], 0, [], [], None
    for (hosts, batches, weights), count in zip(starts, workers, strict=True):
        going = dataclasses.replace(config, mixture=weights, workers=count)
        journal = continued(json.loads(json.dumps(journal)), going, n)
        each = [build_dataset(going, MediaSpec(), "train", journal=journal, position=position) for _ in range(hosts)]
        rows = np.array_split(np.arange(BATCH), hosts)
        of_hosts = [made(one, n, n + batches, of_host.tolist()) for one, of_host in zip(each, rows, strict=True)]
        for parts in zip(*of_hosts, strict=True):
            whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            whole["source_ids"] = np.array([0, *map(ord, each[0].source_names)])[whole["source_ids"]]
            given.append(whole)
            seen += ids(each[0], whole)
        n += batches
        kept = [dataset.plain_position(dataset.where(n - 1)) for dataset in each]
        assert all(position == kept[0] for position in kept)
        position = json.loads(json.dumps(kept[0]))
        assert len(json.dumps(position)) < 300
    assert going
    knowing = build_dataset(going, MediaSpec(), "train", journal=journal)
    for batch, whole in enumerate(given):
        expected = knowing.batch(batch)
        expected["source_ids"] = np.array([0, *map(ord, knowing.source_names)])[expected["source_ids"]]
        for name in expected:
            np.testing.assert_array_equal(whole[name], expected[name], err_msg=name)
    row, window = n * BATCH, knowing._packing.position(n * BATCH - 1)
    while (
        knowing._packing.position(row).row == window.row
    ):  # to the end of the window, where all of its documents have come
        seen += [knowing._sources[source].record(item).id for source, item, _ in knowing._packing.row(row)]
        row += 1
    counts = collections.Counter(seen)
    for source, taken in zip(knowing.source_names, knowing._packing.position(row).taken, strict=True):
        times = [counts.pop(f"{source}{i}", 0) for i in range(COUNTS[source])]
        assert set(times) <= {taken // len(times), taken // len(times) + 1} and sum(times) == taken
    assert not counts


def test_epochs_are_told(config):
    dataset = build_dataset(config, MediaSpec(), "train")
    end = dataset.position(150)
    told = [dataset.epochs(dataset.where(n)) for n in range(end.row // BATCH, end.row // BATCH + 30)]
    assert abs(told[0]["b"] - end.taken[0] / 70) < 0.1 and abs(told[0]["c"] - end.taken[1] / 300) < 0.1
    assert all(later["b"] > earlier["b"] and later["c"] > earlier["c"] for earlier, later in itertools.pairwise(told))


def test_a_batch_has_the_rows_that_were_packed_for_it_whatever_their_order(config):
    dataset = build_dataset(config, MediaSpec(), "train")
    for n in range(5):
        packed = [dataset._packing.row(n * BATCH + b) for b in range(BATCH)]
        assert sorted(dataset.rows(n)) == sorted(packed)


def shares(config: DataConfig, journal, batch: int) -> dict[str, float]:
    schedule = Schedule.of(config, journal)
    return {name: round(share, 6) for name, share in zip(schedule.names, schedule.shares(batch), strict=True)}


def test_weights_temperature_and_curriculum_make_the_shares(config):
    assert shares(config, (), 0) == {"c": 0.7, "b": 0.3}
    warm = dataclasses.replace(config, mixture={"c": 0.8, "b": 0.2}, mixture_temperature=2.0)
    for few, many in ((2000, 3000), (1e-4, 1e-3)):  # whose powers overflow, or vanish
        cold = dataclasses.replace(config, mixture={"c": many, "b": few}, mixture_temperature=0.01)
        assert Schedule.of(cold).shares(0)[1] == pytest.approx(1, abs=1e-9)
    assert shares(warm, (), 0) == {"c": 0.666667, "b": 0.333333}
    staged = dataclasses.replace(config, curriculum={"100": {"b": 2.0}, "20": {"c": 1.0, "b": 1.0}})
    assert [shares(staged, (), n)["b"] for n in (0, 19, 20, 99, 100, 10**6)] == [0.3, 0.3, 0.5, 0.5, 1.0, 1.0]
    assert names(dataclasses.replace(config, mixture={"c": 1.0}, curriculum={"9": {"b": 1.0}})) == ("b", "c")
    assert names(dataclasses.replace(config, mixture={"c": 1.0, "b": 0.0})) == ("c",)


def test_a_journal_keeps_what_held_and_from_when(config):
    journal = continued((), config, 0)
    assert journal == [(0, options_of(config))] == continued(journal, config, 40)
    other = dataclasses.replace(config, mixture={"c": 0.0, "b": 1.0})
    journal = continued(json.loads(json.dumps(journal)), other, 40)
    assert [first for first, _ in journal] == [0, 40]
    assert shares(other, journal, 39) == {"c": 0.7, "b": 0.3} and shares(other, journal, 40) == {"c": 0.0, "b": 1.0}
    # Started again from an earlier checkpoint: what was changed after it did not happen.
    assert continued(journal, config, 30) == [(0, options_of(config))]
    assert [first for first, _ in continued(journal, other, 30)] == [0, 30]


def test_held_out_batches_do_not_change_with_the_step(config):
    staged = dataclasses.replace(config, curriculum={"0": {"c": 1.0}, "5": {"b": 1.0}})
    schedule = Schedule.of(staged)
    assert schedule.most == (1.0, 1.0)
