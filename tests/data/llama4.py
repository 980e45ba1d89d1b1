"""A tokenizer.json with everything that Llama 4's has, in miniature: made by the library, special tokens in between."""

import functools
import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from data.tokenizer import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    HEADER_END,
    HEADER_START,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    PAD,
    PATCH,
    TILE_X_SEPARATOR,
    TILE_Y_SEPARATOR,
    TURN_END,
)

SPECIAL = (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    "<|fim_prefix|>",
    HEADER_START,
    HEADER_END,
    "<|eom|>",
    TURN_END,
    "<|reserved_special_token_0|>",
    PAD,
    IMAGE_START,
    IMAGE_END,
    "<|reserved_special_token_1|>",
    TILE_X_SEPARATOR,
    TILE_Y_SEPARATOR,
    IMAGE,
    "<|reserved_special_token_2|>",
    PATCH,
)
BPE_SIZE = 380
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = (
    rf"{_WORD}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_ENDING}|{_WORD}+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of o200k, which Llama 4 has."""
CORPUS = (
    "The quick brown fox's jump over 12345 lazy dogs.\n\n    It is what it is: a THING, isn't it?\r\n" * 30,
    "def f(x):\n    return {x: [1, 2, 3]}\n\n\nclass Thing(Base):\n    pass\n" * 60,
    "ünïcödé 漢字 🙂 Ελληνικά what colour is the ring? blue\n" * 10,
)


@functools.cache
def serialised() -> str:
    """Ids 0 to 379 are a BPE, then come the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=BPE_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A", special_tokens=[(BEGIN_OF_TEXT, BPE_SIZE)]
    )
    return tokenizer.to_str(pretty=True)


def plain() -> dict[str, Any]:
    """The same as an object of its own, to be changed."""
    return json.loads(serialised())
