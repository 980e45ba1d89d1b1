"""Every format is read record by record; what is lost, cut short or forged is told of and given to nobody."""

import gzip
import io
import json
import os
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data import formats, groups
from data.documents import Document, Rejected
from data.formats import Found
from sharding.errors import UserError

MOST = 10**6


def found(*sources: Path, most: int = MOST) -> list[Found]:
    return [record for unit in formats.plan(sources) for record in formats.read(unit, most)]


def text_of(record: Found) -> str:
    """The texts and files of a document, or the rule that refused it in brackets."""
    if isinstance(record.document, Rejected):
        return f"[{record.document.rule}]"
    return "+".join(part.text or part.data.decode() for part in record.document.parts)


def texts(records: list[Found]) -> list[str]:
    return [text_of(record) for record in records]


def groups_of(records: list[Found]) -> dict[str, str]:
    return {record.document.id: text_of(record) for record in records if isinstance(record.document, Document)}


def only(records: list[Found]) -> Document:
    [record] = records
    assert isinstance(record.document, Document), record
    return record.document


def refused(records: list[Found], rule: str) -> str:
    [record] = records
    assert isinstance(record.document, Rejected) and record.document.rule == rule, record
    return record.document.reason


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


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


# Tar files


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def header(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def of_tar(tmp_path: Path, content: bytes, name: str = "a.tar") -> list[Found]:
    (tmp_path / name).write_bytes(content)
    return found(tmp_path / name)


WEBDATASET = tar(
    ("b/1.txt", b"one"), ("b/1.jpg", b"picture"), ("b/1.json", b'{"id": "x", "url": "u"}'), ("b/2.txt", b"two")
)


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz"])
def test_members_that_share_a_name_are_one_document(tmp_path, ending):
    packed = WEBDATASET if ending == "tar" else gzip.compress(WEBDATASET)
    first, second = of_tar(tmp_path, packed, f"a.{ending}")
    assert (first.where, second.where) == (f"a.{ending}/b/1.txt", f"a.{ending}/b/2.txt")
    assert texts([first, second]) == ["picture+one", "two"]
    assert isinstance(first.document, Document) and isinstance(second.document, Document)
    assert (first.document.id, first.document.metadata) == ("x", {"url": "u"})
    assert second.document.id == f"a.{ending}/b/2"


def test_a_record_of_a_tar_names_its_files(tmp_path):
    record = b'{"parts": [{"type": "text", "text": "a"}, {"type": "image", "path": "1.jpg"}]}'
    assert texts(of_tar(tmp_path, tar(("b/1.json", record), ("b/1.jpg", b"picture")))) == ["a+picture"]
    assert "is not among" in refused(of_tar(tmp_path, tar(("b/1.json", record), ("b/1.png", b"x"))), "missing file")


def test_small_texts_of_no_kind_are_metadata(tmp_path):
    members = [("0.cls", b"3"), ("0.txt", b"zero"), ("0.seg.id", b"7\n"), ("0.json", b'{"cls": "own", "n": 1}')]
    members += [("1.json", b'{"text": "one"}'), ("1.cls", b"4"), ("2.txt", b"two"), ("2.npy", b"\x93NUMPY")]
    members += [("3.txt", b"three"), ("3.log", b"x" * 10_001), ("4.cls", b"5"), ("5.txt", b"five"), ("5.cls", b"6")]
    for records in (of_tar(tmp_path, tar(*members)), found(tree(tmp_path / "f", dict(members)))):
        assert texts(records) == ["zero", "one", "[file type]", "[file type]", "[file type]", "five"]
        kept = [record.document.metadata for record in records if isinstance(record.document, Document)]
        assert kept == [{"cls": "own", "seg.id": "7\n", "n": 1}, {"cls": "4"}, {"cls": "6"}]
        assert "2.npy: found .npy, expected" in refused(records[2:3], "file type")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_kept(tmp_path, form):
    name = "x" * 300 + "/ключ é"
    assert only(of_tar(tmp_path, tar((f"{name}.txt", b"a"), form=form))).id == f"a.tar/{name}"


def test_names_that_are_no_utf8_are_spelled_out(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    good, bad = found(tree(tmp_path / "folder", {name: b"a", os.fsdecode(b"\xff.xyz"): b"a"}))
    assert only([good]).id == "folder/caf\\xe9"
    assert "found .xyz" in refused([bad], "file type") and bad.where == "folder/\\xff.xyz"
    assert only(of_tar(tmp_path, tar((name, b"a"), form=tarfile.GNU_FORMAT))).id == "a.tar/caf\\xe9"


MANY = [(f"{i}.{end}", os.urandom(300).hex().encode()) for i in range(4) for end in ("txt", "jpg", "wav")]


@settings(max_examples=200)
@given(st.integers(0, len(tar(*MANY)) - 1), st.booleans())
def test_a_tar_cut_anywhere_gives_whole_documents_and_says_so(tmp_path_factory, cut, packed):
    folder = tmp_path_factory.mktemp("cut")
    whole = gzip.compress(tar(*MANY)) if packed else tar(*MANY)
    name = "a.tgz" if packed else "a.tar"
    expected = groups_of(of_tar(folder, whole, name))
    assert len(expected) == 4
    cut = cut * len(whole) // len(tar(*MANY))
    records = of_tar(folder, whole[:cut], name)
    assert groups_of(records).items() <= expected.items()
    if whole[cut:].strip(b"\0"):  # the filling of the end may be missing
        assert text_of(records[-1]) == "[damaged]" and len(groups_of(records)) == len(records) - 1


@settings(max_examples=200)
@given(st.integers(0, len(MANY) - 1), st.integers(0, 511), st.binary(min_size=1, max_size=12))
@example(1, 0, bytes(512))
@example(4, 124, b"\xff" * 12)
@example(4, 124, b"77777777777\0")
@example(4, 156, b"x")
def test_a_damaged_header_loses_no_file_silently(tmp_path_factory, member, at, change):
    content = bytearray(tar(*MANY))
    start = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"][member]
    change = change[: 512 - at]
    content[start + at : start + at + len(change)] = change
    if change.strip(b"\0"):  # an attacker mends the checksum
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = f"{sum(content[start : start + 512]):06o}\0 ".encode()
    expected = {f"a.tar/{i}": "+".join(MANY[3 * i + k][1].decode() for k in (1, 2, 0)) for i in range(4)}
    records = of_tar(tmp_path_factory.mktemp("damage"), bytes(content))
    good = groups_of(records)
    lost = [name for name in expected if good.get(name) != expected[name]]
    # One member was changed: its document is lost or another one, and the rest is told of where it is lost.
    assert set(lost) <= {f"a.tar/{member // 3}"} or any(isinstance(record.document, Rejected) for record in records)


def bomb_of_headers() -> bytes:
    """Each header says that it belongs to the next one."""
    one = header("x", tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
    return one * 5000 + tar(("a.txt", b"a"))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (tar(header("a.txt", tarfile.SYMTYPE, linkname="/etc/passwd")), "link"),
        (tar(header("a.txt", tarfile.LNKTYPE, linkname="b")), "link"),
        (tar(header("a.txt", tarfile.CHRTYPE, devmajor=1, devminor=5)), "file type"),
        (tar(header("a.txt", tarfile.FIFOTYPE)), "file type"),
        (
            tar(header("a.txt", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"})),
            "file type",
        ),
        (tar(("../a.txt", b"a")), "path"),
        (tar(("b/../../a.txt", b"a")), "path"),
        (tar(("/etc/a.txt", b"a")), "path"),
        (tar(("a.xyz", b"a")), "file type"),
        (tar(("noending", b"a")), "file type"),
        (tar(("a.txt", b"")), "empty"),
        (tar(("a.txt", b"\xff")), "utf-8"),
        (tar(("a.json", b"{}")), "schema"),
        (tar(("a.json", b"{"), ("a.txt", b"a")), "json"),
        (tar(("a.txt", b"a"), ("a.txt", b"b")), "duplicate file"),
        (tar(*((f"a.{i}.txt", b"a") for i in range(1500))), "too large"),
        (tar(("a.txt", bytes(MOST + 1))), "too large"),
        (tar(("a.txt", b"a" * (MOST // 2)), ("a.md", b"a" * (MOST // 2 + 1))), "too large"),
        (header("a.txt", size=10 * 10**9).tobuf(tarfile.GNU_FORMAT) + bytes(1024), "damaged"),
        (tar(("a.txt", b"a")) + tar(("b.txt", b"b")), "damaged"),
        (tar(("a.txt", b"a")) + b"garbage", "damaged"),
        (tar(("x" * 5000 + ".txt", b"a")), "damaged"),
        (b"no tar at all" * 100, "damaged"),
        (b"", "damaged"),
        (bomb_of_headers(), "damaged"),
    ],
)
def test_what_a_tar_must_not_hold_is_refused_by_name(tmp_path, content, rule):
    assert refused(of_tar(tmp_path, content), rule)


def test_an_unusable_document_costs_no_other(tmp_path):
    content = tar(("a.txt", b"a"), header("b.txt", tarfile.SYMTYPE, linkname="a"), ("b.md", b"b"), ("c.txt", b"c"))
    assert texts(of_tar(tmp_path, content)) == ["a", "[link]", "c"]
    content = tar(("a.txt", b"a"), ("b.txt", bytes(5 * MOST)), ("b.md", b"b"), ("c.txt", b"c"))
    assert texts(of_tar(tmp_path, content)) == ["a", "[too large]", "c"]


# Folders


def tree(folder: Path, files: Mapping[str, bytes | Callable[[Path], None]]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return folder


def test_files_of_a_folder_that_share_a_name_are_one_document(tmp_path):
    files = {
        "b/2.txt": b"two",
        "b/2.jpg": b"picture",
        "b/1.txt": b"one",
        "2.md": b"other",
        "c.d.jpg": b"c",
        "c.txt": b"d",
    }
    records = found(tree(tmp_path / "f", files))
    assert groups_of(records) == {"f/2": "other", "f/b/1": "one", "f/b/2": "picture+two", "f/c": "c+d"}
    assert [record.where for record in records] == ["f/2.md", "f/c.d.jpg", "f/b/1.txt", "f/b/2.jpg"]


def test_a_folder_is_cut_into_units_between_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "UNIT_DOCUMENTS", 3)
    folder = tree(tmp_path / "f", {f"{i:02d}.{end}": end.encode() for i in range(10) for end in ("txt", "jpg")})
    assert [len(unit.groups) for unit in formats.plan([folder])] == [3, 3, 3, 1]
    assert texts(found(folder)) == ["jpg+txt"] * 10


def test_what_is_no_plain_file_is_refused_by_name(tmp_path):
    files: dict[str, Any] = {
        "a.txt": b"a",
        "b.txt": lambda path: path.symlink_to("a.txt"),
        "c.txt": os.mkfifo,
        "d.xyz": b"d",
        "e": lambda path: path.symlink_to(tmp_path, target_is_directory=True),
        "f.txt": b"",
        ".hidden.txt": b"hidden",
        ".git/x.txt": b"hidden",
    }
    records = found(tree(tmp_path / "f", files))
    assert {record.where[2:]: text_of(record) for record in records} == {
        "a.txt": "a",
        "b.txt": "[link]",
        "c.txt": "[file type]",
        "d.xyz": "[file type]",
        "e": "[file type]",
        "f.txt": "[empty]",
    }


def test_files_with_records_stand_for_their_folder(tmp_path):
    files = {"data/b.jsonl": lines({"image": "p/1.jpg"}), "data/p/1.jpg": b"picture", "a.jsonl": lines({"text": "a"})}
    assert texts(found(tree(tmp_path / "f", files))) == ["a", "picture"]


def test_files_beside_those_with_records_are_counted(tmp_path):
    alone = tree(tmp_path / "f", {"a.txt": b"a", "b/c.png": b"c"})
    mixed = tree(tmp_path / "g", {"a.jsonl": b"", "a.txt": b"a", "b/c.png": b"c", ".hidden": b""})
    assert [formats.beside_records(source) for source in (alone, mixed, mixed / "a.jsonl")] == [0, 2, 0]


def test_sources_that_cannot_be_read_are_errors(tmp_path):
    tree(tmp_path, {"a.jsonl": b"", "b/a.jsonl": b"", "c.txt": b"", "d/x.jsonl": os.mkfifo, "e/x.jsonl": b""})
    (tmp_path / "e" / "y.jsonl").symlink_to("x.jsonl")
    for sources, expected in (
        (["missing.jsonl"], "there is no such file or folder"),
        (["c.txt"], "found no known format"),
        (["a.jsonl", "b/a.jsonl"], "is named like"),
        (["d"], "is no regular file"),
        (["e"], "is a symbolic link"),
    ):
        with pytest.raises(UserError, match=expected):
            formats.plan([tmp_path / source for source in sources])


# Files that records name


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("missing.jpg", "missing file"),
        ("a.jpg/b.jpg", "missing file"),
        ("../secret.jpg", "path"),
        ("b/../../secret.jpg", "path"),
        ("/etc/passwd", "path"),
        ("a\0.jpg", "path"),
        ("https://example.com/a.jpg", "path"),
        ("data:image/png;base64," + "A" * 5000, "path"),
        ("linked.jpg", "link"),
        ("linked/secret.jpg", "link"),
        ("x" * 5000, "unreadable"),
        ("b", "file type"),
        (".", "file type"),
        ("pipe.jpg", "file type"),
        ("large.jpg", "too large"),
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(tmp_path, path, rule):
    files: dict[str, Any] = {"secret.jpg": b"secret", "d/a.jpg": b"a", "d/b/c.jpg": b"c", "d/pipe.jpg": os.mkfifo}
    tree(tmp_path, files | {"d/a.jsonl": lines({"image": path}), "d/large.jpg": bytes(MOST + 1)})
    (tmp_path / "d" / "linked.jpg").symlink_to("a.jpg")
    (tmp_path / "d" / "linked").symlink_to(tmp_path)
    assert len(refused(found(tmp_path / "d" / "a.jsonl"), rule)) < 600


def test_files_are_too_large_in_sum(tmp_path):
    record = {"image": ["a.jpg", "a.jpg"], "text": "a"}
    tree(tmp_path, {"a.jpg": b"a" * 60, "a.jsonl": lines(record)})
    assert "expected at most 40" in refused(found(tmp_path / "a.jsonl", most=100), "too large")
    assert only(found(tmp_path / "a.jsonl", most=120)).parts[1].data == b"a" * 60


def test_a_refused_file_is_closed(tmp_path):
    tree(tmp_path, {"d/x": b"", "a.jsonl": lines(*({"image": "d"} for _ in range(50)))})
    before = len(os.listdir("/proc/self/fd"))
    assert texts(found(tmp_path / "a.jsonl")) == ["[file type]"] * 50
    assert len(os.listdir("/proc/self/fd")) == before
