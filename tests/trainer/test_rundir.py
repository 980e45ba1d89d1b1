"""The tokenizer of a run directory: kept as other programs read it, and known by its digest."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from data.tokenizer import load_bytes
from sharding.errors import UserError
from trainer.config import RunConfig
from trainer.rundir import RunDirectory

TOKENIZER = load_bytes()


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path)
    directory.save(RunConfig(), TOKENIZER)
    return directory


def test_it_is_a_tokenizer_json(directory: RunDirectory) -> None:
    assert directory.tokenizer.read_text() == TOKENIZER.serialised
    assert Library.from_file(str(directory.tokenizer)).encode("a<|patch|>").ids == [97, TOKENIZER.special["<|patch|>"]]


def test_it_comes_back_however_it_is_written_down(directory: RunDirectory) -> None:
    directory.tokenizer.write_text(json.dumps(json.loads(TOKENIZER.serialised), indent=2, sort_keys=True))
    loaded = directory.load_tokenizer(TOKENIZER.digest)
    assert (loaded.digest, loaded.special, loaded.source) == (
        TOKENIZER.digest,
        TOKENIZER.special,
        str(directory.tokenizer),
    )


def test_another_than_the_checkpoints_is_refused(directory: RunDirectory) -> None:
    content = json.loads(TOKENIZER.serialised)
    content["added_tokens"][0]["content"] = "<|another|>"
    directory.tokenizer.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"tokenizer\.json: digest found \w+, expected {TOKENIZER.digest}"):
        directory.load_tokenizer(TOKENIZER.digest)


def test_the_form_of_an_earlier_version_is_refused_in_words(directory: RunDirectory) -> None:
    directory.tokenizer.write_text(json.dumps({"digest": "abc", "bpe": None}))
    with pytest.raises(UserError, match=r"(?s)fields \['bpe', 'digest'\].*an earlier version"):
        directory.load_tokenizer("abc")


def test_a_missing_one_is_named(directory: RunDirectory) -> None:
    directory.tokenizer.unlink()
    with pytest.raises(UserError, match=r"(?s)tokenizer\.json: there is no such file.*restore it from a copy"):
        directory.load_tokenizer(TOKENIZER.digest)
