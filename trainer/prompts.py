"""Texts and image files as what a model reads: token ids, tiles, and which tokens a tile's features replace."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.chat import Message, chat_tokens
from data.config import ImageSpec
from data.images import layout, load_image, tiles
from data.sequence import Token
from data.tokenizer import BEGIN_OF_TEXT, IMAGE_TOKENS, PATCH, Tokenizer
from sharding.errors import UserError
from trainer.decode import Prompt
from trainer.models import LoadedModel

Part = str | Path
"""Text, or the file of an image."""


def document(model: LoadedModel, parts: Sequence[Part]) -> Prompt:
    """Begin-of-text, then the parts in their order.

    Raises:
        UserError: an image cannot be read, the model has no vision encoder, or there is no tokenizer.
    """
    tokenizer = model.need_tokenizer()
    ids, cut = [tokenizer.special[BEGIN_OF_TEXT]], []
    for part in parts:
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        else:
            picture = _picture(part, model, tokenizer, cut)
            ids += [tokenizer.special[token.name] for token in picture]
    return _prompt(ids, cut, tokenizer)


def conversation(model: LoadedModel, messages: Sequence[tuple[str, Sequence[Part]]], ask: bool) -> Prompt:
    """(role, parts) of each turn, in Llama 4's format; with `ask`, up to where the assistant is to speak.

    Raises:
        UserError: see `document`; a role is unknown, or the tokenizer has no tokens for turns.
    """
    tokenizer = model.need_tokenizer()
    cut: list[np.ndarray] = []
    turns = [
        Message(role, [part if isinstance(part, str) else _picture(part, model, tokenizer, cut) for part in parts])
        for role, parts in messages
    ]
    return _prompt(chat_tokens(tokenizer, turns, ask), cut, tokenizer)


def _picture(path: Path, model: LoadedModel, tokenizer: Tokenizer, cut: list[np.ndarray]) -> list[Token]:
    """The tokens of an image, whose tiles are appended to `cut`."""
    spec = need_images(model)
    tokenizer.require(IMAGE_TOKENS)
    tiles_M, canvas = tiles(load_image(path), spec)
    cut.append(tiles_M)
    return [Token(name) for name in layout(canvas, spec)]


def need_images(model: LoadedModel) -> ImageSpec:
    """How the model sees images; raises `UserError` where it has no vision encoder."""
    spec = model.run.image_spec
    if spec is None:
        raise UserError(f"image: the model of {model.origin} has no vision encoder (model.vision is None).")
    return spec


def _prompt(ids: Sequence[int], cut: Sequence[np.ndarray], tokenizer: Tokenizer) -> Prompt:
    tokens = np.asarray(ids, np.int32)
    if not cut:
        return Prompt(tokens)
    tiles_M = np.concatenate(cut)
    return Prompt(tokens, tiles_M, np.flatnonzero(tokens == tokenizer.special[PATCH]).reshape(len(tiles_M), -1))
