"""The text is this Python's own, split by file, and cut without losing anything."""

import dataclasses
import sys

import numpy as np
import pytest

from data import text
from data.sources import load_sources
from data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT
from sharding.errors import UserError

FILES = text.standard_library()


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
    files = text.standard_library()
    assert [file.name for file in files] == [file.name for file in FILES if file.name.endswith(".py")]


def test_a_python_without_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(text, "_topics", dict)
    with pytest.raises(UserError, match=r"data\.mixture\.text: found 0 readable files"):
        text.standard_library()


@pytest.mark.parametrize(("length", "held_out"), [(256, False), (40, True)])
def test_documents_put_together_are_the_files(config, image, dataset, length, held_out):
    small = dataclasses.replace(config, sequence_length=length, mixture={"text": 1.0})
    (source,) = load_sources(small, image, held_out, dataset.tokenizer)
    special = dataset.tokenizer.special
    assert source.lengths.max() <= length
    assert int(source.starts[-1]) == len(source.tokens)
    files, current = [], []
    for i in range(len(source)):
        tokens = source.document(i).tokens_S.tolist()
        assert tokens[0] == special[BEGIN_OF_TEXT]
        assert special[BEGIN_OF_TEXT] not in tokens[1:]
        assert special[END_OF_TEXT] not in tokens[:-1]
        current += tokens
        if tokens[-1] == special[END_OF_TEXT]:
            files.append(dataset.tokenizer.decode(current))
            current = []
    assert not current
    assert files == [file.text for file in FILES if file.held_out == held_out]


def test_documents_begin_at_lines_where_lines_are_short(config, image, dataset):
    (source,) = load_sources(dataclasses.replace(config, mixture={"text": 1.0}), image, False, dataset.tokenizer)
    end = dataset.tokenizer.special[END_OF_TEXT]
    cut = [i for i in range(1, len(source)) if source.document(i - 1).tokens_S[-1] != end]
    at_line = [dataset.tokenizer.decode(source.document(i).tokens_S).startswith("\n") for i in cut]
    assert np.mean(at_line) > 0.99
