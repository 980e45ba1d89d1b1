"""What images, videos and sounds become in a run: how many tokens, tiles and windows, which tokens, which arrays.

How many is a pure function of the facts in the index, so that rows are packed without reading a file.

Letters: F files, n tiles, t side of a tile, w windows of sound, f frames of a window, m mel bands.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL.Image import Image

from data import audio
from data.config import MediaSpec
from data.documents import MEDIA, Kind
from data.images import choose_canvas, layout, read_image, tile_count, tiles
from data.tokenizer import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    AUDIO_TOKENS,
    IMAGE_TOKENS,
    VIDEO_END,
    VIDEO_START,
    VIDEO_TOKENS,
    Tokenizer,
)
from data.video import read_frames, sample_times
from sharding.errors import UserError

NEEDS: dict[Kind, tuple[str, ...]] = {
    "image": IMAGE_TOKENS,
    "video": (*IMAGE_TOKENS, *VIDEO_TOKENS),
    "audio": AUDIO_TOKENS,
}
"""The special tokens that stand for a file of each kind."""


class Size(NamedTuple):
    """Room that a file takes in a row."""

    tokens: int
    tiles: int
    windows: int


class Media:
    """Files as the model of a run takes them."""

    def __init__(self, spec: MediaSpec, tokenizer: Tokenizer):
        self.spec, self._tokenizer = spec, tokenizer
        self.ids = functools.lru_cache(maxsize=4096)(self._ids)
        """(kind, facts) -> int32 [tokens], what stands for the file in the sequence."""
        self.size = functools.lru_cache(maxsize=4096)(self._size)

    def __reduce__(self):
        return Media, (self.spec, self._tokenizer)

    def check(self, kinds: Sequence[Kind], name: str) -> None:
        """Raises `UserError` if the model or the tokenizer has no place for files of these kinds."""
        for kind in kinds:
            if kind == "audio" and self.spec.audio is None:
                raise UserError(
                    f"{name}: has sounds, and model.audio is None. Set it, or prepare the data without sounds."
                )
            if kind != "audio" and self.spec.image is None:
                raise UserError(
                    f"{name}: has {kind} files, and model.vision is None. Set it, or prepare the data without."
                )
            self._tokenizer.require(NEEDS[kind])

    def sizes(self, kinds: np.ndarray, facts: np.ndarray) -> np.ndarray:
        """int32 [F, 3]: tokens, tiles and windows of files, from their kinds [F] and facts [F, 3]."""
        if not len(kinds):
            return np.zeros((0, 3), np.int32)
        unique, inverse = np.unique(np.column_stack([kinds, facts]), axis=0, return_inverse=True)
        sizes = [self._size(MEDIA[int(kind)], tuple(of_file)) for kind, *of_file in unique.tolist()]
        return np.array(sizes, np.int32)[inverse.ravel()]

    def _size(self, kind: Kind, facts: tuple[int, ...]) -> Size:
        if kind == "audio":
            assert self.spec.audio
            windows = audio.window_count(facts[0], self.spec.audio)
            return Size(audio.token_count(facts[0], self.spec.audio) + 2, 0, windows)
        if kind == "video":
            return Size(len(self.ids(kind, facts)), len(self._times(facts)), 0)
        assert self.spec.image
        canvas = choose_canvas(facts[0], facts[1], self.spec.image)
        return Size(len(layout(canvas, self.spec.image)), tile_count(canvas), 0)

    def _ids(self, kind: Kind, facts: tuple[int, ...]) -> np.ndarray:
        special = self._tokenizer.special
        if kind == "audio":
            assert self.spec.audio
            count = audio.token_count(facts[0], self.spec.audio)
            return np.array([special[AUDIO_START], *[special[AUDIO]] * count, special[AUDIO_END]], np.int32)
        assert self.spec.image
        if kind == "image":
            names = layout(choose_canvas(facts[0], facts[1], self.spec.image), self.spec.image)
            return np.array([special[name] for name in names], np.int32)
        frame = [special[name] for name in layout((1, 1), self.spec.image)]
        ids = [special[VIDEO_START]]
        for time in self._times(facts):
            ids += [*self._tokenizer.encode(f"{time / 1000:g}s"), *frame]
        return np.array([*ids, special[VIDEO_END]], np.int32)

    def _times(self, facts: tuple[int, ...]) -> list[int]:
        """Milliseconds of a clip's frames."""
        return sample_times(facts[0], self.spec.video)

    def tiles(
        self, kind: Kind, data: bytes, facts: tuple[int, ...], name: str, change: Callable[[Image], Image] | None = None
    ) -> np.ndarray:
        """uint8 [n, t, t, 3] of an image, changed before it is cut, or of a video.

        Raises:
            UserError: the file is not what it was when it was prepared.
        """
        spec = self.spec.image
        assert spec
        if kind == "image":
            image = read_image(data, name)
            cut = tiles(change(image) if change else image, spec)[0]
        else:
            alone = dataclasses.replace(spec, max_tiles=1)
            cut = np.concatenate([tiles(frame, alone)[0] for frame in read_frames(data, self._times(facts), name)])
        return _expected(cut, self.size(kind, facts).tiles, name)

    def windows(self, data: bytes, facts: tuple[int, ...], name: str) -> np.ndarray:
        """float32 [w, f, m] of a sound; raises as `tiles` does."""
        assert self.spec.audio
        cut = audio.windows(audio.read_audio(data, name), self.spec.audio)
        return _expected(cut, self.size("audio", facts).windows, name)


def _expected(cut: np.ndarray, count: int, name: str) -> np.ndarray:
    if len(cut) != count:
        raise UserError(
            f"{name}: became {len(cut)} blocks, expected {count} by the index: its decoder has changed since. Prepare the "
            "data again."
        )
    return cut
