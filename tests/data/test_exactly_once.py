"""Every document once an epoch, and batch n the same rows, whatever the hosts, the interruptions and the mixture."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, MediaSpec
from data.mixture import Schedule, continued, names, options_of
from data.pipeline import build_dataset
from data.prepare import Options, prepare

BATCH = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("once")
    random = np.random.default_rng(0)
    for name, count in (("a", 300), ("b", 70)):
        lines = [json.dumps({"id": f"{name}{i}", "text": name * int(random.integers(1, 50))}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        options = Options("bytes", held_out=0, keep_duplicates=True)
        prepare([folder / f"{name}.jsonl"], folder / name, options, 1, lambda told: None)
    return DataConfig(
        mixture={"a": 0.7, "b": 0.3},
        paths={name: str(folder / name) for name in "ab"},
        tokenizer=str(folder / "a"),
        sequence_length=64,
        batch_size=BATCH,
        window=16,
        workers=0,
        cache_dir=str(folder / "cache"),
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 12)), min_size=1, max_size=5))
def test_hosts_and_interruptions_change_no_row(config, starts):
    """(hosts, batches until the next interruption) of each start; all that is kept between them is a few numbers."""
    undisturbed = build_dataset(config, MediaSpec(), "train")
    position, journal, n = None, [], 0
    for hosts, batches in starts:
        journal = continued(json.loads(json.dumps(journal)), config, n)
        each = [build_dataset(config, MediaSpec(), "train", journal=journal, position=position) for _ in range(hosts)]
        for batch in range(n, n + batches):
            share = BATCH // hosts
            rows = [range(host * share, (host + 1) * share) for host in range(hosts)]
            parts = [dataset.batch(batch, of_host) for dataset, of_host in zip(each, rows, strict=True)]
            for name, whole in undisturbed.batch(batch).items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole)
        n += batches
        kept = [dataset.plain_position(dataset.where(n - 1)) for dataset in each]
        assert all(position == kept[0] for position in kept)
        position = json.loads(json.dumps(kept[0]))
        assert len(json.dumps(position)) < 300


def test_every_document_comes_once_an_epoch(config):
    dataset = build_dataset(config, MediaSpec(), "train")
    end = dataset.position(150)  # of a window: all of the documents before it have come
    found: dict[str, int] = {}
    for n in range(end.row // BATCH + 1):
        for row in (dataset._packing.row(n * BATCH + b) for b in range(BATCH) if n * BATCH + b < end.row):
            for source, item, _ in row:
                name = dataset._sources[source].record(item).id
                found[name] = found.get(name, 0) + 1
    epochs = {"a": end.taken[0] / 300, "b": end.taken[1] / 70}
    for source, count in (("a", 300), ("b", 70)):
        times = [number for name, number in found.items() if name.startswith(source)]
        assert len(times) == count
        assert set(times) <= {int(epochs[source]), int(epochs[source]) + 1}
        assert sum(times) == round(epochs[source] * count)
    assert epochs["b"] > 1.5
    told = [dataset.epochs(dataset.where(n)) for n in range(end.row // BATCH, end.row // BATCH + 30)]
    assert abs(told[0]["a"] - epochs["a"]) < 0.1
    assert all(later["a"] > earlier["a"] and later["b"] > earlier["b"] for earlier, later in itertools.pairwise(told))


def test_a_batch_has_the_rows_that_were_packed_for_it_whatever_their_order(config):
    dataset = build_dataset(config, MediaSpec(), "train")
    for n in range(5):
        packed = [dataset._packing.row(n * BATCH + b) for b in range(BATCH)]
        assert sorted(dataset.rows(n)) == sorted(packed)


def shares(config: DataConfig, journal, batch: int) -> dict[str, float]:
    schedule = Schedule.of(config, journal)
    return {name: round(share, 6) for name, share in zip(schedule.names, schedule.shares(batch), strict=True)}


def test_weights_temperature_and_curriculum_make_the_shares(config):
    assert shares(config, (), 0) == {"a": 0.7, "b": 0.3}
    warm = dataclasses.replace(config, mixture={"a": 0.8, "b": 0.2}, mixture_temperature=2.0)
    assert shares(warm, (), 0) == {"a": 0.666667, "b": 0.333333}
    staged = dataclasses.replace(config, curriculum={"100": {"b": 2.0}, "20": {"a": 1.0, "b": 1.0}})
    assert [shares(staged, (), n)["b"] for n in (0, 19, 20, 99, 100, 10**6)] == [0.3, 0.3, 0.5, 0.5, 1.0, 1.0]
    assert names(dataclasses.replace(config, mixture={"a": 1.0}, curriculum={"9": {"b": 1.0}})) == ("a", "b")
    assert names(dataclasses.replace(config, mixture={"a": 1.0, "b": 0.0})) == ("a",)


def test_a_journal_keeps_what_held_and_from_when(config):
    journal = continued((), config, 0)
    assert journal == [(0, options_of(config))] == continued(journal, config, 40)
    other = dataclasses.replace(config, mixture={"a": 0.0, "b": 1.0})
    journal = continued(json.loads(json.dumps(journal)), other, 40)
    assert [first for first, _ in journal] == [0, 40]
    assert shares(other, journal, 39) == {"a": 0.7, "b": 0.3} and shares(other, journal, 40) == {"a": 0.0, "b": 1.0}
    # Started again from an earlier checkpoint: what was changed after it did not happen.
    assert continued(journal, config, 30) == [(0, options_of(config))]
    assert [first for first, _ in continued(journal, other, 30)] == [0, 30]


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 60))
def test_shares_changed_on_a_resume_change_no_row_before_and_lose_none(config, at):
    other = dataclasses.replace(config, mixture={"a": 0.1, "b": 0.9})
    before = build_dataset(config, MediaSpec(), "train")
    position = before.plain_position(before.where(at - 1))
    journal = continued(continued((), config, 0), other, at)
    after = build_dataset(other, MediaSpec(), "train", journal=journal, position=position)
    from_start = build_dataset(other, MediaSpec(), "train", journal=journal)
    for n in (0, at - 1):
        assert from_start.rows(n) == before.rows(n)
    for n in (at, at + 1, at + 20):
        assert after.rows(n) == from_start.rows(n)
    far = after.position(at + 60)
    counts = np.zeros(300, int)
    for row in range(far.row):
        for source, item, _ in from_start._packing.row(row):
            counts[item] += source == 0
    assert set(counts) <= {far.taken[0] // 300, far.taken[0] // 300 + 1}


def test_held_out_batches_do_not_change_with_the_step(config):
    staged = dataclasses.replace(config, curriculum={"0": {"a": 1.0}, "5": {"b": 1.0}})
    schedule = Schedule.of(staged)
    assert schedule.most == (1.0, 1.0)
