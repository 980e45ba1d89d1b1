"""Which tokenizer.json can be used, and what makes two of them the same."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from data.tokenizer import BEGIN_OF_TEXT, Tokenizer, load_bytes
from data.tokenizer_json import digest
from sharding.errors import UserError
from tests.data import llama4
from tests.data.llama4 import BPE_SIZE, SPECIAL, plain

Json = dict[str, Any]
TEXT = "def f(x):\n    It is what it is: 12345 漢字 <|patch|>, isn't it?\n"


def read(content: Json) -> Tokenizer:
    return Tokenizer(json.dumps(content), "a/tokenizer.json")


# Llama 4's kind


def test_special_tokens_are_found_by_name():
    tokenizer = Tokenizer(llama4.serialised())
    assert tokenizer.special == {name: BPE_SIZE + i for i, name in enumerate(SPECIAL)}
    assert tokenizer.size == BPE_SIZE + len(SPECIAL)
    moved = plain()
    first, second = moved["added_tokens"][0], moved["added_tokens"][1]
    first["content"], second["content"] = second["content"], first["content"]
    assert read(moved).special[BEGIN_OF_TEXT] == BPE_SIZE + 1


def test_nothing_is_added_cut_or_padded():
    content = plain()
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 99},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    assert Library.from_str(json.dumps(content)).encode(TEXT).ids[0] == BPE_SIZE  # as the library does it: with begin
    assert read(content).decode(read(content).encode(TEXT)) == TEXT


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}])
def test_text_that_spells_a_special_token_stays_text(normalized, normalizer):
    content = plain() | {"normalizer": normalizer}
    for token in content["added_tokens"]:
        token["normalized"] = normalized
    tokenizer = read(content)
    for name in SPECIAL:
        ids = tokenizer.encode(f"a{name}{name} b")
        assert max(ids) < BPE_SIZE
        assert tokenizer.decode(ids) == f"a{name}{name} b"


def test_added_tokens_that_are_not_special_stand_for_their_text():
    content = plain()
    content["added_tokens"].append(content["added_tokens"][0] | {"id": BPE_SIZE + len(SPECIAL), "content": "ÿ →"})
    content["added_tokens"][-1]["special"] = False
    tokenizer = read(content)
    (i,) = tokenizer.encode("ÿ →")
    assert i == tokenizer.size - 1
    assert tokenizer.token_bytes(i) == "ÿ →".encode()
    assert tokenizer.byte_lengths[i] == 6
    assert "ÿ →" not in tokenizer.special


def test_ids_without_a_token_stand_for_nothing():
    content = plain()
    for token in content["added_tokens"]:  # where the library takes ids from the vocabulary, they may leave gaps
        token["id"] += 1000
        content["model"]["vocab"][token["content"]] = token["id"]
    tokenizer = read(content)
    assert tokenizer.size == 1000 + BPE_SIZE + len(SPECIAL)
    assert tokenizer.special[BEGIN_OF_TEXT] == 1000 + BPE_SIZE
    assert tokenizer.token_bytes(BPE_SIZE + 1) == tokenizer.token_bytes(10**9) == b""
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


# What is the same, and what is not


def shuffled(value: Any, rng: random.Random) -> Any:
    """The same JSON with the fields of every object in another order."""
    if isinstance(value, list):
        return [shuffled(item, rng) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: shuffled(value[key], rng) for key in rng.sample(sorted(value), len(value))}


def without_defaults(content: Json) -> Json:
    model = content["model"]
    return content | {"model": {key: model[key] for key in ("type", "vocab", "merges")}}


def other_offsets(content: Json) -> Json:
    content["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] ^= True
    return content


def merges_as_words(content: Json) -> Json:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    return content


SPELLINGS: list[Callable[[Json], Json]] = [
    without_defaults,
    other_offsets,
    merges_as_words,
    lambda content: content | {"post_processor": None, "decoder": None},
    lambda content: content | {"version": "1.0"},
    lambda content: json.loads(Library.from_str(json.dumps(content)).to_str()),
]


@given(st.lists(st.sampled_from(SPELLINGS), unique=True), st.integers(0, 2**32), st.sampled_from([None, 2]))
def test_the_digest_is_the_same_however_it_is_written_down(spellings, seed, indent):
    content, rng = plain(), random.Random(seed)
    for spell in spellings:
        content = spell(content)
    tokenizer = Tokenizer(json.dumps(shuffled(content, rng), indent=indent))
    original = Tokenizer(llama4.serialised())
    assert tokenizer.digest == original.digest
    assert tokenizer.encode(TEXT) == original.encode(TEXT)


def test_a_regex_that_is_the_default_may_be_left_out():
    content = plain() | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}
    said = copy.deepcopy(content)
    said["pre_tokenizer"]["use_regex"] = True
    denied = copy.deepcopy(content)
    denied["pre_tokenizer"]["use_regex"] = False
    assert read(content).digest == read(said).digest != read(denied).digest
    assert read(content).encode(TEXT) == read(said).encode(TEXT) != read(denied).encode(TEXT)


def swap(values: Any, a: Any, b: Any) -> None:
    values[a], values[b] = values[b], values[a]


def change(content: Json, kind: str, i: int) -> None:
    """Changes one thing that decides ids; `i` says which one of many."""
    model, added, steps = content["model"], content["added_tokens"], content["pre_tokenizer"]["pretokenizers"]
    tokens, merges = sorted(model["vocab"]), model["merges"]
    match kind:
        case "id of a token":
            model["vocab"][tokens[i % len(tokens)]] += 10000
        case "two tokens":
            swap(model["vocab"], tokens[i % len(tokens)], tokens[(i + 1) % len(tokens)])
        case "a token":
            model["vocab"][tokens[i % len(tokens)] + "~~"] = model["vocab"].pop(tokens[i % len(tokens)])
        case "a merge":
            merges[i % len(merges)][i % 2] += "~"
        case "fewer merges":
            del merges[i % len(merges)]
        case "order of merges":
            swap(merges, i % len(merges), (i + 1) % len(merges))
        case "cut of a merge":
            long = [pair for pair in merges if len(pair[0]) > 1]
            pair = long[i % len(long)]
            pair[:] = [pair[0][:-1], pair[0][-1] + pair[1]]
        case "name of a special token":
            added[i % len(added)]["content"] += "~"
        case "id of a special token":
            added[i % len(added)]["id"] += 10000
        case "two special tokens":
            one, other = added[i % len(added)], added[(i + 1) % len(added)]
            one["content"], other["content"] = other["content"], one["content"]
        case "fewer special tokens":
            del added[i % len(added)]
        case "a flag":
            flag = ("special", "lstrip", "rstrip", "single_word", "normalized")[i % 5]
            added[i % len(added)][flag] ^= True
        case "ignore_merges":
            model["ignore_merges"] = not model["ignore_merges"]
        case "normalizer":
            content["normalizer"] = {"type": ("NFC", "NFD", "NFKC")[i % 3]}
        case "pattern":
            steps[0]["pattern"]["Regex"] += "~"
        case "pre-tokenizer":
            del steps[i % 2]


KINDS = [
    "id of a token",
    "two tokens",
    "a token",
    "a merge",
    "fewer merges",
    "order of merges",
    "cut of a merge",
    "name of a special token",
    "id of a special token",
    "two special tokens",
    "fewer special tokens",
    "a flag",
    "ignore_merges",
    "normalizer",
    "pattern",
    "pre-tokenizer",
]


@pytest.mark.parametrize("kind", KINDS)
@given(i=st.integers(0, 10**6))
def test_the_digest_changes_with_whatever_decides_ids(kind, i):
    changed = plain()
    change(changed, kind, i)
    assert changed != plain()
    assert digest(changed) != digest(plain())


def test_tokenizers_made_here_have_digests_of_their_own():
    assert load_bytes().digest == load_bytes().digest != Tokenizer(llama4.serialised()).digest


# What is refused


def changed(**changes: Any) -> Json:
    """`model__dropout=0.1` sets content["model"]["dropout"]."""
    content = plain()
    for name, value in changes.items():
        *path, last = name.split("__")
        inner = content
        for key in path:
            inner = inner[key]
        inner[last] = value
    return content


def with_token(content: Json, token: str, i: int) -> Json:
    content["model"]["vocab"][token] = i
    return content


def without_byte() -> Json:
    content = changed(model__merges=[])
    del content["model"]["vocab"]["!"]
    return content


def special_at(i: int) -> Json:
    content = plain()
    content["added_tokens"][-1]["id"] = i
    return content


def reachable() -> Json:
    """A special token that merges give too: "as" is one that text is encoded to."""
    content = plain()
    i = content["model"]["vocab"]["as"]
    content["added_tokens"].append(content["added_tokens"][0] | {"id": i, "content": "as"})
    return content


def whole_words() -> Json:
    content = changed(model__ignore_merges=True)
    first = content["added_tokens"][0]
    return with_token(content, first["content"], first["id"])


PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]], "byte_fallback": False}
WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "?",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
    "vocab": {},
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(model=UNIGRAM), "found a Unigram model, expected the tokenizer.json of a byte-level BPE"),
        (changed(model=WORDPIECE), "found a WordPiece model, expected"),
        (changed(pre_tokenizer=None), "found no ByteLevel pre-tokenizer"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "found no ByteLevel pre-tokenizer"),
        (changed(pre_tokenizer=PREFIXED), "add_prefix_space: found true, expected false"),
        (changed(model__dropout=0.1), r"model\.dropout: found 0\.1, expected .* null there"),
        (changed(model__continuing_subword_prefix="x"), r"model\.continuing_subword_prefix: found 'x'"),
        (changed(model__end_of_word_suffix="</w>"), r"model\.end_of_word_suffix: found '</w>'"),
        (without_byte(), "found no token for 1 of the 256 bytes"),
        (with_token(plain(), "~~~", 0), r"model\.vocab: found id 0 more than once"),
        (with_token(plain(), "~~~", 2**31), "found id 2,147,483,648, expected less than 4,194,304"),
        (special_at(9999), r"found id 9999 for '<\|patch\|>', which .* reads as 396"),
        (special_at(BPE_SIZE), r"found id 380 for '<\|patch\|>' and for '<\|begin_of_text\|>'"),
        (reachable(), r"found the special token 'as' as one that text is encoded to"),
        (whole_words(), r"found the special token '<\|begin_of_text\|>' as one that text is encoded to"),
        (changed(model__vocab=[]), "the library `tokenizers` cannot read it"),
        (changed(added_tokens=[{"id": 5}]), "the library `tokenizers` cannot read it"),
        (changed(model__merges=["a"]), "the library `tokenizers` cannot read it"),
        ({"digest": "abc", "bpe": None}, r"found JSON with the fields \['bpe', 'digest'\] and no model"),
        (changed(model=None), "and no model, expected"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(content, message):
    with pytest.raises(UserError, match=rf"a/tokenizer\.json: .*{message}"):
        read(content)


@pytest.mark.parametrize("text", ["", "[]", "null", '"text"', "{", "[" * 10**5, '{"model": {}}', '{"model": 3}'])
def test_what_is_no_tokenizer_at_all_is_refused(text):
    with pytest.raises(UserError, match=r"^the tokenizer: .*expected|^the tokenizer: the library"):
        Tokenizer(text)


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_no_damage_gets_past_the_user_error(seed, times):
    rng = random.Random(seed)
    content = plain()
    for _ in range(times):
        inner: Any = content
        while True:
            key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.8:
                inner = inner[key]
                continue
            if rng.random() < 0.3:
                del inner[key]
            else:
                inner[key] = rng.choice([None, -1, 3, 2**40, "", "x", "é", [], {}, True, 0.5, ["a", "b"]])
            break
        if not content:
            break
    try:
        assert isinstance(read(content).encode(TEXT), list)
    except UserError as error:
        assert str(error).startswith("a/tokenizer.json: ")
