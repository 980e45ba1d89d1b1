"""Texts and special tokens, one after the other, as token ids with their weights in the loss."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from data.tokenizer import Tokenizer


class Text(NamedTuple):
    """A text. What stands between two tokens or ends is encoded as one, whatever texts it was given in."""

    text: str
    weight: float = 1.0


class Token(NamedTuple):
    """A special token."""

    name: str
    weight: float = 0.0


class End(NamedTuple):
    """Here one text ends, and the next is encoded by itself; with a number, that of the file that stands here."""

    file: int | None = None


Piece = Text | Token | End


class Encoded(NamedTuple):
    """A sequence of tokens."""

    ids: list[int]
    weights: np.ndarray
    """float32, of each token."""
    files: list[tuple[int, int]]
    """(tokens before it, its number) of each file, in order."""


def encode(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Encoded:
    """Token ids of the pieces. A token that is part of two texts has the weight of the one in which it ends."""
    ids: list[int] = []
    weights: list[np.ndarray] = []
    files: list[tuple[int, int]] = []
    texts: list[Text] = []

    def place_text() -> None:
        text = "".join(text for text, _ in texts)
        if len({weight for text, weight in texts if text}) < 2:
            encoded = tokenizer.encode(text)
            weights.append(np.full(len(encoded), next((weight for text, weight in texts if text), 0), np.float32))
        else:
            encoded, ends = tokenizer.encode_with_ends(text)
            of_text = np.searchsorted(np.cumsum([len(text) for text, _ in texts]), ends)
            weights.append(np.array([weight for _, weight in texts], np.float32)[of_text])
        ids.extend(encoded)
        texts.clear()

    for piece in pieces:
        if isinstance(piece, Text):
            texts.append(piece)
            continue
        if texts:
            place_text()
        if isinstance(piece, Token):
            ids.append(tokenizer.special[piece.name])
            weights.append(np.array([piece.weight], np.float32))
        elif piece.file is not None:
            files.append((len(ids), piece.file))
    if texts:
        place_text()
    return Encoded(ids, np.concatenate([np.zeros(0, np.float32), *weights]), files)
