"""Where documents come from: prepared data sets, what of them is packed, and documents by number.

Everything that decides a document's length happens when its data set is prepared, or when the items for a row of this
length are listed; both are kept. Files are decoded when a document is read.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import builtin, cache, mixture
from data.augment import augmented
from data.config import BUILT_IN, Augmentation, DataConfig, MediaSpec
from data.documents import MEDIA
from data.items import COUNTS, Room, cut
from data.media import NEEDS, Media
from data.prepare import Told, prepare_built_in
from data.prepared import Prepared
from data.records import Record
from data.tokenizer import (
    BEGIN_OF_TEXT,
    TEXT_TOKENS,
    Tokenizer,
    load_bpe,
    load_bytes,
    load_file,
)
from sharding.errors import UserError


class Document(NamedTuple):
    """One document or a piece of one, ready to be placed in a row."""

    tokens_S: np.ndarray
    """int32 [S'], begin-of-text first."""
    weights_S: np.ndarray
    """float32 [S'], weight of each token as a target; 0 for begin-of-text and for what stands for files."""
    tiles_M: np.ndarray | None
    """uint8 [M', t, t, 3]; None without pictures. Their patch tokens stand in the same order in the text."""
    windows_A: np.ndarray | None
    """float32 [A', f, m]; None without sounds."""
    window_places_A: np.ndarray | None
    """int32 [A', tokens of a window], the index in the document of each audio token; -1 where a sound has ended."""


@dataclass(frozen=True)
class Source:
    """The items of one data set: its documents of a split, and pieces of long ones."""

    name: str
    data: Prepared
    media: Media
    begin: int
    """The id of begin-of-text."""
    documents: np.ndarray
    """int64 [I], number of each item's document."""
    starts: np.ndarray
    """int32 [I], first token of the document in the item."""
    stops: np.ndarray
    sizes: np.ndarray
    """int32 [I, 3], tokens, tiles and windows of sound of each item."""
    augment: tuple[Augmentation, ...]
    notes: tuple[str, ...]
    """What is missing or out of the ordinary, one line for the user each."""

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, items: Sequence[int], keys: Sequence[tuple[int, ...]] | None = None) -> list[Document]:
        """These items, their files decoded; with a key for each, images are changed as `augment` says, at random by it."""
        numbers = self.documents[np.asarray(items, np.int64)]
        records = self._records(numbers)
        every = zip(items, numbers.tolist(), records, keys or [None] * len(items), strict=True)
        return [self._document(*one) for one in every]

    def record(self, item: int) -> Record:
        """The record that an item is of."""
        return self._records(self.documents[item : item + 1])[0]

    def _records(self, numbers: np.ndarray) -> list[Record]:
        index = self.data.index
        return self.data.shards.read(
            list(zip(index.shards[numbers].tolist(), index.records[numbers].tolist(), strict=True))
        )

    def _document(self, item: int, number: int, record: Record, key: tuple[int, ...] | None) -> Document:
        start, stop = int(self.starts[item]), int(self.stops[item])
        first = int(self.data.index.file_starts[number])
        tokens, weights, blocks = [], [], []
        done = at = 0
        for i, file in enumerate(record.files):
            facts = tuple(self.data.index.facts[first + i].tolist())
            ids = self.media.ids(file.kind, facts)
            tokens += [record.tokens[done : file.at], ids]
            weights += [record.weights[done : file.at], np.zeros(len(ids), np.float32)]
            at, done = at + file.at - done, file.at
            if start <= at < stop:
                blocks.append((i, file, facts, at))
            at += len(ids)
        tokens_S = np.concatenate([*tokens, record.tokens[done:]])[start:stop]
        weights_S = np.concatenate([*weights, record.weights[done:]])[start:stop]
        if start:
            tokens_S = np.concatenate([[np.int32(self.begin)], tokens_S])
            weights_S = np.concatenate([[np.float32(0)], weights_S])
        if len(tokens_S) != (length := int(self.sizes[item, 0])):
            raise UserError(
                f"{self.data.folder}: document {record.id!r} has {len(tokens_S)} tokens, expected {length} by the "
                "index. The shards are not those of the index: copy or prepare the data again."
            )
        tiles, windows, places = [], [], []
        for i, file, facts, at in blocks:
            name = f"{self.data.folder}: document {record.id!r}, {file.kind} {i + 1}"
            if file.kind == "audio":
                cut_up = self.media.windows(file.data, facts, name)
                windows.append(cut_up)
                places.append(self._window_places(len(cut_up), facts, at - start + int(start > 0)))
            else:
                change = partial(augmented, names=self.augment, key=(*key, i)) if key and self.augment else None
                tiles.append(self.media.tiles(file.kind, file.data, facts, name, change))
        return Document(tokens_S, weights_S, _joined(tiles), _joined(windows), _joined(places))

    def _window_places(self, windows: int, facts: tuple[int, ...], at: int) -> np.ndarray:
        """int32 [windows, tokens of one]: where the audio tokens of a sound stand that begins at `at`."""
        spec = self.media.spec.audio
        assert spec
        count = self.media.size("audio", facts).tokens - 2
        places = np.arange(windows * spec.tokens_per_window, dtype=np.int32)
        return np.where(places < count, places + at + 1, -1).astype(np.int32).reshape(windows, -1)


def _joined(arrays: list[np.ndarray]) -> np.ndarray | None:
    return np.concatenate(arrays) if arrays else None


def load_tokenizer(config: DataConfig, media: MediaSpec, journal: Sequence[mixture.Change] = ()) -> Tokenizer:
    """The tokenizer that the options name; a BPE is trained on the training split, or taken from the cache: on that of the
    sources that a run began with, whatever its `journal` says of later ones.

    Raises:
        UserError: there is none under that name, it cannot be used, or it lacks a special token that the data needs.
    """
    prepared = [name for name in mixture.names(config) if name in config.paths]
    if config.tokenizer in ("bpe", "bytes") and prepared:
        folder = config.paths[prepared[0]]
        raise UserError(
            f"data.tokenizer: found {config.tokenizer}, which may not be the one that data.paths.{prepared[0]} was prepared "
            f"with. Set data.tokenizer={folder}."
        )
    if config.tokenizer == "bytes":
        return load_bytes()
    if config.tokenizer != "bpe":
        try:
            tokenizer = load_file(config.tokenizer)
            made = [name for name in mixture.names(config) if name in builtin.MADE]
            needed = [token for name in made for token in NEEDS[builtin.MADE[name]]]
            tokenizer.require((*TEXT_TOKENS, *needed))
        except UserError as error:
            raise UserError(f"data.tokenizer (bpe, bytes or a path): {error}") from error
        return tokenizer
    texts = builtin.tokenizer_texts(mixture.as_begun(config, journal), media.image)
    return load_bpe(texts, config.tokenizer_size, cache_folder(config))


def load_sources(
    config: DataConfig,
    media: MediaSpec,
    held_out: bool,
    tokenizer: Tokenizer,
    names: Sequence[str],
    tell: Callable[[Told], None],
) -> list[Source]:
    """The sources of these names; built-in ones are prepared if they are not in the cache.

    Raises:
        UserError: a data set cannot be used with these options.
    """
    return [_source(name, config, media, held_out, tokenizer, tell) for name in names]


def cache_folder(config: DataConfig) -> Path:
    return Path(config.cache_dir).expanduser()


def _source(
    name: str,
    config: DataConfig,
    spec: MediaSpec,
    held_out: bool,
    tokenizer: Tokenizer,
    tell: Callable[[Told], None],
) -> Source:
    if name in BUILT_IN:
        data = Prepared.open(_built_in(name, config, spec, tokenizer, tell))
        option, notes = f"data.mixture.{name}", builtin.notes(name)
    else:
        option, notes = f"data.paths.{name}", ()
        if name not in config.paths:
            raise UserError(f"{option}: missing, and the run was on it before. Keep it; its weight may be 0.")
        try:
            data = Prepared.open(Path(config.paths[name]).expanduser())
        except UserError as error:
            raise UserError(f"{option}: {error}") from error
    if data.facts["tokenizer"] != tokenizer.digest:
        raise UserError(
            f"data.tokenizer: found {tokenizer.source}, but {option} was prepared with another. Set data.tokenizer="
            f"{data.folder}, or prepare the data with this one (--tokenizer)."
        )
    media = Media(spec, tokenizer)
    media.check([kind for i, kind in enumerate(MEDIA) if (data.index.kinds == i).any()], option)
    room = Room(config.sequence_length, config.tiles_per_row, config.windows_per_row)
    parts = (data.facts["digest"], tokenizer.digest, spec, room, config.long_documents, held_out)

    def make() -> dict[str, np.ndarray]:
        sizes = media.sizes(data.index.kinds, data.index.facts)
        return cut(data.index, np.flatnonzero(data.index.held_out == held_out), sizes, room, config.long_documents)

    stored = cache.arrays(cache_folder(config), cache.name("items", *parts), make)
    counts: dict[str, int] = dict(zip(COUNTS, stored["counts"].tolist(), strict=True))
    return Source(
        name=name,
        data=data,
        media=media,
        begin=tokenizer.special[BEGIN_OF_TEXT],
        augment=() if held_out else config.augment,
        notes=notes + _told(name, counts, config, held_out),
        **{key: stored[key] for key in ("documents", "starts", "stops", "sizes")},
    )


def _built_in(
    name: str, config: DataConfig, spec: MediaSpec, tokenizer: Tokenizer, tell: Callable[[Told], None]
) -> Path:
    """The folder of a built-in source, prepared if it is not there."""
    if name in ("scenes", "clips") and spec.image is None:
        raise UserError(f"data.mixture.{name}: {name} need an image encoder. Set model.vision, or the weight to 0.")
    units = builtin.plan(name, config, spec.image)
    out = cache_folder(config) / cache.name(name, builtin.version(name), tokenizer.digest, units)
    if not (out / "dataset.json").exists():
        workers = min(len(units), os.cpu_count() or 1) if config.workers else 0
        try:
            prepare_built_in(name, units, tokenizer, out, workers, tell)
        except UserError as error:
            raise UserError(f"data.cache_dir: {error}") from error
    return out


def _told(name: str, counts: dict[str, int], config: DataConfig, held_out: bool) -> tuple[str, ...]:
    """What became of documents that do not fit a row."""
    if not counts["long"]:
        return ()
    room = f"{config.sequence_length} tokens, {config.tiles_per_row} tiles, {config.windows_per_row} windows of sound"
    done = {
        "split": f"were split into {counts['pieces']:,} pieces",
        "truncate": f"were cut off ({counts['truncated']:,})",
        "drop": f"were dropped ({counts['dropped']:,})",
    }[config.long_documents]
    unfit = counts["unfit"]
    dropped = f"; {unfit:,} were dropped, since one of their files alone does not fit" if unfit else ""
    kind = "held-out documents" if held_out else "documents"
    return (f"{name}: {counts['long']:,} {kind} do not fit a row ({room}) and {done}{dropped} (data.long_documents)",)
