"""What a tokenizer.json says, once it is known to be a byte-level BPE in which every byte is a token.

The format is that of the library `tokenizers` (its `Tokenizer.to_str`), in which Hugging Face models carry theirs. The
library reads more kinds than can be used here: what would lose bytes, add tokens or change with each call is refused.
"""

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Library

from sharding.errors import UserError

_MOST_IDS = 2**22


class Content(NamedTuple):
    """A tokenizer.json, read and checked."""

    library: Library
    """Encodes. Text that spells a special token stays text; nothing is added, cut or padded."""
    token_bytes: dict[int, bytes]
    """The bytes that each id stands for; none for special tokens."""
    special: dict[str, int]
    """Id of each special token, by name."""
    digest: str
    """Names how text is encoded, see `digest`."""


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for characters from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def read(serialised: str, source: str) -> Content:
    """Reads the text of a tokenizer.json.

    Args:
        serialised: the text.
        source: where it comes from, for messages.

    Raises:
        UserError: it is no tokenizer.json, or one of a kind that cannot be used; the message says which.
    """
    plain = _parsed(serialised, source)
    try:
        library = Library.from_str(serialised)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{source}: the library `tokenizers` cannot read it ({error}). Copy it again.") from error
    for problem in _problems(plain, library):
        raise UserError(f"{source}: {problem}")
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    added = _added_tokens(plain)
    token_bytes = {i: _token_bytes(token) for token, i in plain["model"]["vocab"].items()}
    token_bytes |= {token["id"]: b"" if token["special"] else token["content"].encode() for token in added}
    special = {token["content"]: token["id"] for token in added if token["special"]}
    return Content(library, token_bytes, special, digest(plain))


def digest(plain: dict[str, Any]) -> str:
    """Sha256 of what decides the ids of a text: vocabulary, merges, normalizer, pre-tokenizer and added tokens.

    How that is written down makes no difference: the order of fields, "a b" or ["a", "b"] for a merge, fields that are
    absent or have their default. What does not touch the ids of a text is left out: decoder, post-processor, offsets.
    """
    model = plain["model"]
    decisive = {
        "vocab": model["vocab"],
        "merges": _merges(plain),
        "ignore_merges": bool(model.get("ignore_merges")),
        "normalizer": _canonical(plain.get("normalizer")),
        "pre_tokenizer": _canonical(plain["pre_tokenizer"]),
        "added_tokens": sorted((_canonical(token) for token in _added_tokens(plain)), key=lambda token: token["id"]),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _parsed(serialised: str, source: str) -> dict[str, Any]:
    """The JSON, if it is near enough to be handed to the library."""
    expected = "expected the tokenizer.json of a byte-level BPE"
    try:
        plain = json.loads(serialised)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: found no JSON ({error}), {expected}. Copy it again, all of it.") from None
    if not isinstance(plain, dict) or not isinstance(plain.get("model"), dict):
        found = f"the fields {sorted(plain)[:8]}" if isinstance(plain, dict) else f"a {type(plain).__name__}"
        raise UserError(f"{source}: found JSON with {found} and no model, {expected}.")
    kind = plain["model"].get("type", "BPE")  # early files of the library do not name it
    if kind != "BPE":
        raise UserError(f"{source}: found a {kind} model, {expected}. Use a tokenizer of that kind, as Llama 4's is.")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):  # of some, the library dies
        if plain["model"].get(name):
            raise UserError(
                f"{source}: model.{name}: found {plain['model'][name]!r}, {expected}, which has null there."
            )
    return plain


def _problems(plain: dict[str, Any], library: Library) -> Iterator[str]:
    """Why this tokenizer cannot be used, in sentences. The library has read it, so its types are right."""
    model = plain["model"]
    vocabulary, added = model["vocab"], _added_tokens(plain)
    byte_level = [step for step in _steps(plain.get("pre_tokenizer")) if step["type"] == "ByteLevel"]
    if not byte_level:
        yield "found no ByteLevel pre-tokenizer, expected a byte-level BPE. Use a tokenizer of that kind."
    elif any(step["add_prefix_space"] for step in byte_level):
        yield "pre_tokenizer.add_prefix_space: found true, expected false: a space would begin every piece of text."
    if missing := [byte for character, byte in byte_of_character().items() if character not in vocabulary]:
        yield f"model.vocab: found no token for {len(missing)} of the 256 bytes, expected one each; text would be lost."
    if (twice := _first_twice(vocabulary.values())) is not None:
        yield f"model.vocab: found id {twice} more than once, expected one token for each id."
    highest = max([*vocabulary.values(), *(token["id"] for token in added)])
    if highest >= _MOST_IDS:
        yield f"found id {highest:,}, expected less than {_MOST_IDS:,}; an embedding has a row for every id below."
    names = {i: token for token, i in vocabulary.items()}
    for token in added:
        name, i = token["content"], token["id"]
        if names.setdefault(i, name) != name:
            yield f"added_tokens: found id {i} for {name!r} and for {names[i]!r}, expected one token for each id."
        if (number := library.token_to_id(name)) != i:
            yield (
                f"added_tokens: found id {i} for {name!r}, which the library `tokenizers`, and with it transformers, "
                f"reads as {number}: it counts on from the vocabulary. Keep ids without a gap there, or list the "
                "token in model.vocab too."
            )
    special = {token["content"] for token in added if token["special"]} & vocabulary.keys()
    if special:
        spelled = {a + b for a, b in _merges(plain)} | {name for name in special if len(name) == 1}
        for name in sorted(special if model.get("ignore_merges") else special & spelled):
            yield f"model.vocab: found the special token {name!r} as one that text is encoded to, expected it apart."


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner)]
    return [pre_tokenizer]


def _added_tokens(plain: dict[str, Any]) -> list[dict[str, Any]]:
    return plain.get("added_tokens") or []


def _merges(plain: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in plain["model"]["merges"])
    return [(first, second) for first, second in pairs]


def _first_twice(ids: Any) -> int | None:
    seen: set[int] = set()
    return next((i for i in ids if i in seen or seen.add(i)), None)


def _canonical(value: Any) -> Any:
    """Without fields that are null or false, as they are where they are absent, and without those that move offsets."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "ByteLevel":
        value = {"use_regex": True} | {key: item for key, item in value.items() if key != "trim_offsets"}
    return {key: _canonical(item) for key, item in value.items() if item is not None and item is not False}


def _token_bytes(token: str) -> bytes:
    """The library spells a byte as a printable character. What is spelled otherwise stands for itself."""
    table = byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()
