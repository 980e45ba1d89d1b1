"""Every string survives; text never becomes a special token; processes that train at once agree."""

import itertools
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from data.tokenizer import PATCH, SPECIAL_TOKENS, Tokenizer, load_bpe, load_bytes, load_file
from sharding.errors import UserError
from tests.data import llama4

CORPUS = [
    "The quick brown fox\n    jumps over the lazy dog.\n" * 20,
    "def f(x):\n    return x\n" * 20,
    "ünïcödé 漢字 🙂\n" * 5,
]
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.sampled_from(llama4.SPECIAL)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Tokenizer:
    return load_bpe(CORPUS, 320, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["bpe", "bytes", "file"])
def tokenizer(request, bpe) -> Tokenizer:
    return {"bpe": lambda: bpe, "bytes": load_bytes, "file": lambda: Tokenizer(llama4.serialised())}[request.param]()


@given(text=ANY_TEXT)
def test_every_string_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=ANY_TEXT)
def test_text_never_becomes_a_special_token(tokenizer, text):
    assert not set(tokenizer.encode(f"{text}{PATCH}{text}")) & set(tokenizer.special.values())


@given(text=ANY_TEXT)
def test_byte_lengths_add_up(tokenizer, text):
    assert int(tokenizer.byte_lengths[np.array(tokenizer.encode(text), int)].sum()) == len(text.encode())


@given(text=ANY_TEXT)
def test_a_stream_of_tokens_is_the_text(tokenizer, text):
    ids = [i for token in tokenizer.encode(text) for i in (tokenizer.special[PATCH], token)]
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


def merged(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids by the definition of byte-pair encoding: of each piece, the earliest merge first, the leftmost first."""
    content = json.loads(tokenizer.serialised)
    rank = {tuple(pair): i for i, pair in enumerate(content["model"]["merges"])}
    ids = []
    for piece, _ in Library.from_str(tokenizer.serialised).pre_tokenizer.pre_tokenize_str(text):
        parts = list(piece)
        while True:
            ranks = [rank.get(pair, len(rank)) for pair in itertools.pairwise(parts)]
            if min(ranks, default=len(rank)) == len(rank):
                break
            at = ranks.index(min(ranks))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [content["model"]["vocab"][part] for part in parts]
    return ids


@given(text=st.text(st.sampled_from("the quickbrownfox\n  12.,:ü漢"), max_size=60) | ANY_TEXT)
def test_ids_are_those_of_byte_pair_encoding_by_the_book(tokenizer, text):
    assert tokenizer.encode(text) == merged(tokenizer, text)


def test_plain_bytes_are_their_own_ids():
    text = "".join(map(chr, range(256))) + "漢字 🙂 <|patch|>"
    assert load_bytes().encode(text) == list(text.encode())


def test_a_trained_bpe_has_the_ids_of_one_without_special_tokens(bpe):
    alone = Library(models.BPE())
    alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 320 - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    alone.train_from_iterator(CORPUS, trainer)
    for text in (*CORPUS, Path(__file__).read_text()):
        assert bpe.encode(text) == alone.encode(text).ids


def test_special_tokens_have_the_last_ids_one_each(bpe):
    for tokenizer in (bpe, load_bytes()):
        first = tokenizer.size - len(SPECIAL_TOKENS)
        assert list(tokenizer.special.items()) == [(name, first + i) for i, name in enumerate(SPECIAL_TOKENS)]


def test_special_tokens_are_no_text(tokenizer):
    assert len(tokenizer.byte_lengths) == tokenizer.size
    assert tokenizer.decode(tokenizer.special.values()) == ""
    assert not tokenizer.byte_lengths[list(tokenizer.special.values())].any()


def test_lone_surrogates_do_not_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_a_tokenizer_survives_pickling(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.serialised, copy.source, copy.digest) == (tokenizer.serialised, tokenizer.source, tokenizer.digest)
    assert copy.encode(PATCH) == tokenizer.encode(PATCH)


def test_other_programs_read_what_is_made_here(tokenizer):
    library = Library.from_str(tokenizer.serialised)
    ids = tokenizer.encode(CORPUS[0])
    assert library.encode(CORPUS[0], add_special_tokens=False).ids == ids
    assert library.decode(ids) == CORPUS[0]
    assert {name: library.token_to_id(name) for name in tokenizer.special} == tokenizer.special


def test_a_bpe_is_trained_once(tmp_path, monkeypatch):
    first = load_bpe(CORPUS, 300, tmp_path)
    monkeypatch.setattr("data.tokenizer._train", lambda *_: pytest.fail("trained again"))
    assert load_bpe(CORPUS, 300, tmp_path).digest == first.digest
    assert len(list(tmp_path.iterdir())) == 1


def test_size_counts_special_tokens(tmp_path):
    assert load_bpe(CORPUS, 300, tmp_path).size == 300


def test_a_size_without_room_for_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected at least 273"):
        load_bpe(CORPUS, 272, tmp_path)


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


# Files


def test_a_file_or_its_folder_is_kept_byte_for_byte(tmp_path):
    content = llama4.serialised().replace("\n", "\r\n").encode()
    (tmp_path / "tokenizer.json").write_bytes(content)
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        tokenizer = load_file(path)
        assert tokenizer.serialised.encode() == content
        assert tokenizer.source == str(tmp_path / "tokenizer.json")
        assert tokenizer.digest == Tokenizer(llama4.serialised()).digest


def test_a_special_token_that_is_not_there_is_named_with_the_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text(load_bytes().serialised)
    tokenizer = load_file(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json: found no special token <\|fim\|>, expected"):
        _ = tokenizer.special["<|fim|>"]
    with pytest.raises(UserError, match=r"found no special token <\|fim\|>, <\|eom\|>, expected"):
        tokenizer.require((PATCH, "<|fim|>", "<|eom|>"))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "found a SentencePiece or tiktoken file"),
        ("tokenizer.pkl", b"anything", "found a pickle, which runs its author's code"),
        ("tokenizer.json", b"\x80\x04\x95\x10", "found a pickle, which runs its author's code"),
        ("other.json", "é".encode("latin-1"), "found no UTF-8 text"),
        ("other.json", b"", "found no JSON"),
        ("other.json", b'{"model": {"type"', "found no JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_to_do(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: {found}.*expected .*tokenizer\.json") as raised:
        load_file(tmp_path / name)
    if "JSON" not in found and "UTF-8" not in found:
        assert "Hugging Face" in str(raised.value)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"/tokenizer\.json: there is no such file"):
        load_file(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=r"found tokenizer\.model, expected tokenizer\.json\. Take"):
        load_file(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read \(Is a directory\)"):
        load_file(tmp_path)
