"""Where documents come from: an index of tokens, lengths and tiles for each source, and documents by number.

Everything that decides a document's length happens here, when the index is made, and is kept in the cache. Pictures are
drawn when a document is read.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import cache, scene_text, text
from data import scenes as drawn
from data.config import DataConfig, ImageSpec
from data.images import choose_canvas, layout, tile_count, tiles
from data.tokenizer import (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    IMAGE_TOKENS,
    TEXT_TOKENS,
    Tokenizer,
    load_bpe,
    load_bytes,
    load_file,
)
from sharding.errors import UserError

HELD_OUT_SCENES = 4096

_FORMAT = "2"
_SCENES_FOR_TOKENIZER = 2000


class Document(NamedTuple):
    """One document, ready to be packed."""

    tokens_S: np.ndarray
    """int32 [S'], begin-of-text first."""
    weights_S: np.ndarray
    """float32 [S'], weight of each token as a target; 0 for begin-of-text and image tokens."""
    tiles_M: np.ndarray | None
    """uint8 [M', t, t, 3]; None without pictures. Their patch tokens stand in the same order in the text."""


@dataclass(frozen=True)
class Source:
    """Numbered documents of one kind."""

    name: str
    tokens: np.ndarray
    """Token ids of all documents, one after the other."""
    answers: np.ndarray
    """bool, the same shape: tokens that answer a question."""
    starts: np.ndarray
    """int64 [documents + 1]: where each begins in `tokens`."""
    tile_counts: np.ndarray
    """int32 [documents]."""
    unweighted: tuple[int, ...]
    """Ids that are never predicted."""
    answer_weight: float = 1.0
    make_tiles: Callable[[int], np.ndarray] | None = None
    notes: tuple[str, ...] = ()
    """What is missing or out of the ordinary, one line for the user each."""

    def __len__(self) -> int:
        return len(self.tile_counts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each."""
        return np.diff(self.starts)

    def document(self, i: int) -> Document:
        """Document number i."""
        span = slice(self.starts[i], self.starts[i + 1])
        tokens_S = self.tokens[span].astype(np.int32)
        weights_S = np.where(self.answers[span], np.float32(self.answer_weight), np.float32(1))
        weights_S[np.isin(tokens_S, self.unweighted)] = 0
        return Document(tokens_S, weights_S, self.make_tiles(i) if self.make_tiles else None)


def load_tokenizer(config: DataConfig, image: ImageSpec | None) -> Tokenizer:
    """The tokenizer that the options name; a BPE is trained on the training split, or taken from the cache.

    Raises:
        UserError: there is none under that name, it cannot be used, or it lacks a special token that the data needs.
    """
    with_scenes = config.mixture.get("scenes", 0) > 0
    if config.tokenizer == "bytes":
        return load_bytes()
    if config.tokenizer != "bpe":
        try:
            tokenizer = load_file(config.tokenizer)
            tokenizer.require((*TEXT_TOKENS, *IMAGE_TOKENS) if with_scenes else TEXT_TOKENS)
        except UserError as error:
            raise UserError(f"data.tokenizer (bpe, bytes or a path): {error}") from error
        return tokenizer
    texts = []
    if config.mixture.get("text", 0) > 0:
        texts += [file.text for file in text.standard_library().files if not file.held_out]
    if image is not None and with_scenes:
        for index in range(_SCENES_FOR_TOKENIZER):
            _, pieces = _scene_document(config, image, index)
            texts.append("".join(piece.text for piece in pieces))
    return load_bpe(texts, config.tokenizer_size, cache_folder(config))


def load_sources(config: DataConfig, image: ImageSpec | None, held_out: bool, tokenizer: Tokenizer) -> list[Source]:
    """The sources of the mixture, in the order of their names.

    Raises:
        UserError: a document does not fit a row.
    """
    makers: Mapping[str, Callable[[], Source]] = {
        "scenes": lambda: _scenes(config, image, held_out, tokenizer),
        "text": lambda: _text(config, held_out, tokenizer),
    }
    return [makers[name]() for name in source_names(config)]


def source_names(config: DataConfig) -> tuple[str, ...]:
    """Sources with a weight above zero, sorted."""
    return tuple(sorted(name for name, weight in config.mixture.items() if weight > 0))


def cache_folder(config: DataConfig) -> Path:
    return Path(config.cache_dir).expanduser()


def scene_prefix(scene: drawn.Scene, image: ImageSpec, tokenizer: Tokenizer) -> list[int]:
    """Tokens that a scene's document begins with: begin-of-text and the picture."""
    names = layout(choose_canvas(scene.height, scene.width, image), image)
    return [tokenizer.special[BEGIN_OF_TEXT], *(tokenizer.special[name] for name in names)]


def _text(config: DataConfig, held_out: bool, tokenizer: Tokenizer) -> Source:
    corpus = text.standard_library()
    files = [file for file in corpus.files if file.held_out == held_out]
    name = _cache_name("text", text.digest(files), tokenizer.digest, config.sequence_length)
    stored = cache.arrays(cache_folder(config), name, lambda: _index_text(files, tokenizer, config.sequence_length))
    notes, cut = corpus.notes, int(stored["cut_within_line"])
    if cut:
        documents = f"{'held-out ' if held_out else ''}{'document was' if cut == 1 else 'documents were'}"
        notes += (f"text: {cut} {documents} cut within a line to fit {config.sequence_length} tokens",)
    return Source(
        name="text",
        tokens=stored["tokens"],
        answers=np.broadcast_to(np.False_, stored["tokens"].shape),
        starts=stored["starts"],
        tile_counts=np.zeros(len(stored["starts"]) - 1, np.int32),
        unweighted=(tokenizer.special[BEGIN_OF_TEXT],),
        notes=notes,
    )


def _index_text(files: list[text.TextFile], tokenizer: Tokenizer, limit: int) -> dict[str, np.ndarray]:
    """Cuts files into documents of at most `limit` tokens, before the end of a line where lines are short enough.

    Each document begins with begin-of-text; the last of a file ends with end-of-text. A line that is longer than a
    document is cut within; how many were is kept with the index.
    """
    begin, end = tokenizer.special[BEGIN_OF_TEXT], tokenizer.special[END_OF_TEXT]
    if limit < 3:
        raise UserError(f"data.sequence_length: found {limit}, expected at least 3 (both ends of a text and a token)")
    documents, starts, cut_within = [], [0], 0
    for ids in tokenizer.encode_many([file.text for file in files]):
        ids_S = np.array([*ids, end])
        breaks = np.flatnonzero(tokenizer.begins_line[ids_S])
        at = 0
        while at < len(ids_S):
            stop = min(at + limit - 1, len(ids_S))
            if stop < len(ids_S):
                earlier = int(np.searchsorted(breaks, stop, side="right")) - 1
                if earlier >= 0 and breaks[earlier] > at:
                    stop = int(breaks[earlier])
                else:
                    cut_within += 1
            documents += [[begin], ids_S[at:stop]]
            starts.append(starts[-1] + 1 + stop - at)
            at = stop
    return {
        "tokens": _compact(np.concatenate(documents), tokenizer),
        "starts": np.array(starts, np.int64),
        "cut_within_line": np.array(cut_within, np.int64),
    }


def _scenes(config: DataConfig, image: ImageSpec | None, held_out: bool, tokenizer: Tokenizer) -> Source:
    if image is None:
        raise UserError(
            "data.mixture.scenes: drawn scenes need an image encoder. Set model.vision, or the weight to 0."
        )
    first = drawn.HELD_OUT_START if held_out else 0
    count = HELD_OUT_SCENES if held_out else config.scenes
    code = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in (drawn, scene_text)))
    parts = (code.hexdigest(), tokenizer.digest, config.seed, first, count, image)
    stored = cache.arrays(
        cache_folder(config),
        _cache_name("scenes", *parts),
        lambda: _index_scenes(config, image, range(first, first + count), tokenizer),
    )
    tile_counts, longest = stored["tile_counts"], int(np.diff(stored["starts"]).max())
    if longest > config.sequence_length:
        raise UserError(
            f"data.sequence_length: found {config.sequence_length}, expected at least {longest} for the longest scene "
            f"({image.tokens_per_tile} tokens per tile). Raise it, raise model.vision.shuffle or lower data.max_tiles."
        )
    if int(tile_counts.max()) > config.tiles_per_row:
        raise UserError(
            f"data.tiles_per_row: found {config.tiles_per_row}, expected at least {int(tile_counts.max())}, as many as "
            "the largest drawn scene has. Raise it, or lower data.max_tiles."
        )
    return Source(
        name="scenes",
        tokens=stored["tokens"],
        answers=stored["answers"],
        starts=stored["starts"],
        tile_counts=tile_counts,
        unweighted=tuple(tokenizer.special[name] for name in (BEGIN_OF_TEXT, *IMAGE_TOKENS)),
        answer_weight=config.answer_weight,
        make_tiles=partial(_scene_tiles, config.seed, first, image),
    )


def _scene_tiles(seed: int, first: int, image: ImageSpec, i: int) -> np.ndarray:
    return tiles(drawn.draw(drawn.make_scene(seed, first + i, image)), image)[0]


def _scene_document(config: DataConfig, image: ImageSpec, index: int) -> tuple[drawn.Scene, list[scene_text.Piece]]:
    scene = drawn.make_scene(config.seed, index, image)
    return scene, scene_text.document(scene, random.Random(f"text/{config.seed}/{index}"))


def _index_scenes(config: DataConfig, image: ImageSpec, indices: range, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    encoded: dict[str, list[int]] = {}  # the same few thousand pieces make up all documents
    end = tokenizer.special[END_OF_TEXT]
    tokens: list[int] = []
    answers: list[bool] = []
    starts = [0]
    tile_counts = []
    for index in indices:
        scene, pieces = _scene_document(config, image, index)
        prefix = scene_prefix(scene, image, tokenizer)
        tokens += prefix
        answers += [False] * len(prefix)
        for piece in pieces:
            ids = encoded.get(piece.text)
            if ids is None:
                ids = encoded[piece.text] = tokenizer.encode(piece.text)
            tokens += ids
            answers += [piece.answer] * len(ids)
        tokens.append(end)
        answers.append(False)
        starts.append(len(tokens))
        tile_counts.append(tile_count(choose_canvas(scene.height, scene.width, image)))
    return {
        "tokens": _compact(tokens, tokenizer),
        "answers": np.array(answers, bool),
        "starts": np.array(starts, np.int64),
        "tile_counts": np.array(tile_counts, np.int32),
    }


def _compact(tokens: list[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    return np.asarray(tokens, np.uint16 if tokenizer.size <= 2**16 else np.int32)


def _cache_name(source: str, *parts: object) -> str:
    return f"{source}-{hashlib.sha256(repr((_FORMAT, *parts)).encode()).hexdigest()[:32]}"
