"""`drover teach` is stopped at any record, goes on, and shares its work: with a teacher that is made up, and quick."""

import contextlib
import dataclasses
import itertools
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

import trainer.progress
import trainer.teach
from data.pipeline import Batch, Dataset, build_dataset
from data.target_cache import Header, Lack, describe, finished_shards
from data.target_writer import TargetWriter, _Shard
from model.sampled_targets import Targets
from sharding.errors import UserError
from tests.trainer.saved_run import micro, nano
from trainer.config import DistillConfig, RunConfig
from trainer.distillation import KEYS
from trainer.progress import work_bar
from trainer.targets import OUTCOME, OUTCOMES, CachedSource
from trainer.teach import teach

SEGMENTS = 48
"""Of the nano run; 8 a batch."""


class Answers:
    """What a teacher would say, from the keys of the draws alone: two ids of each token."""

    def __init__(self, run: RunConfig, distill: DistillConfig, teacher: Any):
        self._vocabulary, self.asked = run.model.vocab_size, 0

    def put(self, batch: Batch) -> Batch:
        return batch

    def compile(self, batch: Batch) -> None:
        pass

    def __call__(self, batch: Batch) -> Targets:
        first = batch[KEYS][..., 0] % (self._vocabulary - 1)
        ids = np.stack([first, first + 1], axis=-1).astype(np.int32)
        counts = np.broadcast_to(np.array([5, 7], np.int32), ids.shape)
        facts = (first / 1000).astype(np.float32)
        answer: Any = ids, counts / 12, counts, -facts, facts, first % 2 == 0
        return Targets(*answer)

    def fetch(self, answer: Targets) -> Targets:
        return answer


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.teach, "Asked", Answers)
    monkeypatch.setattr(trainer.teach, "SHARD_BYTES", 6000)
    monkeypatch.setattr(trainer.teach, "as_of_now", lambda distill: distill)
    monkeypatch.setattr(trainer.teach, "identity", lambda path: {"name": path.name, "digest": "made up"})
    monkeypatch.setattr(trainer.teach, "fingerprint", lambda *_: "made up")
    loaded = SimpleNamespace(teacher=SimpleNamespace(params={}, router_bias={}), origin="made up")
    monkeypatch.setattr(trainer.teach, "load_teacher", lambda *_: loaded)


def taught(run: RunConfig, folder: Path, part: int = 0, parts: int = 1) -> Path:
    teach(dataclasses.replace(run, distill=DistillConfig(teacher="made up", draws=12)), folder, part, parts)
    return folder


def files(cache: Path) -> dict[str, bytes]:
    """All but what the shards took to make."""
    return {path.name: path.read_bytes() for path in cache.iterdir() if not re.match(r"\d+\.json", path.name)}


def records(cache: Path) -> list[bytes]:
    """In the order in which they were written."""
    found = []
    for shard in sorted(cache.glob("*.array_record")):
        reader = ArrayRecordReader(str(shard))
        found += reader.read_all()
        reader.close()
    return found


def digests(cache: Path) -> set[tuple[int, int]]:
    shards = finished_shards(cache, Header.read(cache).digest)
    return {pair for _, index in shards for pair in zip(index.high.tolist(), index.low.tolist(), strict=True)}


def test_ended_at_any_record_it_goes_on_to_the_same_files(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards end within batches, so some of a batch is there and the rest is not."""
    whole, write = taught(nano(), tmp_path / "whole"), _Shard.write
    assert describe(whole)["segments"] == SEGMENTS and describe(whole)["shards"] > 6
    left = 0

    def ended(*given: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(*given)

    monkeypatch.setattr(_Shard, "write", ended)
    done = []
    for allowed in (5, 3, 9, 13, 17):
        left = allowed
        with pytest.raises(KeyboardInterrupt):
            taught(nano(), tmp_path / "ended")
        done.append(describe(tmp_path / "ended")["segments"])
    assert done == sorted(done) and any(segments % 8 for segments in done) and 0 < done[-1] < SEGMENTS
    left = SEGMENTS
    assert files(taught(nano(), tmp_path / "ended")) == files(whole)


def test_stopped_by_a_signal_it_goes_on_to_the_same_records(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, answer = taught(nano(), tmp_path / "whole"), Answers.__call__
    asked = []

    def signalled(self: Answers, batch: Batch) -> Targets:
        asked.append(batch)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # until another thread has read it
        return answer(self, batch)

    monkeypatch.setattr(Answers, "__call__", signalled)
    with pytest.raises(SystemExit) as stopped:
        taught(nano(), tmp_path / "stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert describe(tmp_path / "stopped")["segments"] == 24
    assert records(taught(nano(), tmp_path / "stopped")) == records(whole)
    assert files(tmp_path / "stopped") != files(whole)  # the shard that it was at ended there


def test_the_watch_is_told_before_processes_meet(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So one that is stuck in its data or in a file system is at another place than those who wait for it."""
    told: list[str] = []

    def tell(word: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **options: Any) -> Any:
            result = function(*given, **options)
            told.append(word)
            return result

        return called

    for owner, name, word in (
        (Dataset, "batch", "read"),
        (TargetWriter, "add", "written"),
        (trainer.teach, "anyone_says", "met"),
        (trainer.teach, "sum_of_all", "met"),
    ):
        monkeypatch.setattr(owner, name, tell(word, getattr(owner, name)))
    run = dataclasses.replace(nano(), distill=DistillConfig(teacher="made up", draws=12))
    teach(run, tmp_path, reached=lambda batch: told.append(f"at {batch}"))
    ways = [["read", f"at {n}", "met", "written", f"at {n}", "met"] for n in range(1, run.steps + 1)]
    assert told == [*itertools.chain(*ways), "met"]  # the last sums up


def test_parts_at_the_same_time_do_nothing_twice_in_later_epochs(quick: None, tmp_path: Path) -> None:
    run = micro()
    options = dataclasses.replace(run.data, mixture={"scenes": 1.0}, batch_size=8, scenes=12, window=5)
    run = dataclasses.replace(run, data=options, steps=4)  # some 40 segments
    expected = digests(taught(run, tmp_path / "whole"))
    parts = [digests(taught(run, tmp_path / str(part), part, 3)) for part in range(3)]  # none sees what others wrote
    assert sum(map(len, parts)) == len(expected) == 12 and set.union(*parts) == expected
    for part in (2, 0, 1):
        taught(run, tmp_path / "shared", part, 3)
    facts = describe(tmp_path / "shared")
    assert digests(tmp_path / "shared") == expected and facts["repeated segments"] == 0


def test_rows_of_another_length_cut_long_documents_elsewhere_and_that_is_told(quick: None, tmp_path: Path) -> None:
    cache, run = taught(nano(), tmp_path), nano()
    distill = DistillConfig(source="cache", cache=str(cache), draws=12)
    for change, words in (
        ({"batch_size": 4}, ""),
        ({"sequence_length": 64}, "data.sequence_length: found 64, expected 128 as the cache was made with"),
    ):
        dataset = build_dataset(dataclasses.replace(run.data, **change), run.media, "train")
        other = dataclasses.replace(run, data=dataset.config)
        with contextlib.closing(CachedSource(other, distill, dataset.tokenizer.digest)) as source:
            assert words in source.origin and ("cut" in source.origin) == bool(words)
            if words:
                with pytest.raises(UserError, match=f"has no targets .* cut in other places .{words}.: make these"):
                    source(dataset.batch(0))
            else:
                found = source(dataset.batch(0))
                assert found["soft_ids"].max() > 0 and not np.any(found[OUTCOME] == 1 + OUTCOMES.index(Lack.MISSING))


def test_lines_without_a_terminal_tell_speed_bytes_and_the_time_left(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer.progress, "SECONDS_BETWEEN_LINES", -1.0)
    taught(nano(), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    size = describe(tmp_path)["bytes of records"] / 6144
    assert len(lines) == 6
    assert re.fullmatch(rf"teaching: 6 of 6, [\d,]+ tokens/s, {size:.1f} bytes/token, 0:00:00 left", lines[-1])


def test_the_time_left_is_that_at_the_pace_since_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 50.0
    monkeypatch.setattr(trainer.progress, "time", SimpleNamespace(monotonic=lambda: now))
    with work_bar("work", 1000) as advance:
        for seconds in (0, 0, 20, 20, 100):  # the first two were done before
            now += seconds
            advance(f"{seconds} s")
    assert capsys.readouterr().err.splitlines() == [
        "work: 4 of 1000, 20 s, 2:46:00 left",
        "work: 5 of 1000, 100 s, 1 day, 3:38:20 left",
    ]
