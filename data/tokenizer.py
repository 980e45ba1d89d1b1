"""Text to token ids and back: a byte-level BPE trained on the training split, or plain bytes.

Special tokens have Llama 4's names and take the last ids. They come from `Tokenizer.special` alone: text that spells
one out, such as "<|patch|>", is encoded like any other text. Every byte is a token, so that every string round-trips.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as _Bpe
from tokenizers import models, pre_tokenizers, trainers

from data import cache
from sharding.errors import UserError

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
PAD = "<|finetune_right_pad|>"
IMAGE_START = "<|image_start|>"
IMAGE_END = "<|image_end|>"
TILE_X_SEPARATOR = "<|tile_x_separator|>"
TILE_Y_SEPARATOR = "<|tile_y_separator|>"
IMAGE = "<|image|>"
PATCH = "<|patch|>"

IMAGE_TOKENS = (IMAGE_START, IMAGE_END, TILE_X_SEPARATOR, TILE_Y_SEPARATOR, IMAGE, PATCH)
"""Tokens that stand for a picture. They are never predicted: as targets they have weight 0."""
SPECIAL_TOKENS = (BEGIN_OF_TEXT, END_OF_TEXT, PAD, *IMAGE_TOKENS)

_FORMAT = "1"
_BYTES = 256


class Tokenizer:
    """Token ids of text.

    Attributes:
        special: id of each special token, by name.
        size: number of ids, special tokens included.
        digest: names the vocabulary; equal digests encode alike.
        serialised: the BPE in the format of the `tokenizers` library; None for plain bytes.
        byte_lengths: int32 [V], bytes of text that each token stands for; 0 for special tokens.
        begins_line: bool [V], tokens that begin with a line feed (with indentation, they are one token).
    """

    def __init__(self, bpe: str | None = None):
        """`bpe`: a serialised BPE in the format of the `tokenizers` library; None for plain bytes."""
        self.serialised = bpe
        self._bpe = None if bpe is None else _Bpe.from_str(bpe)
        self._bytes = [bytes([i]) for i in range(_BYTES)] if self._bpe is None else _token_bytes(self._bpe)
        self.special = {name: len(self._bytes) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.size = len(self._bytes) + len(SPECIAL_TOKENS)
        self.byte_lengths = np.array([len(token) for token in self._bytes] + [0] * len(SPECIAL_TOKENS), np.int32)
        self.begins_line = np.array([t.startswith(b"\n") for t in self._bytes] + [False] * len(SPECIAL_TOKENS))
        self.digest = hashlib.sha256(f"{SPECIAL_TOKENS} {bpe}".encode()).hexdigest()

    def __reduce__(self):
        return Tokenizer, (self.serialised,)

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Code points without UTF-8 (lone surrogates) become question marks."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, encoded apart."""
        encoded = [text.encode("utf-8", "replace") for text in texts]
        if self._bpe is None:
            return [list(text) for text in encoded]
        return [e.ids for e in self._bpe.encode_batch_fast([text.decode() for text in encoded])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id; none for a special token, or for an id beyond the vocabulary."""
        return self._bytes[i] if i < len(self._bytes) else b""


def load_bytes() -> Tokenizer:
    """One token per byte of UTF-8."""
    return Tokenizer()


def load_bpe(texts: Sequence[str], size: int, cache_dir: Path) -> Tokenizer:
    """The BPE trained on these texts, out of the cache if it was trained before.

    Args:
        texts: the training split.
        size: ids wanted, special tokens included; a corpus too small for it gives fewer.
        cache_dir: where it is kept, under a digest of the texts and the size.

    Raises:
        UserError: the size has no room for the bytes and the special tokens.
    """
    smallest = _BYTES + len(SPECIAL_TOKENS)
    if size < smallest:
        raise UserError(
            f"data.tokenizer_size: found {size}, expected at least {smallest} (every byte and {len(SPECIAL_TOKENS)} "
            "special tokens). Raise it, or set data.tokenizer=bytes."
        )
    trained_on = hashlib.sha256(f"bpe {_FORMAT} {size} {SPECIAL_TOKENS}".encode())
    for text in texts:
        encoded = text.encode("utf-8", "replace")
        trained_on.update(len(encoded).to_bytes(8, "big") + encoded)
    name = f"tokenizer-{trained_on.hexdigest()[:32]}.json"
    return Tokenizer(cache.text_file(cache_dir, name, lambda: _train(texts, size)))


def _train(texts: Sequence[str], size: int) -> str:
    bpe = _Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text.encode("utf-8", "replace").decode() for text in texts), trainer)
    return bpe.to_str()


def _token_bytes(bpe: _Bpe) -> list[bytes]:
    """The bytes of each token: the library spells a byte as a printable character."""
    vocabulary = json.loads(bpe.to_str())["model"]["vocab"]
    table = _byte_of_character()
    tokens = [b""] * len(vocabulary)
    for token, i in vocabulary.items():
        tokens[i] = bytes(table[character] for character in token)
    return tokens


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for characters from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
