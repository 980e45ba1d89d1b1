"""Text to token ids and back: a byte-level BPE trained on the training split, plain bytes, or a tokenizer.json.

All three are kept in one form, a Hugging Face tokenizer.json. Special tokens have Llama 4's names and are found by them,
never by number. They come from `Tokenizer.special` alone: text that spells one out, such as "<|patch|>", is encoded like
any other text. Every byte is a token, so that every string round-trips (but for what the normalizer of a tokenizer.json
changes; Llama 4's has none).
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as _Bpe
from tokenizers import decoders, models, pre_tokenizers, trainers

from data import cache, tokenizer_json
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
HEADER_START = "<|header_start|>"
HEADER_END = "<|header_end|>"
TURN_END = "<|eot|>"
VIDEO_START = "<|video_start|>"
VIDEO_END = "<|video_end|>"
AUDIO_START = "<|audio_start|>"
AUDIO_END = "<|audio_end|>"
AUDIO = "<|audio|>"

TEXT_TOKENS = (BEGIN_OF_TEXT, END_OF_TEXT, PAD)
"""Tokens that every document or row needs."""
IMAGE_TOKENS = (IMAGE_START, IMAGE_END, TILE_X_SEPARATOR, TILE_Y_SEPARATOR, IMAGE, PATCH)
"""Tokens that stand for a picture. They are never predicted: as targets they have weight 0."""
TURN_TOKENS = (HEADER_START, HEADER_END, TURN_END)
"""Tokens of conversations."""
VIDEO_TOKENS = (VIDEO_START, VIDEO_END)
AUDIO_TOKENS = (AUDIO_START, AUDIO_END, AUDIO)
"""Tokens that stand for videos, with those of pictures, and for sounds. They are ours, not Llama 4's, and never predicted."""
SPECIAL_TOKENS = (*TEXT_TOKENS, *IMAGE_TOKENS, *TURN_TOKENS, *VIDEO_TOKENS, *AUDIO_TOKENS)
"""Special tokens of the tokenizers made here, in the order of their ids."""

_FORMAT = "3"
_BYTES = 256
SMALLEST_BPE = _BYTES + len(SPECIAL_TOKENS)
"""Tokens that each one has: every byte and the special tokens."""
_FILE_NAME = "tokenizer.json"
_OTHER_FORMATS = {
    ".model": "a SentencePiece or tiktoken file",
    ".tiktoken": "a tiktoken file",
    ".pkl": "a pickle, which runs its author's code",
    ".pickle": "a pickle, which runs its author's code",
    ".pt": "a pickle, which runs its author's code",
    ".bin": "a pickle, which runs its author's code",
}
_HOW_TO_CONVERT = (
    "Take the tokenizer.json of the same model on Hugging Face, or let transformers write one: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
)


class Tokenizer:
    """Token ids of text.

    Attributes:
        serialised: the whole tokenizer.json, as it was given.
        source: where it comes from, for messages.
        special: id of each special token, by name. Asking for one that is not there raises `UserError`.
        size: the highest id and one. Ids below it may be without a token.
        digest: sha256 of what decides the ids of a text; equal digests encode alike.
        byte_lengths: int32 [V], bytes of text that each token stands for; 0 for special tokens.
    """

    def __init__(self, serialised: str, source: str = "the tokenizer"):
        """`serialised`: a complete tokenizer.json.

        Raises:
            UserError: it is no byte-level BPE in that form; the message begins with `source`.
        """
        self.serialised, self.source = serialised, source
        self._bpe, self._bytes, special, self.digest = tokenizer_json.read(serialised, source)
        self.special: dict[str, int] = _Special(special, source)
        self.size = max(self._bytes) + 1
        self.byte_lengths = np.array([len(self.token_bytes(i)) for i in range(self.size)], np.int32)

    def __reduce__(self):
        return Tokenizer, (self.serialised, self.source)

    def require(self, names: Iterable[str]) -> None:
        """Raises `UserError` that lists those of the names that are no special tokens of this tokenizer."""
        missing = [name for name in names if name not in self.special]
        if missing:
            raise _missing(missing, self.source)

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Code points without UTF-8 (lone surrogates) become question marks."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, encoded apart."""
        encoded = [_encodable(text) for text in texts]
        return [e.ids for e in self._bpe.encode_batch_fast(encoded, add_special_tokens=False)]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of the text, and for each where it ends, in characters."""
        encoded = self._bpe.encode(_encodable(text), add_special_tokens=False)
        return encoded.ids, [end for _, end in encoded.offsets]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id; none for a special token, or for an id without a token."""
        return self._bytes.get(i, b"")


class _Special(dict[str, int]):
    """Ids of special tokens by name; one that is not there is an error for the user."""

    def __init__(self, ids: dict[str, int], source: str):
        super().__init__(ids)
        self._source = source

    def __missing__(self, name: str) -> int:
        raise _missing([name], self._source)


def load_bytes() -> Tokenizer:
    """One token per byte of UTF-8, its id the value of the byte, then `SPECIAL_TOKENS`."""
    bpe = _Bpe(models.BPE(vocab=tokenizer_json.byte_of_character(), merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return Tokenizer(_completed(bpe), "the tokenizer of plain bytes")


def load_bpe(texts: Sequence[str], size: int, cache_dir: Path) -> Tokenizer:
    """The BPE trained on these texts, then `SPECIAL_TOKENS`; out of the cache if it was trained before.

    Args:
        texts: the training split.
        size: ids wanted, special tokens included; a corpus too small for it gives fewer.
        cache_dir: where it is kept, under a digest of the texts and the size.

    Raises:
        UserError: the size has no room for the bytes and the special tokens.
    """
    if size < SMALLEST_BPE:
        raise UserError(
            f"data.tokenizer_size: found {size}, expected at least {SMALLEST_BPE} (every byte and {len(SPECIAL_TOKENS)} "
            "special tokens). Raise it, or set data.tokenizer=bytes."
        )
    trained_on = hashlib.sha256(f"bpe {_FORMAT} {size} {SPECIAL_TOKENS}".encode())
    for text in texts:
        encoded = text.encode("utf-8", "replace")
        trained_on.update(len(encoded).to_bytes(8, "big") + encoded)
    name = f"tokenizer-{trained_on.hexdigest()[:32]}.json"
    return Tokenizer(cache.text_file(cache_dir, name, lambda: _train(texts, size)), str(cache_dir / name))


def train_bpe(texts: Sequence[str], size: int) -> Tokenizer:
    """The same, trained now; `size` is `SMALLEST_BPE` or more."""
    return Tokenizer(_train(texts, size), "the tokenizer trained here")


def load_file(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder that holds one. Its text is kept byte for byte.

    Raises:
        UserError: it cannot be read, or is no byte-level BPE; the message begins with the path.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if not (path / _FILE_NAME).exists() and (path / "tokenizer.model").exists():
            raise UserError(f"{path}: found tokenizer.model, expected {_FILE_NAME}. {_HOW_TO_CONVERT}")
        path = path / _FILE_NAME
    found = _OTHER_FORMATS.get(path.suffix)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file, expected a {_FILE_NAME}. Check the path.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a {_FILE_NAME}.") from error
    if content.startswith(b"\x80"):  # every pickle since protocol 2
        found = _OTHER_FORMATS[".pkl"]
    if found:
        raise UserError(f"{path}: found {found}, expected a {_FILE_NAME}. {_HOW_TO_CONVERT}")
    try:
        return Tokenizer(content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found no UTF-8 text ({error.reason}), expected a {_FILE_NAME}.") from None


def _train(texts: Sequence[str], size: int) -> str:
    bpe = _Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((_encodable(text) for text in texts), trainer)
    return _completed(bpe)


def _completed(bpe: _Bpe) -> str:
    """The tokenizer.json of a BPE with our special tokens after its ids, and with what other programs decode by."""
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    return bpe.to_str()


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _missing(names: Sequence[str], source: str) -> UserError:
    return UserError(
        f"{source}: found no special token {', '.join(names)}, expected it under Llama 4's name. Use a tokenizer that "
        'has it, or add it to the file\'s added_tokens, with "special": true.'
    )
