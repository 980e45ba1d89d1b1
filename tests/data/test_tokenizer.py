"""Every string survives; text never becomes a special token; processes that train at once agree."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizer import PATCH, SPECIAL_TOKENS, Tokenizer, load_bpe, load_bytes
from sharding.errors import UserError

CORPUS = [
    "The quick brown fox\n    jumps over the lazy dog.\n" * 20,
    "def f(x):\n    return x\n" * 20,
    "ünïcödé 漢字 🙂\n" * 5,
]
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.sampled_from(SPECIAL_TOKENS)


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return load_bytes() if request.param == "bytes" else load_bpe(CORPUS, 320, tmp_path_factory.mktemp("tokenizer"))


@given(text=ANY_TEXT)
def test_every_string_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=ANY_TEXT)
def test_text_never_becomes_a_special_token(tokenizer, text):
    assert not set(tokenizer.encode(f"{text}{PATCH}{text}")) & set(tokenizer.special.values())


@given(text=ANY_TEXT)
def test_byte_lengths_add_up(tokenizer, text):
    assert int(tokenizer.byte_lengths[np.array(tokenizer.encode(text), int)].sum()) == len(text.encode())


def test_ids_are_all_there_and_special_tokens_have_one_each(tokenizer):
    assert sorted(tokenizer.special) == sorted(SPECIAL_TOKENS)
    assert sorted(tokenizer.special.values()) == list(range(tokenizer.size - len(SPECIAL_TOKENS), tokenizer.size))
    assert len(tokenizer.byte_lengths) == len(tokenizer.begins_line) == tokenizer.size
    assert tokenizer.decode(tokenizer.special.values()) == ""


def test_lone_surrogates_do_not_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_begins_line_marks_tokens_that_begin_with_a_line_feed(tokenizer):
    for i in range(tokenizer.size):
        assert tokenizer.begins_line[i] == tokenizer.decode([i]).startswith("\n")


def test_a_bpe_is_trained_once(tmp_path, monkeypatch):
    first = load_bpe(CORPUS, 300, tmp_path)
    monkeypatch.setattr("data.tokenizer._train", lambda *_: pytest.fail("trained again"))
    assert load_bpe(CORPUS, 300, tmp_path).digest == first.digest
    assert len(list(tmp_path.iterdir())) == 1


def test_size_counts_special_tokens(tmp_path):
    assert load_bpe(CORPUS, 300, tmp_path).size == 300


def test_a_size_without_room_for_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected at least 265"):
        load_bpe(CORPUS, 264, tmp_path)


def test_processes_that_train_at_once_agree(tmp_path):
    code = (
        "import sys; from pathlib import Path; from data.tokenizer import load_bpe\n"
        f"print(load_bpe({CORPUS!r}, 400, Path(sys.argv[1])).digest)"
    )

    def run(_: int) -> str:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout

    with ThreadPoolExecutor() as pool:
        assert len(set(pool.map(run, range(4)))) == 1
    assert len(list(tmp_path.iterdir())) == 1
