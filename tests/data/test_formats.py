"""Every format is read record by record; what is lost, cut short or forged is told of and given to nobody."""

import gzip
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import formats
from data.documents import Document, Rejected
from data.formats import Found
from sharding.errors import UserError
from tests.data.read_sources import MOST, found, groups_of, lines, only, refused, tar, text_of, texts, tree

# Tar files


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


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "TAR", "tar.GZ", "TGZ"])
def test_members_that_share_a_name_are_one_document(tmp_path, ending):
    packed = WEBDATASET if ending.lower() == "tar" else gzip.compress(WEBDATASET)
    first, second = of_tar(tmp_path, packed, f"a.{ending}")
    assert (first.where, second.where) == (f"a.{ending}/b/1.txt", f"a.{ending}/b/2.txt")
    assert texts([first, second]) == ["picture+one", "two"]
    assert isinstance(first.document, Document) and isinstance(second.document, Document)
    assert (first.document.id, first.document.metadata) == ("x", {"url": "u"})
    assert second.document.id == f"a.{ending}/b/2"


def test_members_share_their_name_up_to_the_first_dot(tmp_path):
    members = ("0.txt", b"zero"), ("0.seg.id", b"7"), ("0.a.jpg", b"picture")
    document = only(of_tar(tmp_path, tar(*members)))
    assert (document.id, document.metadata) == ("a.tar/0", {"seg.id": "7"})


def test_hidden_members_are_passed_over(tmp_path):
    hidden = [(name, b"\0") for name in ("./._1.jpg", "./.git/1.txt", "b/._1.txt", ".DS_Store")]
    members = [
        hidden[0],
        ("./1.jpg", b"picture"),
        *hidden[1:],
        ("./1.txt", b"one"),
        ("..2.txt", b"-"),
        ("2..txt", b"two"),
    ]
    assert texts(of_tar(tmp_path, tar(*members))) == ["picture+one", "two"]
    assert of_tar(tmp_path, tar(hidden[0])) == []


def test_a_record_of_a_tar_names_its_files(tmp_path):
    record = b'{"parts": [{"type": "text", "text": "a"}, {"type": "image", "path": "1.jpg"}]}'
    assert texts(of_tar(tmp_path, tar(("b/1.json", record), ("b/1.jpg", b"picture")))) == ["a+picture"]
    assert "is not among" in refused(of_tar(tmp_path, tar(("b/1.json", record), ("b/1.png", b"x"))), "missing file")


@pytest.mark.parametrize(
    ("record", "files", "expected"),
    [
        ({"text": "a"}, {"flac": b"sound"}, "sound+a"),
        ({"text": "a"}, {"wav": b"sound", "jpg": b"picture", "cls": b"3"}, "sound+picture+a"),
        ({"text": " "}, {"jpg": b"picture"}, "picture+ "),
        ({"text": None, "n": 1}, {"jpg": b"picture", "txt": b"a"}, "picture+a"),
        ({"image": "1.jpg"}, {"jpg": b"picture", "txt": b"a"}, "picture+a"),
        ({"image": "1.jpg", "text": "a"}, {"jpg": b"picture", "wav": b"sound"}, "sound+picture+a"),
        ({"text": "a"}, {"txt": b"b"}, "[unnamed file]"),
        ({"image": "1.jpg", "text": "a"}, {"jpg": b"picture", "md": b"b"}, "[unnamed file]"),
        ({"parts": [{"type": "text", "text": "a"}]}, {"jpg": b"picture"}, "[unnamed file]"),
        ({"messages": [{"role": "user", "content": "a"}]}, {"jpg": b"picture"}, "[unnamed file]"),
        ({"text": "a"}, {"jpg": b""}, "[empty]"),
        ({"text": "a"}, {"b.json": b"{}"}, "[duplicate file]"),
        ({"n": 1}, {"b.json": b'{"n": 2}', "txt": b"a"}, "[duplicate file]"),
    ],
)
def test_no_file_beside_a_record_is_lost_silently(tmp_path, record, files, expected):
    members = {"1.json": lines(record), **{f"1.{end}": content for end, content in files.items()}}
    assert texts(of_tar(tmp_path, tar(*members.items()))) == [expected]


def test_a_record_that_names_a_file_again_and_again_is_too_large(tmp_path):
    record = lines({"image": ["1.jpg"] * 3})
    files = {"1.jpg": b"picture" * 10, "1.json": record}
    for source in (tree(tmp_path / "f", files), tmp_path / "a.tar"):
        (tmp_path / "a.tar").write_bytes(tar(*files.items()))
        assert "found 70 bytes, expected at most 60" in refused(found(source, most=200), "too large")
        assert len(only(found(source, most=210)).parts) == 3


def test_small_texts_of_no_kind_are_metadata(tmp_path):
    members = [("0.cls", b"3"), ("0.txt", b"zero"), ("0.seg", b"7\n"), ("0.json", b'{"cls": "own", "n": 1}')]
    members += [("1.json", b'{"text": "one"}'), ("1.cls", b"4"), ("2.txt", b"two"), ("2.npy", b"\x93NUMPY")]
    members += [("3.txt", b"three"), ("3.log", b"x" * 10_001), ("4.cls", b"5"), ("5.txt", b"five"), ("5.cls", b"6")]
    for records in (of_tar(tmp_path, tar(*members)), found(tree(tmp_path / "f", dict(members)))):
        assert texts(records) == ["zero", "one", "[file type]", "[file type]", "[file type]", "five"]
        kept = [record.document.metadata for record in records if isinstance(record.document, Document)]
        assert kept == [{"cls": "own", "seg": "7\n", "n": 1}, {"cls": "4"}, {"cls": "6"}]
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


def sparse(blocks: int = 0) -> bytes:
    """A file with holes in GNU's old form, whose map goes on in so many blocks; these say that one more follows."""
    head = bytearray(header("a.txt", tarfile.GNUTYPE_SPARSE, size=512).tobuf(tarfile.GNU_FORMAT))
    head[482], head[148:156] = bool(blocks), b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    block = b"00000000001\0" * 42 + b"\1" + bytes(7)
    return bytes(head) + (block * blocks)[: 512 * blocks - 8] + bytes(8 if blocks else 0) + bytes(512)


def sparse_in_pax(regions: int) -> bytes:
    """The same in the newest form: the map begins the file."""
    content = b"%d\n" % regions + b"0\n" * (2 * regions)
    fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    info = header("a.txt", size=len(content), pax_headers=fields)
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


def of_all(fields: dict[str, str]) -> bytes:
    return tarfile.TarInfo.create_pax_global_header(fields)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (sparse() + bytes(1024), "file type"),
        (sparse(3) + bytes(1024), "file type"),
        (sparse(3)[:512], "damaged"),
        (sparse(3)[:1536], "damaged"),
        (sparse_in_pax(1000) + bytes(1024), "file type"),
        (header("a.txt", pax_headers={"x": "x" * 2**20}).tobuf(tarfile.PAX_FORMAT) + bytes(1024), "damaged"),
        (of_all({"x": "x" * 10**6}) + of_all({"y": "y" * 10**6}) + tar(("a.txt", b"a")), "damaged"),
        (header("x", tarfile.GNUTYPE_LONGNAME, size=-512).tobuf(tarfile.GNU_FORMAT) + tar(("a.txt", b"a")), "damaged"),
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


def test_a_file_with_holes_that_is_cut_short_is_said_to_be(tmp_path):
    for length in (512, 1000, 1536):
        assert "(a.txt is cut short)" in refused(of_tar(tmp_path, sparse(3)[:length]), "damaged")


def test_maps_of_files_with_holes_are_not_held(tmp_path):
    for content in (sparse(20_000), sparse_in_pax(500_000)):
        (tmp_path / "a.tar").write_bytes(content + tar(("b.txt", b"b")))
        tracemalloc.start()
        assert texts(found(tmp_path / "a.tar")) == ["[file type]", "b"]
        assert tracemalloc.get_traced_memory()[1] < 10 * 10**6  # 27 and more, if they were
        tracemalloc.stop()


def test_an_unusable_document_costs_no_other(tmp_path):
    content = tar(("a.txt", b"a"), header("b.txt", tarfile.SYMTYPE, linkname="a"), ("b.md", b"b"), ("c.txt", b"c"))
    assert texts(of_tar(tmp_path, content)) == ["a", "[link]", "c"]
    content = tar(("a.txt", b"a"), ("b.txt", bytes(5 * MOST)), ("b.md", b"b"), ("c.txt", b"c"))
    assert texts(of_tar(tmp_path, content)) == ["a", "[too large]", "c"]


# Folders


def test_files_of_a_folder_that_share_a_name_are_one_document(tmp_path):
    files = {
        "b/2.txt": b"two",
        "b/2.jpg": b"picture",
        "b/1.txt": b"one",
        "2.md": b"other",
        "c.JPG": b"c",
        "c.JPG.txt": b"d",
        "2024.01.01.txt": b"first",
        "2024.01.02.txt": b"second",
        "2024.01.02.cls": b"2",
    }
    records = found(tree(tmp_path / "f", files))
    days = {"f/2024.01.01": "first", "f/2024.01.02": "second"}
    assert groups_of(records) == days | {"f/2": "other", "f/b/1": "one", "f/b/2": "picture+two", "f/c": "c+d"}
    names = ["2.md", "2024.01.01.txt", "2024.01.02.cls", "c.JPG", "b/1.txt", "b/2.jpg"]
    assert [record.where for record in records] == [f"f/{name}" for name in names]
    assert isinstance(records[2].document, Document) and records[2].document.metadata == {"cls": "2"}


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


def test_links_and_pipes_named_like_files_with_records_are_refused_by_name(tmp_path):
    names = ("a.jsonl", "b.parquet", "c.tar", "d.jsonl.gz")
    links: dict[str, Any] = {name: lambda path: path.symlink_to("x.jsonl") for name in names}
    files = links | {
        "e.tar": os.mkfifo,
        "x.jsonl": lines({"text": "a"}),
        "gone.jsonl": lambda path: path.symlink_to("-"),
    }
    folder = tree(tmp_path / "f", files | {"y.tar": lambda path: path.symlink_to(tmp_path)})
    records = found(folder)
    assert texts(records) == ["[link]"] * 4 + ["[file type]", "[link]", "a", "[link]"]
    assert [record.where for record in records[:2]] == ["f/a.jsonl", "f/b.parquet"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.tar"])
def test_a_file_that_goes_while_it_is_prepared_ends_the_work(name, tmp_path):
    """Its records would be rejected one unit at a time, and nobody would see how many there were."""
    content = {"a.jsonl": lines({"text": "a"}), "a.jsonl.gz": gzip.compress(b"{}"), "a.tar": tar(("a.txt", b"a"))}[name]
    folder = tree(tmp_path / "f", {name: content})
    units = formats.plan([folder])
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: is gone, .* the same command goes on"):
        for unit in units:
            list(formats.read(unit, MOST))


def test_files_beside_those_with_records_are_counted(tmp_path):
    alone = tree(tmp_path / "f", {"a.txt": b"a", "b/c.png": b"c"})
    mixed = tree(tmp_path / "g", {"a.jsonl": b"", "a.txt": b"a", "b/c.png": b"c", ".hidden": b""})
    assert [formats.beside_records(source) for source in (alone, mixed, mixed / "a.jsonl")] == [0, 2, 0]


def test_sources_that_cannot_be_read_are_errors(tmp_path):
    tree(tmp_path, {"a.jsonl": b"", "b/a.jsonl": b"", "c.txt": b"", "d.jsonl": os.mkfifo})
    (tmp_path / "e.jsonl").symlink_to("a.jsonl")
    for sources, expected in (
        (["missing.jsonl"], "there is no such file or folder"),
        (["c.txt"], "found no known format"),
        (["a.jsonl", "b/a.jsonl"], "is named like"),
        (["d.jsonl"], "there is no such file or folder"),
        (["e.jsonl"], "is a symbolic link"),
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
