"""A cache of targets: found by digest, whole after any kill, and refused with the reason where it is not what was expected."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from data import target_cache, target_index
from data.target_cache import Header, TargetCache, describe
from data.target_index import ShardIndex
from data.target_records import Targets
from data.target_writer import TargetWriter
from sharding.errors import UserError
from tests.data.target_work import DIGESTS, HEADER, SEGMENTS, SHARD_BYTES, digest, same, targets, write

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def started(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.data.target_work", str(folder), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A cache that was written without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder)
    return folder


@pytest.fixture
def cache(whole, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def test_what_was_written_is_found_by_its_digest_in_any_order(whole) -> None:
    order = np.random.default_rng(0).integers(0, SEGMENTS, 300).tolist()
    with TargetCache(whole) as cache:
        for found, i in zip(cache.get([DIGESTS[i] for i in order]), order, strict=True):
            assert same(found, i) and not same(found, (i + 1) % SEGMENTS)
        assert cache.counts == {"found": 300, "missing": 0, "damaged": 0}
        assert cache.get([]) == []
        again = pickle.loads(pickle.dumps(cache))
    assert same(again.get([DIGESTS[3]])[0], 3)
    again.close()


def test_no_more_shards_are_open_than_may_be(whole, monkeypatch) -> None:
    monkeypatch.setattr(target_cache, "OPEN_SHARDS", 2)
    with TargetCache(whole) as cache:
        for i in np.random.default_rng(0).integers(0, SEGMENTS, 30).tolist():
            assert same(cache.get([DIGESTS[i]])[0], i)
            assert len(cache._readers) <= 2


def test_digests_that_begin_alike_are_told_apart(tmp_path) -> None:
    digests = [b"8 bytes." + i.to_bytes(8, "big") for i in (5, 3, 9, 2**63)]
    with TargetWriter(tmp_path, HEADER) as writer:
        for i, each in enumerate(digests):
            assert writer.add([each], [targets(i)])[0]
        writer.add([b"8 bytes/" + bytes(8)], [targets(4)])
    with TargetCache(tmp_path, "hard") as cache:
        others = [b"8 bytes." + i.to_bytes(8, "big") for i in (0, 4, 10, 2**64 - 1)] + [bytes(16), bytes([255] * 16)]
        assert all(same(found, i) for i, found in enumerate(cache.get(digests)))
        assert cache.get(others) == [None] * 6


def test_shards_are_as_large_as_they_may_be_and_their_indexes_sorted(whole) -> None:
    indexes = [ShardIndex.open(path) for path in sorted(whole.glob("*.index"))]
    sizes = [index.facts.record_bytes for index in indexes]
    assert len(sizes) > 4 and max(sizes) <= SHARD_BYTES and min(sizes[:-1]) > SHARD_BYTES / 2
    for index in indexes:
        assert (np.diff(index.high.astype(object)) > 0).all()
        assert sorted(index.places.tolist()) == list(range(index.facts.records))
    assert sum(index.facts.records for index in indexes) == SEGMENTS


def test_header_and_index_are_what_the_page_on_the_format_says(whole) -> None:
    fields = json.loads((whole / "header.json").read_text())
    format_, checksum = fields.pop("format"), fields.pop("checksum")
    plain = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    assert format_ == 1 and checksum == hashlib.blake2b(plain, digest_size=16).hexdigest()
    data, shard = (whole / "000001.index").read_bytes(), whole / "000001.array_record"
    magic, cache, R, tokens, _, _, _, size, of_arrays, of_head = struct.unpack_from("<8s16s6QII", data)
    assert magic == b"targets1" and cache.hex() == checksum and size == shard.stat().st_size
    assert of_head == zlib.crc32(data[:76]) and of_arrays == zlib.crc32(data[80:]) and len(data) == 80 + 24 * R
    arrays = struct.unpack_from(f"<{2 * R}Q{2 * R}I", data, 80)
    high, low, places, lengths = (arrays[i * R : (i + 1) * R] for i in range(4))
    reader = ArrayRecordReader(str(shard))
    for i in range(R):
        digest = struct.pack(">QQ", high[i], low[i])
        assert reader.read([places[i]])[0][4:20] == digest
        assert lengths[i] == targets(DIGESTS.index(digest)).tokens
    assert tokens == sum(lengths) and sorted(high) == list(high)
    reader.close()


def test_progress_and_description_count_what_is_there(whole, tmp_path) -> None:
    tokens = sum(targets(i).tokens for i in range(SEGMENTS))
    ids = sum(len(targets(i).ids) for i in range(SEGMENTS))
    facts = describe(whole)
    assert facts["segments"] == SEGMENTS and facts["tokens"] == tokens and facts["repeated segments"] == 0
    assert facts["ids of a token"] == round(ids / tokens, 2)
    assert facts["bytes of files"] == sum(len(data) for name, data in files(whole).items() if name != "header.json")
    assert facts["shards"] == len(list(whole.glob("*.index"))) and facts["unfinished shards"] == 0
    assert facts["recipe"] == {"draws": 4, "top_k": 0, "temperature": 1.0, "proposal": 1.0}
    with TargetWriter(tmp_path, HEADER) as writer:
        for i in range(5):
            writer.add([digest(i)], [targets(i)])
        writer.finish_shard()
        assert describe(tmp_path)["segments"] == 5
    with TargetWriter(tmp_path, HEADER) as writer:
        writer.add([digest(5)], [targets(5)])
        assert describe(tmp_path)["unfinished shards"] == 1
        assert (writer.found.records, writer.written.records, writer.progress().records) == (5, 1, 6)
        assert writer.progress().tokens == sum(targets(i).tokens for i in range(6))
        assert writer.found.bytes_per_token == describe(tmp_path)["bytes of records"] / writer.found.tokens


def test_an_empty_cache_is_described(tmp_path) -> None:
    with TargetWriter(tmp_path, HEADER):
        pass
    assert describe(tmp_path)["segments"] == 0
    with TargetCache(tmp_path, "hard") as cache:
        assert cache.get([digest(0)]) == [None]


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


def test_the_weights_of_top_k_and_of_a_proposal_are_kept(tmp_path) -> None:
    ids = np.array([[4, 2], [1, 9]])
    for name, header in (
        ("top", Header({}, "t", 10, top_k=2)),
        ("proposal", Header({}, "t", 10, draws=2, proposal=2.0)),
    ):
        given = Targets.of(ids, np.ones((2, 2)), ids / 8, *np.zeros((3, 2)))
        with TargetWriter(tmp_path / name, header) as writer:
            writer.add([digest(0)], [given])
        with TargetCache(tmp_path / name) as cache:
            [found] = cache.get([digest(0)])
        assert found is not None and found.weights is not None and found.weights.tolist() == [0.25, 0.5, 0.125, 1.125]


def test_an_error_drops_the_shard_that_was_begun(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), TargetWriter(tmp_path, HEADER) as writer:
        writer.add([digest(0)], [targets(0)])
        writer.finish_shard()
        writer.add([digest(1)], [targets(1)])
        _ = 1 / 0
    assert sorted(files(tmp_path)) == ["000000.array_record", "000000.index", "header.json"]
    assert describe(tmp_path)["segments"] == 1


def test_writers_killed_before_any_step_leave_the_same_bytes_in_the_end(whole, tmp_path) -> None:
    kills = int(finished(started(tmp_path / "killed", "kills")))
    assert kills > 20
    assert files(tmp_path / "killed") == files(whole)


def test_several_writers_killed_at_any_moment_lose_and_double_nothing(tmp_path) -> None:
    rng = np.random.default_rng(5)
    for processes in (3, 2, 3):
        running = [started(tmp_path, i, processes, 0.02) for i in range(processes)]
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*.array_record")) and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in running:
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        assert any(process.wait() == -signal.SIGKILL for process in running)
        for process in running:
            process.communicate()
    for process in [started(tmp_path, i, 2, 0) for i in range(2)]:
        finished(process)
    with TargetCache(tmp_path) as cache:
        assert all(same(found, i) for i, found in enumerate(cache.get(DIGESTS)))
    facts = describe(tmp_path)
    assert facts["segments"] == SEGMENTS and facts["repeated segments"] == 0 and facts["unfinished shards"] == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".array_record", ".index"}


def test_leftovers_are_removed_by_the_process_that_has_their_number(tmp_path) -> None:
    header = Path(shutil.copy2(_header_of(tmp_path / "other"), tmp_path))
    for number in (0, 1, 2, 3):
        (tmp_path / f"{number:06d}.array_record").write_bytes(b"half")
        (tmp_path / f".{number:06d}.index").write_bytes(b"half")
    (tmp_path / ".header.json.123.abc").write_bytes(b"{")
    shutil.rmtree(tmp_path / "other")
    with TargetWriter(tmp_path, HEADER, 1, 2):
        assert sorted(files(tmp_path)) == [
            *(".000000.index", ".000002.index", "000000.array_record", "000002.array_record", header.name)
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


@pytest.mark.parametrize(
    "faster, refused", [(HEADER, False), (Header({"name": "other"}, "tokens", 1000, draws=4), True)]
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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokenizer": "others"}, r"header\.json: tokenizer: found tokens, expected others"),
        (
            {"teacher": {"name": "other", "digest": "abd"}},
            r"header\.json: teacher: found teacher \(abc\), expected other \(abd\), which is distill\.teacher",
        ),
        ({"preprocessing": {"tile_size": 48}}, r"header\.json: preprocessing: found .*32.*, expected .*48"),
        (
            {"vocab_size": 273},
            r"000000\.array_record: holds id 273, expected ids below the student's vocab_size of 273",
        ),
    ],
)
def test_a_cache_of_another_teacher_or_for_another_student_is_refused(whole, options: Any, message) -> None:
    with pytest.raises(UserError, match=message):
        TargetCache(whole, "hard", **options)


def test_a_cache_that_is_as_expected_is_read(whole) -> None:
    expected: Any = {
        "teacher": {"name": "moved", "digest": "abc"},
        "preprocessing": {"tile_size": 32},
        "vocab_size": 274,
    }
    TargetCache(whole, tokenizer="tokens", **expected).close()


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "header.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_header_that_is_missing_damaged_or_newer_is_refused(cache, tmp_path) -> None:
    for missing in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=rf"{missing}: found no header\.json, expected a cache"):
            TargetCache(missing)
    text = (cache / "header.json").read_text()
    for wrong in (
        text[:50],
        "[]",
        "{}",
        "7",
        text.replace('"draws": 4', '"draws": 3'),
        "\0",
        text.replace(": 1000", ': "x"'),
    ):
        (cache / "header.json").write_text(wrong)
        for use in (TargetCache, describe, lambda folder: TargetWriter(folder, HEADER)):
            with pytest.raises(UserError, match=r"header\.json: cannot be read"):
                use(cache)
    (cache / "header.json").write_text(text)
    edited(cache, format=2, shape="new")
    with pytest.raises(UserError, match=r"header\.json: found format 2, expected at most 1\. Use a newer Drover"):
        TargetCache(cache)
    edited(cache, format=1)
    with pytest.raises(UserError, match=r"header\.json: cannot be read .*shape"):
        TargetCache(cache)


def test_a_shard_that_is_missing_or_truncated_is_named(cache) -> None:
    shard = cache / "000002.array_record"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    for use in (TargetCache, describe, lambda folder: TargetWriter(folder, HEADER)):
        with pytest.raises(UserError, match=r"000002\.array_record: found 131,071 bytes, expected 131,072\. Copy it"):
            use(cache)
    shard.unlink()
    with pytest.raises(UserError, match=r"000002\.array_record: is missing"):
        TargetCache(cache, "hard")


def damaged(data: bytes, seed: int) -> Iterator[bytes]:
    rng = np.random.default_rng(seed)
    for size in (0, 1, 7, 79, 80, len(data) - 1):
        yield data[:size]
    yield data + b"\0"
    for at in [*range(88), *rng.integers(88, len(data), 40)]:
        changed = bytearray(data)
        changed[at] ^= 1 << rng.integers(8)
        yield bytes(changed)


def test_an_index_that_is_damaged_or_of_another_cache_is_named(cache, tmp_path) -> None:
    path = cache / "000001.index"
    data = path.read_bytes()
    for wrong in damaged(data, 1):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"000001\.index: is damaged"):
            TargetCache(cache, "hard")
    path.write_bytes(data)
    with TargetWriter(tmp_path / "other", Header({"name": "other"}, "tokens", 1000, draws=4)) as writer:
        writer.add([digest(0)], [targets(0)])
    for name in ("000000.index", "000000.array_record"):
        shutil.copy2(tmp_path / "other" / name, cache)
    with pytest.raises(UserError, match=r"000000\.index: is of another cache"):
        TargetCache(cache, "hard")


def test_an_index_that_is_not_verified_leads_to_no_wrong_targets(cache) -> None:
    """A flipped place or digest ends at a record that says whose it is."""
    path = cache / "000001.index"
    data = path.read_bytes()
    for wrong in list(damaged(data, 2))[7 + 88 :]:
        path.write_bytes(wrong)
        with TargetCache(cache, "hard", verify=False) as reader:
            found = reader.get(DIGESTS)
            assert all(each is None or same(each, i) for i, each in enumerate(found))
            assert sum(each is None for each in found) == reader.counts["missing"] + reader.counts["damaged"] <= 13


def test_a_record_of_another_segment_is_not_taken_for_the_one_asked_for(cache) -> None:
    path = cache / "000001.index"
    data, index = path.read_bytes(), ShardIndex.open(path)
    at, R = 80 + 16 * index.facts.records, index.facts.records
    path.write_bytes(data[:at] + index.places[::-1].tobytes() + data[at + 4 * R :])
    with TargetCache(cache, "hard", verify=False) as reader:
        found = reader.get(DIGESTS)
        assert reader.counts["damaged"] == R - R % 2
        assert all(each is None or same(each, i) for i, each in enumerate(found))
        assert "found the record of segment" in reader.notes[0]


def test_damaged_records_are_named_and_the_others_still_come(cache) -> None:
    shard = cache / "000001.array_record"
    data = shard.read_bytes()
    with TargetCache(cache) as reader:
        shards, places = reader._find(DIGESTS)
    in_shard = [i for i in range(SEGMENTS) if shards[i] == 1]
    victim = in_shard[5]
    at = data.index(DIGESTS[victim]) + 40
    shard.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    with TargetCache(cache, "hard") as reader:
        found = reader.get(DIGESTS)
        assert [i for i in range(SEGMENTS) if found[i] is None] == [victim]
        assert all(same(each, i) for i, each in enumerate(found) if i != victim)
        assert reader.counts == {"found": SEGMENTS - 1, "missing": 0, "damaged": 1}
        [note] = reader.notes
        assert f"000001.array_record: record {places[victim]} is damaged" in note
    with TargetCache(cache) as reader:
        assert same(reader.get([DIGESTS[in_shard[4]]])[0], in_shard[4])
        with pytest.raises(UserError, match=rf"000001\.array_record: record {places[victim]} is damaged"):
            reader.get(DIGESTS)


def test_a_shard_with_any_bytes_changed_gives_what_it_has_or_says_so(cache) -> None:
    shard = cache / "000001.array_record"
    data = shard.read_bytes()
    rng = np.random.default_rng(3)
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    harmed = 0
    for trial in range(60):
        changed = bytearray(data)
        for at in rng.choice(used, 3) if trial else [0]:
            changed[at] ^= 1 << rng.integers(8)
        shard.write_bytes(changed)
        with TargetCache(cache, "hard") as reader:
            found = reader.get(DIGESTS)
            assert all(each is None or same(each, i) for i, each in enumerate(found))
            harmed += reader.counts["damaged"] > 0
            assert sum(each is None for each in found) == reader.counts["damaged"] <= 20
    assert harmed > 20


def test_a_record_whose_bytes_are_right_for_the_file_but_not_for_the_cache_is_refused(cache, monkeypatch) -> None:
    with TargetCache(cache, "hard") as reader:
        monkeypatch.setattr(reader, "_read", lambda shard, places: [b"x" * 50 for _ in places])
        assert reader.get([DIGESTS[0]]) == [None]
        assert "record 0 is damaged (the checksum does not fit the bytes)" in reader.notes[0]


def test_missing_segments_fail_with_their_number_or_are_counted(whole) -> None:
    asked = [DIGESTS[0], digest(1000), DIGESTS[1], digest(1001)]
    with TargetCache(whole) as cache:
        expected = rf"{whole}: has no targets for segment {digest(1000).hex()}, and 2 of 4 asked for"
        with pytest.raises(UserError, match=expected):
            cache.get(asked)
    with TargetCache(whole, "hard") as cache:
        for _ in range(2):
            found = cache.get(asked)
            assert found[1] is None and found[3] is None and same(found[0], 0) and same(found[2], 1)
        assert cache.counts == {"found": 4, "missing": 4, "damaged": 0}


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
