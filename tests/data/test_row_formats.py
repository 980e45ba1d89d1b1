"""JSONL and Parquet files give the documents of their rows, and say what of them they could not read."""

import gzip
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data import formats, groups
from data.documents import Document, Rejected
from tests.data.read_sources import MOST, found, lines, refused, tar, text_of, texts, tree

# JSONL


def read_slowly(content: bytes, most: int) -> list[tuple[str, str]]:
    """(where, text or rule) of each line: all at once, line by line."""
    records = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if len(line) > most:
            text = "[too large]"
        elif not line.removeprefix(b"\xef\xbb\xbf").strip():
            continue
        else:
            try:
                text = json.loads(line.decode("utf-8-sig"))["text"]
            except ValueError as error:
                text = "[utf-8]" if isinstance(error, UnicodeDecodeError) else "[json]"
        records.append((f"file.jsonl:{number}", text))
    return records


LINE = st.sampled_from([b"", b" \t", b"\xef\xbb\xbf", b"\xff", b"{", b'{"text":"a"}', b'\xef\xbb\xbf{"text":"b"}']) | (
    st.text("ab\u2028é", min_size=1, max_size=30).map(
        lambda text: json.dumps({"text": f"x{text}"}, ensure_ascii=False).encode()
    )
)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    LINE,
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 60),
)
@example([(b'{"text":"a"}', b"\n")] * 4, b"", 13, 13, 50)
@example([(b'{"text":"a"}', b"\n")] * 4, b'{"text":"a"}', 1, 1, 5)
def test_jsonl_is_read_the_same_whatever_it_is_cut_into(tmp_path_factory, head, last, unit, block, most):
    content = b"".join(line + end for line, end in head) + last
    path = tmp_path_factory.mktemp("jsonl") / "file.jsonl"
    path.write_bytes(content)
    packed = path.with_name("file.jsonl.gz")
    packed.write_bytes(gzip.compress(content))
    expected = read_slowly(content, most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "UNIT_BYTES", unit)
        patch.setattr(formats, "_BLOCK", block)
        units = formats.plan([path])
        records = found(path, most=most)
        of_packed = found(packed, most=most)
    assert [(record.where, text_of(record)) for record in records] == expected
    assert [text_of(record) for record in of_packed] == [text for _, text in expected]
    assert [unit.start for unit in units[1:]] == [unit.stop for unit in units[:-1]]
    assert sum(unit.nbytes for unit in units) == len(content)


def test_ids_are_file_and_line_where_none_are_given(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines({"text": "a"}, {"text": "b", "id": "own"}))
    ids = [record.document.id for record in found(tmp_path / "a.jsonl") if isinstance(record.document, Document)]
    assert ids == ["a.jsonl:2", "own"]
    assert [record.where for record in found(tmp_path)] == [f"{tmp_path.name}/a.jsonl:2", f"{tmp_path.name}/a.jsonl:3"]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1e", b'"\\', b"nul", b'{"text": 1}}', b"9" * 10_000])
def test_what_is_no_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert refused(found(tmp_path / "a.jsonl"), "json").startswith("the line: found no JSON")


def test_endings_of_packed_files_may_be_in_capitals(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(lines({"text": "a"}, {"text": "b"})))
    assert texts(found(tmp_path)) == ["a", "b"]


@given(st.integers(0, 400))
def test_a_packed_file_cut_anywhere_gives_whole_lines_and_says_so(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("gz") / "a.jsonl.gz"
    whole = gzip.compress(lines(*({"text": os.urandom(20).hex()} for _ in range(20))))
    path.write_bytes(whole)
    expected = texts(found(path))
    path.write_bytes(whole[: -1 - cut])
    *good, last = texts(found(path))
    assert last == "[damaged]" and good == expected[: len(good)]


def test_what_grows_out_of_proportion_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "_BOMB_BYTES", 30 * 10**6)
    monkeypatch.setattr(formats, "_BLOCK", 10**6)
    bomb = gzip.compress(bytes(100 * 10**6), 9)
    (tmp_path / "a.jsonl.gz").write_bytes(bomb)
    (tmp_path / "a.tar.gz").write_bytes(bomb)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(tar(("a.txt", bytes(100 * 10**6))), 9))
    for name in ("a.jsonl.gz", "a.tar.gz", "b.tar.gz"):
        tracemalloc.start()
        began = time.monotonic()
        reason = refused(found(tmp_path / name), "damaged")
        assert "holds more than 30,000,000 bytes" in reason and time.monotonic() - began < 5
        assert tracemalloc.get_traced_memory()[1] < 20 * 10**6
        tracemalloc.stop()


# Parquet


def table(path: Path, columns: dict[str, Any], rows: int = 3, **types: Any) -> Path:
    schema = [types.get(name) for name in columns]
    arrays = [pa.array(column, kind) for column, kind in zip(columns.values(), schema, strict=True)]
    table = pa.Table.from_arrays(arrays, list(columns))
    parquet.write_table(table, path, row_group_size=rows, write_page_checksum=True)
    return path


def test_rows_are_numbered_through_all_row_groups(tmp_path):
    path = table(tmp_path / "a.parquet", {"text": [str(i) for i in range(50)]}, rows=7)
    assert len(formats.plan([path])) == 8
    records = found(path)
    assert texts(records) == [str(i) for i in range(50)]
    assert [record.where for record in records] == [f"a.parquet:{i + 1}" for i in range(50)]


def test_pictures_are_read_as_hugging_face_writes_them(tmp_path):
    (tmp_path / "here.png").write_bytes(b"on disk")
    images = [{"bytes": b"inside", "path": "x.png"}, {"bytes": None, "path": "here.png"}, None]
    path = table(tmp_path / "a.parquet", {"image": images, "text": ["a", "b", "c"], "label": [1, 2, 3]})
    records = found(path)
    assert texts(records) == ["inside+a", "on disk+b", "c"]
    assert isinstance(records[0].document, Document) and records[0].document.metadata == {"label": 1}


def test_parts_and_messages_may_be_lists_of_structs(tmp_path):
    parts = [[{"type": "image", "data": b"\xff\xd8", "text": None}, {"type": "text", "data": None, "text": "a"}]]
    turns = [{"role": "user", "content": "b", "tool_calls": None}, {"role": "assistant", "content": "c"}]
    [first, second] = found(
        table(tmp_path / "a.parquet", {"parts": parts}), table(tmp_path / "b.parquet", {"messages": [turns]})
    )
    assert isinstance(first.document, Document) and first.document.parts[0].data == b"\xff\xd8"
    assert text_of(second) == "b+c"


def test_cells_that_cannot_be_read_are_refused_one_by_one(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe", b"good", b"x" * 2000])
    dates = pa.array([0, 0, 2**62, 0], pa.timestamp("us"))
    no_text = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2])
    parquet.write_table(pa.table({"text": no_text, "at": dates}), tmp_path / "a.parquet")
    assert texts(found(tmp_path / "a.parquet", most=1000)) == ["good", "[utf-8]", "[schema]", "[too large]"]


def test_a_value_that_is_repeated_is_held_once(tmp_path):
    path = table(tmp_path / "a.parquet", {"text": ["x" * 500_000] * 100}, rows=100)
    assert path.stat().st_size < MOST
    before = pa.total_allocated_bytes()
    for record in formats.read(formats.plan([path])[0], MOST):
        assert len(text_of(record)) == 500_000 and pa.total_allocated_bytes() - before < 5 * MOST


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 10, b"no table"])
def test_what_is_no_table_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    assert "the file cannot be read" in refused(found(tmp_path / "a.parquet"), "damaged")


def test_a_damaged_table_gives_no_other_rows(tmp_path):
    whole = table(tmp_path / "whole.parquet", {"text": [os.urandom(300).hex() for _ in range(20)]}, rows=10)
    content = whole.read_bytes()
    for left in (-1, -8, -200, len(content) // 2):
        assert texts(found(tree(tmp_path, {"cut.parquet": content[:left]}) / "cut.parquet")) == ["[damaged]"]
    for at in (50, len(content) // 2 + 100):  # in the first row group, in the second
        holed = tree(tmp_path, {"hole.parquet": content[:at] + b"!" + content[at + 1 :]}) / "hole.parquet"
        records = found(holed)
        lost = [record for record in records if isinstance(record.document, Rejected)]
        assert [record.records for record in lost] == [10] and sum(record.records for record in records) == 20
        first = 1 if at == 50 else 11
        assert lost[0].where == f"hole.parquet:{first}"
        assert f"rows {first} to {first + 9}, the rest of the row group" in refused(lost, "damaged")


def test_how_much_of_a_file_was_read_grows_to_all_of_it(tmp_path):
    records = [{"text": os.urandom(20_000).hex()} for _ in range(40)]
    table(tmp_path / "a.parquet", {"text": [record["text"] for record in records]}, rows=40)
    members = tar(*((f"{i}.txt", record["text"].encode()) for i, record in enumerate(records)))
    files = {"a.jsonl": lines(*records), "b.jsonl.gz": gzip.compress(lines(*records)), "c.tar": members}
    tree(tmp_path, files | {"d.tgz": gzip.compress(members)})
    tree(tmp_path / "e", {f"{i}.txt": record["text"].encode() for i, record in enumerate(records)})
    for name in ("a.parquet", *files, "d.tgz", "e"):
        shares = [record.share for record in found(tmp_path / name)]
        assert len(shares) == 40 and shares == sorted(shares) and 0 < shares[0] < 0.5 < shares[-1] <= 1, name
        assert 0.3 < shares[19] < 0.7, name
