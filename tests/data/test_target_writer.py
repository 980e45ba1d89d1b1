"""Writers of a cache of targets: whole after any kill, nothing twice, and no folder that is something else's."""

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import target_index, target_writer
from data.target_cache import Header, TargetCache, describe
from data.target_index import ShardIndex
from data.target_writer import TargetWriter
from sharding.errors import UserError
from tests.data.target_work import DIGESTS, HEADER, SECONDS, SEGMENTS, SHARD_BYTES, digest, files, same, targets, write

ROOT = Path(__file__).parents[2]


def started(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.data.target_work", str(folder), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def test_no_segment_is_written_twice(tmp_path) -> None:
    with TargetWriter(tmp_path, HEADER, shard_bytes=SHARD_BYTES) as writer:
        assert [
            *writer.add([digest(i // 2) for i in range(50)], [targets(i // 2) for i in range(50)]).tolist(),
            *(writer.add([digest(i)], [targets(i)])[0] for i in range(30)),
        ] == [True, False] * 25 + [False] * 25 + [True] * 5
    with TargetWriter(tmp_path, HEADER, 1, 2, SHARD_BYTES) as writer:
        assert writer.done([digest(29), digest(30)]).tolist() == [True, False]
        assert not writer.add([digest(29)], [targets(29)])[0]
    assert describe(tmp_path)["segments"] == 30 and describe(tmp_path)["repeated segments"] == 0


def test_an_error_drops_the_shard_that_was_begun(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), TargetWriter(tmp_path, HEADER) as writer:
        writer.add([digest(0)], [targets(0)])
        writer.finish_shard()
        writer.add([digest(1)], [targets(1)])
        _ = 1 / 0
    assert sorted(files(tmp_path)) == ["000000.array_record", "000000.index", "header.json"]
    assert describe(tmp_path)["segments"] == 1


def test_what_segments_took_is_kept_with_those_that_were_not_there(tmp_path) -> None:
    ten, more = ([digest(i) for i in some] for some in (range(10), range(5, 15)))
    with TargetWriter(tmp_path, HEADER, shard_bytes=1000) as writer:
        writer.add(ten + ten, [targets(i) for i in [*range(10), *range(10)]], 3.0)
        writer.finish_shard()
        writer.add(more, [targets(i) for i in range(5, 15)], 2.0)
        writer.add(ten, [targets(i) for i in range(10)], 100.0)  # for nothing
    assert describe(tmp_path)["device seconds"] == 5 and len(list(tmp_path.glob("0*.json"))) > 2
    with TargetWriter(tmp_path, HEADER, 1, 2) as writer:
        writer.add([digest(20)], [targets(20)])  # of unknown cost
    facts = describe(tmp_path)
    assert facts["device seconds"] == 5 and facts["tokens of known cost"] == facts["tokens"] - targets(20).tokens


def test_writers_killed_before_any_step_leave_the_same_bytes_in_the_end(whole, tmp_path) -> None:
    kills = int(finished(started(tmp_path / "killed", "kills")))
    assert kills > 20
    assert files(tmp_path / "killed") == files(whole)


def test_shards_grow_with_what_the_part_has_and_are_the_same_after_kills(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(target_writer, "SHARE", 4)
    monkeypatch.setattr(target_writer, "LARGEST_SHARD", 2500)
    with TargetWriter(tmp_path / "other part", HEADER, 1, 2, 1000) as writer:
        writer.add([digest(1000 + i) for i in range(200)], [targets(1000 + i) for i in range(200)])
    for name in ("whole", "killed"):
        shutil.copytree(tmp_path / "other part", tmp_path / name)

    def write_all(folder: Path, killed_after: int = SEGMENTS + 1) -> None:
        with TargetWriter(folder, HEADER, 0, 2, 1000) as writer:
            for i in range(SEGMENTS):
                killed_after -= writer.add([digest(i)], [targets(i)])[0]
                if not killed_after:
                    raise KeyboardInterrupt

    write_all(tmp_path / "whole")
    for killed_after in (3, 20, 7, 33, 30):
        with pytest.raises(KeyboardInterrupt):
            write_all(tmp_path / "killed", killed_after)
    write_all(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    indexes = [ShardIndex.open(path) for path in sorted((tmp_path / "whole").glob("*[02468].index"))]
    sizes = np.array([index.facts.record_bytes for index in indexes])
    allowed = np.clip((np.cumsum(sizes) - sizes) // 4, 1000, 2500)
    assert (sizes <= allowed).all() and (sizes[:-1] > allowed[:-1] - 1000).all() and max(allowed) == 2500


def test_several_writers_killed_at_any_moment_lose_and_double_nothing(tmp_path) -> None:
    rng, killed = np.random.default_rng(5), 0
    for processes in (3, 2, 3):
        running = [started(tmp_path, i, processes, 0.1) for i in range(processes)]
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.array_record")) and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in running:
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        for process in running:
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
    assert killed  # but for those that were done
    for process in [started(tmp_path, i, 2, 0) for i in range(2)]:
        finished(process)
    with TargetCache(tmp_path) as cache:
        assert all(same(found, i) for i, found in enumerate(cache.get(DIGESTS)))
    facts = describe(tmp_path)
    assert facts["segments"] == SEGMENTS and facts["repeated segments"] == 0 and facts["unfinished shards"] == 0
    assert (facts["device seconds"], facts["tokens of known cost"]) == (SEGMENTS * SECONDS, facts["tokens"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".array_record", ".index"}


def test_leftovers_are_removed_by_the_process_that_has_their_number(tmp_path) -> None:
    header = Path(shutil.copy2(_header_of(tmp_path / "other"), tmp_path))
    for number in (0, 1, 2, 3):
        (tmp_path / f"{number:06d}.array_record").write_bytes(b"half")
        for name in (f".{number:06d}.index", f".{number:06d}.json", f"{number:06d}.json"):
            (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".header.json.123.abc").write_bytes(b"{")
    shutil.rmtree(tmp_path / "other")
    with TargetWriter(tmp_path, HEADER, 1, 2):
        assert sorted(files(tmp_path)) == [
            *(".000000.index", ".000000.json", ".000002.index", ".000002.json"),
            *("000000.array_record", "000000.json", "000002.array_record", "000002.json", header.name),
        ]
    with TargetWriter(tmp_path, HEADER, 0, 2):
        assert sorted(files(tmp_path)) == [header.name]


def _header_of(folder: Path) -> Path:
    with TargetWriter(folder, HEADER):
        return folder / "header.json"


def test_each_process_has_its_own_numbers_of_shards(tmp_path) -> None:
    for process in (1, 1, 0):
        with TargetWriter(tmp_path, HEADER, process, 3) as writer:
            for i in range(2):
                each = process * 10 + writer.found.records + i
                writer.add([digest(each)], [targets(each)])
                writer.finish_shard()
    assert sorted(path.stem for path in tmp_path.glob("*.index")) == [
        "000000",
        "000001",
        "000003",
        *("000004", "000007", "000010"),
    ]


def test_two_processes_with_one_number_are_refused(tmp_path) -> None:
    with TargetWriter(tmp_path, HEADER) as writer:
        writer.add([digest(0)], [targets(0)])
        with pytest.raises(UserError, match=r"000000\.array_record: is being written by another process"):
            TargetWriter(tmp_path, HEADER)
        with TargetWriter(tmp_path, HEADER, 1, 2) as other:
            other.add([digest(1)], [targets(1)])
    assert describe(tmp_path)["segments"] == 2
    with pytest.raises(ValueError, match="process 2 of 2"):
        TargetWriter(tmp_path, HEADER, 2, 2)


MOVED = dataclasses.replace(HEADER, teacher={"digest": "abc", "name": "moved"})


def test_parts_and_later_starts_may_find_the_teacher_under_another_path(tmp_path) -> None:
    for process, header in ((0, HEADER), (1, MOVED), (0, MOVED)):
        with TargetWriter(tmp_path, header, process, 2) as writer:
            assert writer.found.records == len(list(tmp_path.glob("*.index")))
            writer.add([digest(writer.found.records)], [targets(writer.found.records)])
    assert Header.read(tmp_path) == HEADER != MOVED
    with TargetCache(tmp_path, teacher=MOVED.teacher) as cache:
        assert all(same(found, i) for i, found in enumerate(cache.get(DIGESTS[:3])))


@pytest.mark.parametrize(
    "faster, refused",
    [(HEADER, False), (MOVED, False), (Header({"name": "other"}, "tokens", 1000, draws=4), True)],
)
def test_the_header_of_the_first_process_stands(tmp_path, monkeypatch, faster, refused) -> None:
    link = os.link

    def link_later(source: Path, path: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        faster.write(tmp_path)
        link(source, path)

    monkeypatch.setattr(os, "link", link_later)
    if refused:
        with pytest.raises(UserError, match=r"header\.json: teacher: found \{'name': 'other'\}, expected"):
            TargetWriter(tmp_path, HEADER)
    else:
        TargetWriter(tmp_path, HEADER)
    assert list(files(tmp_path)) == ["header.json"] and Header.read(tmp_path) == faster


def test_a_folder_without_links_gets_its_header_all_the_same(tmp_path, monkeypatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    TargetWriter(tmp_path, HEADER)
    assert list(files(tmp_path)) == ["header.json"] and Header.read(tmp_path) == HEADER


@pytest.mark.parametrize(
    "name, value",
    [
        ("teacher", {"name": "teacher", "digest": "abd"}),
        ("tokenizer", "others"),
        ("vocab_size", 1001),
        ("preprocessing", {"tile_size": 48}),
        ("draws", 5),
        ("temperature", 1.5),
        ("proposal", 2.0),
    ],
)
def test_a_cache_is_not_gone_on_with_for_something_else(cache, name, value) -> None:
    other = Header(**{field: getattr(HEADER, field) for field in HEADER.__dataclass_fields__} | {name: value})
    assert other.digest != HEADER.digest
    with pytest.raises(UserError, match=rf"header\.json: {name}: found .*, expected .*: give another folder"):
        TargetWriter(cache, other)
    if name in ("draws", "temperature", "proposal"):
        assert other.recipe != HEADER.recipe and other.segment_recipe == HEADER.segment_recipe
    if name in ("tokenizer", "preprocessing"):
        assert other.recipe == HEADER.recipe and other.segment_recipe != HEADER.segment_recipe


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"{tmp_path}/file/cache: cannot be written"):
        TargetWriter(tmp_path / "file" / "cache", HEADER)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with TargetWriter(tmp_path / "full", HEADER) as writer:
        writer.add([digest(0)], [targets(0)])
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(UserError, match=r"full: cannot be written \(No space left on device\)\. Make room"):
                writer.finish_shard()
    assert describe(tmp_path / "full")["segments"] == 1
    with pytest.raises(UserError, match="cannot be written"), TargetWriter(tmp_path / "full", HEADER) as writer:
        writer.add([digest(1)], [targets(1)])
        monkeypatch.setattr(target_index, "sync_folder", full)  # when the index is there already
        writer.finish_shard()
    assert describe(tmp_path / "full")["segments"] == 2


def test_a_disk_that_is_full_is_told_of(tmp_path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(.*File too large"):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(files(tmp_path)) == ["header.json"]
    write(tmp_path)
    assert describe(tmp_path)["segments"] == SEGMENTS
