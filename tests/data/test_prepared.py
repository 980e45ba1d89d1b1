"""A data set that is damaged is refused by name, never read as another one."""

import contextlib
import json
import os
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.documents import Document, Part
from data.index import FORMAT, Index
from data.index import Part as Entries
from data.prepared import Prepared
from data.records import Record, prepared
from data.shards import Shards, shard_name
from data.tokenizer import load_bytes
from sharding.errors import UserError

DTYPE = np.dtype("<u2")
PLACES = [(0, i) for i in range(20)]


def write(folder: Path) -> Path:
    """A data set of 20 documents, without the command."""
    from array_record.python.array_record_module import ArrayRecordWriter

    made = [prepared(Document(f"d{i}", (Part("text", text=f"{i}" * 99),)), "x", load_bytes(), DTYPE) for i in range(20)]
    (folder / "shards").mkdir(parents=True)
    writer = ArrayRecordWriter(str(folder / "shards" / shard_name(0)), "group_size:1,uncompressed")
    for record, _ in made:
        writer.write(record)
    writer.close()
    part, all_of_them = Entries.of([entry for _, entry in made]), np.ones(20, bool)
    index = Index.of(part, np.zeros(20, np.int32), np.arange(20, dtype=np.int32), all_of_them, 0.1)
    index.write(folder / "index")
    facts = {"format": FORMAT, "token_dtype": DTYPE.str, "written": 20, **index.facts_of()}
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "out")


def read(folder: Path) -> list[tuple[str, bytes]]:
    def plain(record: Record) -> tuple[str, bytes]:
        return record.id, record.tokens.tobytes()

    with Shards(folder / "shards", DTYPE) as shards:
        return [plain(record) for record in shards.read(PLACES)]


@given(st.data())
def test_a_damaged_shard_gives_what_went_in_or_is_named(whole, tmp_path_factory, data):
    content = (whole / "shards" / shard_name(0)).read_bytes()
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 3000))
    how = data.draw(st.sampled_from(["cut", "flip", "zeros"]))
    damaged = bytearray(content)
    if how == "cut":
        damaged = damaged[:at]
    elif how == "flip":
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        damaged[at : at + 50] = bytes(len(damaged[at : at + 50]))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "shards").mkdir()
    (folder / "shards" / shard_name(0)).write_bytes(bytes(damaged))
    try:
        assert read(folder) == read(whole)
    except UserError as error:
        assert f"{shard_name(0)}: is missing or damaged" in str(error)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(UserError, match=r"000007.array_record: is missing or damaged"):
        Shards(tmp_path, DTYPE).read([(7, 0)])


@pytest.fixture
def few_files() -> Iterator[None]:
    """Some more files than are open may be."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 64, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_any_number_of_shards_is_read_with_few_files_open(whole, tmp_path, few_files):
    content = (whole / "shards" / shard_name(0)).read_bytes()
    for i in range(100):
        (tmp_path / shard_name(i)).write_bytes(content)
    expected = read(whole)[3]
    data_sets = [Shards(tmp_path, DTYPE) for _ in range(2)]
    for i in (*range(100), 0, 99, *range(0, 100, 3)):
        for shards in data_sets:
            [record] = shards.read([(i, 3)])
            assert (record.id, record.tokens.tobytes()) == expected
    for shards in data_sets:
        shards.close()
        assert not shards._readers


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_too_many_open_files_are_not_taken_for_damage(whole, few_files):
    with contextlib.ExitStack() as stack:
        shards = stack.enter_context(Shards(whole / "shards", DTYPE))
        with contextlib.suppress(OSError):
            while True:
                stack.enter_context(open(whole / "dataset.json"))
        for ask in (lambda: shards.read([(0, 3)]), lambda: Prepared.open(whole), lambda: Index.open(whole / "index")):
            with pytest.raises(UserError, match=r"cannot be opened, since this process has \d+ files open .*ulimit -n"):
                ask()


def test_a_place_that_is_not_there_is_an_error(whole):
    with pytest.raises(UserError, match="is missing or damaged"), Shards(whole / "shards", DTYPE) as shards:
        shards.read([(0, 20)])


ARRAYS = ["tokens", "file_starts", "kinds", "places", "facts", "held_out", "sources", "shards", "records", "nbytes"]


@pytest.mark.parametrize("name", ARRAYS)
def test_a_damaged_index_is_named(tmp_path, name):
    path = write(tmp_path / "out") / "index" / f"{name}.npy"
    content, array = path.read_bytes(), np.load(path)
    for damaged in (
        content[:-1] or b"",
        content[:100],
        b"",
        b"PK\x03\x04" + content[4:],
        content[:60] + b"(" * 9 + content[69:],
    ):
        if damaged == content[:-1] and len(content) == 128:
            continue  # an empty array, less a blank of its header
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}\.npy: is missing or damaged"):
            Prepared.open(tmp_path / "out")
    np.save(path, np.concatenate([array, array[-1:] if len(array) else np.zeros((1, *array.shape[1:]), array.dtype)]))
    with pytest.raises(UserError, match=r"\.npy: found \d+ entries, expected \d+|found 21 documents in the index"):
        Prepared.open(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}\.npy: is missing or damaged"):
        Prepared.open(tmp_path / "out")


@pytest.mark.parametrize("content", ["", "[", "5", None])
def test_damaged_names_of_sources_are_named_where_they_are_asked_for(tmp_path, content):
    path = write(tmp_path / "out") / "index" / "names.json"
    path.unlink() if content is None else path.write_text(content)
    index = Prepared.open(tmp_path / "out").index
    with pytest.raises(UserError, match=r"names\.json: is missing or damaged"):
        _ = index.names


def test_names_of_sources_are_not_held(tmp_path):
    """Each document may be of another one, such as its address."""
    out = write(tmp_path / "out")
    (out / "index" / "names.json").write_text(json.dumps([f"https://example.com/{i}" for i in range(50_000)]))
    tracemalloc.start()
    data = Prepared.open(out)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    assert len(data.index.names) == 50_000


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", '{"format": 2}', '{"format": 2, "token_dtype": "<u2"}', "\udcff"]
)
def test_a_damaged_dataset_json_is_named(tmp_path, content):
    path = write(tmp_path / "out") / "dataset.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"dataset\.json: cannot be read"):
        Prepared.open(tmp_path / "out")


def test_another_format_or_another_index_is_refused(whole, tmp_path):
    facts = json.loads((whole / "dataset.json").read_text())
    path = write(tmp_path / "out") / "dataset.json"
    for change, expected in (
        ({"format": FORMAT + 1}, f"expected {FORMAT}"),
        ({"written": 21}, "found 20 documents in the index"),
    ):
        path.write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match=expected):
            Prepared.open(tmp_path / "out")


def test_a_folder_without_dataset_json_is_none_or_unfinished(tmp_path):
    with pytest.raises(UserError, match=r"found no dataset\.json"):
        Prepared.open(tmp_path)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(UserError, match="is unfinished"):
        Prepared.open(tmp_path)
