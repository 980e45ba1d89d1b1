"""The text is this Python's own, split by file, and cut without losing anything."""

import dataclasses
import sys
from pathlib import Path

import pytest

from data import text
from data.config import DataConfig, MediaSpec
from data.sources import load_sources
from data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, load_bytes
from sharding.errors import UserError

FILES = text.standard_library().files


def test_both_splits_have_topics_and_modules():
    for held_out in (False, True):
        names = [file.name for file in FILES if file.held_out == held_out]
        assert any(name.startswith("topics/") for name in names)
        assert any(name.endswith(".py") for name in names)
    size = sum(len(file.text) for file in FILES)
    assert 0.01 < sum(len(file.text) for file in FILES if file.held_out) / size < 0.1
    assert size > 10**6


def test_no_tests_packages_or_generated_modules():
    names = {file.name for file in FILES}
    assert "argparse.py" in names | {"topics/argparse.py"}
    assert not [
        name for name in names if name.startswith("_") or "test" in name.split("/")[0].removesuffix(".py").split("_")
    ]


def test_another_content_has_another_digest():
    changed = [dataclasses.replace(FILES[0], text=FILES[0].text + " "), *FILES[1:]]
    assert text.digest(changed) != text.digest(FILES) == text.digest(list(FILES))
    moved = [text.TextFile("ab", "c"), text.TextFile("d", "")], [text.TextFile("a", "bc"), text.TextFile("d", "")]
    assert text.digest(moved[0]) != text.digest(moved[1])


def test_a_python_without_documentation_topics_gives_the_modules(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    corpus = text.standard_library()
    assert [file.name for file in corpus.files] == [file.name for file in FILES if file.name.endswith(".py")]
    assert corpus.notes == ("text: this Python has no pydoc_data; its documentation topics are missing",)


def test_a_python_without_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(text, "_topics", dict)
    with pytest.raises(UserError, match=r"data\.mixture\.text: found 0 readable files and 0 unreadable"):
        text.standard_library()


@pytest.fixture
def library(monkeypatch, tmp_path) -> Path:
    """A folder in place of the standard library, with a module in each split; its Python has documentation topics."""
    folder = tmp_path / "library"
    folder.mkdir()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})
    monkeypatch.setattr(text, "_topics", lambda: {"topic": "a topic\n"})
    numbered = [f"module{i}.py" for i in range(200)]
    for held_out in (False, True):
        name = next(name for name in numbered if text.TextFile(name, "").held_out == held_out)
        (folder / name).write_text("x = 1\n" * 3)
    return folder


def test_a_whole_library_has_nothing_to_note(library):
    assert text.standard_library().notes == ()


def test_modules_that_cannot_be_read_are_counted_and_named(library):
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    assert text.standard_library().notes == ("text: 1 of 3 files could not be read and was skipped: latin.py",)
    (library / "folder.py").mkdir()
    (library / "_private.py").mkdir()  # would not be taken anyway
    assert text.standard_library().notes == (
        "text: 2 of 4 files could not be read and were skipped: folder.py, latin.py",
    )
    for i in range(5):
        (library / f"z{i}.py").symlink_to(library / "nowhere")
    corpus = text.standard_library()
    assert corpus.notes == (
        "text: 7 of 9 files could not be read and were skipped: folder.py, latin.py, z0.py, z1.py, z2.py and 2 more",
    )
    assert len(corpus.files) == 3


def test_a_library_of_which_nothing_can_be_read_is_refused(library, monkeypatch):
    monkeypatch.setattr(text, "_topics", dict)
    for path in library.iterdir():
        path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"data\.mixture\.text: found 0 readable files and 2 unreadable ones"):
        text.standard_library()


def test_a_warm_start_notes_the_same_as_a_cold_one(library, monkeypatch, tmp_path):
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    for path in library.glob("module*.py"):
        held_out = text.TextFile(path.name, "").held_out
        path.write_text("short\n" + "a" * (11 if held_out else 19) + "\n")
    config = DataConfig(
        mixture={"text": 1.0}, tokenizer="bytes", sequence_length=8, workers=0, cache_dir=str(tmp_path / "cache")
    )
    tokenizer = load_bytes()
    unread = "text: 1 of 3 files could not be read and was skipped: latin.py"
    rows = "do not fit a row (8 tokens, 8 tiles, 0 windows of sound) and were split into"
    expected = {
        False: (unread, f"text: 2 documents {rows} 6 pieces (data.long_documents)"),
        True: (unread, f"text: 1 held-out documents {rows} 3 pieces (data.long_documents)"),
    }
    for _ in range(2):
        for held_out, notes in expected.items():
            (source,) = load_sources(config, MediaSpec(), held_out, tokenizer, ["text"], lambda told: None)
            assert source.notes == notes
        monkeypatch.setattr("data.sources.cut", lambda *_: pytest.fail("listed again"))
        monkeypatch.setattr("data.prepare.prepare_unit", lambda *_: pytest.fail("prepared again"))


@pytest.mark.parametrize(("length", "held_out"), [(256, False), (40, True)])
def test_documents_put_together_are_the_files(config, media, dataset, length, held_out):
    small = dataclasses.replace(config, sequence_length=length, mixture={"text": 1.0})
    (source,) = load_sources(small, media, held_out, dataset.tokenizer, ["text"], lambda told: None)
    special = dataset.tokenizer.special
    assert source.sizes[:, 0].max() <= length
    files, current = [], []
    for document in source.read(range(len(source))):
        tokens = document.tokens_S.tolist()
        assert tokens[0] == special[BEGIN_OF_TEXT]
        assert special[BEGIN_OF_TEXT] not in tokens[1:]
        assert special[END_OF_TEXT] not in tokens[:-1]
        current += tokens
        if tokens[-1] == special[END_OF_TEXT]:
            files.append(dataset.tokenizer.decode(current))
            current = []
    assert not current
    assert files == [file.text for file in FILES if file.held_out == held_out]
