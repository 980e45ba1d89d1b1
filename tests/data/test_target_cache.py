"""A cache of targets: found by digest, and refused with the reason where it is not what was expected."""

import hashlib
import json
import re
import shutil
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from data import target_cache
from data.target_cache import NOTES, Header, Lack, TargetCache, describe
from data.target_index import ShardIndex
from data.target_records import Targets
from data.target_writer import TargetWriter
from launch.cli import main
from sharding.errors import UserError
from tests.data.target_work import DIGESTS, HEADER, SECONDS, SEGMENTS, SHARD_BYTES, digest, files, same, targets


def test_what_was_written_is_found_by_its_digest_in_any_order(whole) -> None:
    order = np.random.default_rng(0).integers(0, SEGMENTS, 300).tolist()
    with TargetCache(whole) as cache:
        for found, i in zip(cache.get([DIGESTS[i] for i in order]), order, strict=True):
            assert same(found, i) and not same(found, (i + 1) % SEGMENTS)
        assert cache.get([]) == []


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
        assert cache.get(others) == [Lack.MISSING] * 6


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
    assert facts["bytes of files"] == sum(len(data) for name, data in files(whole).items() if ".json" not in name)
    assert (facts["device seconds"], facts["tokens of known cost"]) == (SEGMENTS * SECONDS, tokens)
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
        assert (writer.found.records, writer.written.records) == (5, 1)
        assert writer.found.tokens + writer.written.tokens == sum(targets(i).tokens for i in range(6))
        assert writer.found.bytes_per_token == describe(tmp_path)["bytes of records"] / writer.found.tokens


def test_data_inspect_prints_what_a_cache_holds(whole, capsys) -> None:
    def said(*arguments: str) -> str:
        assert main(["data", "inspect", str(whole), *arguments]) == (2 if "--config" in arguments else 0)
        return "".join(capsys.readouterr())

    assert json.loads(said("--json")) == describe(whole)
    text = said()
    assert text.startswith(f"{whole}\n") and re.search(rf"segments +{SEGMENTS}\n +repeated segments +0\n", text)
    assert re.search(r"teacher\n +name +teacher\n +digest +abc\n", text)
    assert re.search(r"recipe +draws 4  proposal 1  temperature 1  top_k 0\n", text)
    assert "--config: found with" in said("--config", "configs/tiny.py")


def test_the_cost_is_that_of_the_shards_that_tell_it(cache) -> None:
    with TargetCache(cache) as reader:
        assert reader.cost == (SEGMENTS * SECONDS, reader.progress.tokens)
    index = ShardIndex.open(cache / "000001.index")
    (cache / "000001.json").unlink()
    with TargetCache(cache) as reader:
        assert reader.cost == (
            (SEGMENTS - index.facts.records) * SECONDS,
            reader.progress.tokens - index.facts.tokens,
        )
    for wrong in (
        "",
        "{}",
        "[]",
        '{"device_seconds": "1"}',
        '{"device_seconds": -1.0}',
        '{"device_seconds": NaN}',
        "\xff",
    ):
        (cache / "000001.json").write_text(wrong, encoding="latin-1")
        with TargetCache(cache) as reader, pytest.raises(UserError, match=r"000001\.json: is damaged .* Copy it again"):
            _ = reader.cost


def test_an_empty_cache_is_described(tmp_path) -> None:
    with TargetWriter(tmp_path, HEADER):
        pass
    assert describe(tmp_path)["segments"] == 0
    with TargetCache(tmp_path, "hard") as cache:
        assert cache.get([digest(0)]) == [Lack.MISSING]


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
        assert (
            isinstance(found, Targets)
            and found.weights is not None
            and found.weights.tolist() == [0.25, 0.5, 0.125, 1.125]
        )


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


def with_its_checksums(data: bytes) -> bytes:
    """An index whose arrays were changed, as if it had been written so."""
    head = data[:72] + zlib.crc32(data[80:]).to_bytes(4, "little")
    return head + zlib.crc32(head).to_bytes(4, "little") + data[80:]


def test_an_index_of_wrong_arrays_leads_to_no_wrong_targets(cache) -> None:
    """A flipped place or digest ends at a record that says whose it is."""
    path = cache / "000001.index"
    data = path.read_bytes()
    for wrong in list(damaged(data, 2))[7 + 88 :]:
        path.write_bytes(with_its_checksums(wrong))
        with TargetCache(cache, "hard") as reader:
            found = reader.get(DIGESTS)
            assert all(isinstance(each, Lack) or same(each, i) for i, each in enumerate(found))
            assert sum(isinstance(each, Lack) for each in found) <= 13


def test_a_record_of_another_segment_is_not_taken_for_the_one_asked_for(cache) -> None:
    path = cache / "000001.index"
    data, index = path.read_bytes(), ShardIndex.open(path)
    at, R = 80 + 16 * index.facts.records, index.facts.records
    path.write_bytes(with_its_checksums(data[:at] + index.places[::-1].tobytes() + data[at + 4 * R :]))
    with TargetCache(cache, "hard") as reader:
        found = reader.get(DIGESTS)
        assert found.count(Lack.DAMAGED) == R - R % 2
        assert all(each == Lack.DAMAGED or same(each, i) for i, each in enumerate(found))
        assert "found the record of segment" in reader.take_notes()[0]


def test_damaged_records_are_named_and_the_others_still_come(cache) -> None:
    shard = cache / "000001.array_record"
    data = shard.read_bytes()
    with TargetCache(cache) as reader:
        shards, places = reader._segments.find(DIGESTS)
    in_shard = [i for i in range(SEGMENTS) if shards[i] == 1]
    victim = in_shard[5]
    at = data.index(DIGESTS[victim]) + 40
    shard.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    with TargetCache(cache, "hard") as reader:
        found = reader.get(DIGESTS)
        assert found[victim] == Lack.DAMAGED
        assert all(same(each, i) for i, each in enumerate(found) if i != victim)
        [note] = reader.take_notes()
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
            assert all(each == Lack.DAMAGED or same(each, i) for i, each in enumerate(found))
            harmed += Lack.DAMAGED in found
            assert found.count(Lack.DAMAGED) <= 20
    assert harmed > 20


def test_a_record_whose_bytes_are_right_for_the_file_but_not_for_the_cache_is_refused(cache, monkeypatch) -> None:
    with TargetCache(cache, "hard") as reader:
        monkeypatch.setattr(reader, "_read", lambda shard, places: [b"x" * 50 for _ in places])
        assert reader.get([DIGESTS[0]]) == [Lack.DAMAGED]
        assert "record 0 is damaged (the checksum does not fit the bytes)" in reader.take_notes()[0]


def test_missing_segments_fail_with_their_number_or_are_named(whole) -> None:
    asked = [DIGESTS[0], digest(1000), DIGESTS[1], digest(1001)]
    with TargetCache(whole) as cache:
        expected = rf"{whole}: has no targets for segment {digest(1000).hex()}, and 2 of 4 asked for"
        with pytest.raises(UserError, match=expected):
            cache.get(asked)
    with TargetCache(whole, "hard") as cache:
        found = cache.get(asked)
        assert found[1] == found[3] == Lack.MISSING and same(found[0], 0) and same(found[2], 1)
        said = [f"{whole}: has no targets for segment {digest(i).hex()}" for i in range(1000, 1000 + NOTES)]
        assert cache.take_notes() == said[:2]
        cache.get([digest(i) for i in range(1002, 1100)])
        *rest, last = cache.take_notes()
        assert rest == said[2:-1] and last == f"{said[-1]}; others that are missing are counted, and not named"
        cache.get([digest(2000)])
        assert cache.take_notes() == []


def test_threads_that_share_a_cache_close_no_shard_that_another_reads(whole, monkeypatch) -> None:
    """One may be open at a time, and reading takes its time."""
    monkeypatch.setattr(target_cache, "OPEN_SHARDS", 1)
    read, closed = TargetCache._reader, []

    def slowly(self: TargetCache, shard: int) -> Any:
        reader = read(self, shard)
        time.sleep(0.001)
        closed.append(shard not in self._readers)
        return reader

    monkeypatch.setattr(TargetCache, "_reader", slowly)
    with TargetCache(whole) as cache, ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(lambda i: cache.get([DIGESTS[i]])[0], range(SEGMENTS))):
            assert same(found, i)
    assert len(closed) >= SEGMENTS and not any(closed)
    with pytest.raises(ValueError, match="the cache is closed"):
        cache.get([DIGESTS[0]])
