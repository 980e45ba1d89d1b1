"""Typed options of the data (free of grain, which imports jax)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

Problem = tuple[str, str]

Policy = Literal["split", "truncate", "drop"]
Augmentation = Literal["mirror", "crop", "colour", "grey"]
BUILT_IN = ("text", "scenes", "clips", "tones")
"""Names of the sources that are made on the spot: the standard library's documentation and code; drawn scenes; short
clips; sequences of tones."""


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes tiles and tokens (not an option: derived from `model.vision` and `DataConfig`)."""

    tile_size: int
    """Side of a tile, in pixels."""
    tokens_per_tile: int
    """Patch tokens that stand for one tile in the sequence."""
    max_tiles: int
    """Tiles that one picture may be cut into, its global tile aside."""
    resize_to_max_canvas: bool = False
    """A picture that fits a canvas without shrinking takes the largest one and grows to it, not the smallest."""


@dataclass(frozen=True)
class AudioSpec:
    """How sound becomes windows and tokens (not an option: derived from `model.audio`)."""

    mel_bins: int
    """Mel bins of a frame."""
    frames_per_window: int
    """Log-mel frames of one window, 10 ms each."""
    tokens_per_window: int
    """Tokens that stand for one full window in the sequence; each for 80 ms."""


@dataclass(frozen=True)
class VideoSpec:
    """How a clip becomes frames (not an option: derived from `DataConfig`)."""

    frames_per_second: float
    """Frames taken of each second."""
    max_frames: int
    """Frames taken of one clip at most; of a longer one they are further apart."""


@dataclass(frozen=True)
class MediaSpec:
    """How files of each kind become tokens; None for a kind that the model has no encoder for."""

    image: ImageSpec | None = None
    video: VideoSpec = VideoSpec(1.0, 8)
    audio: AudioSpec | None = None


@dataclass(frozen=True)
class DataConfig:
    """What the model reads, how it is packed into rows, and in which order."""

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset({"tiles_per_row", "windows_per_row", "seed", "workers"})

    mixture: Mapping[str, float] = field(default_factory=lambda: {"text": 0.3, "scenes": 0.7})
    """Share of the tokens that each source supplies; made to sum to one. Names are those of `paths`, or built in: `text`,
    the standard library of the Python that runs; `scenes`, drawn pictures with questions; `clips`, shapes that move;
    `tones`, digits to hear."""
    mixture_temperature: float = 1.0
    """Weights count to the power of one over this: above 1 evens the shares out, below 1 sharpens them."""
    curriculum: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Other mixtures from a step on, by its number, as {"1000": {"web": 1.0}}. Each takes effect with the next window of
    documents, some 32 rows later at most, or so many as `window` fills."""
    max_epochs: Mapping[str, float] = field(default_factory=dict)
    """Times that a source is gone through at most, by its name; then its share goes to the others."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Name and folder of each prepared data set, as `drover data prepare` makes them."""
    long_documents: Policy = "split"
    """What becomes of a document that does not fit a row: split into pieces, truncate to the first, or drop."""
    sequence_length: int = 512
    """Tokens in a row, S."""
    row_parts: int = 1
    """Equal parts of a row: a document that crosses the edge of one begins at one, so that no attention chunk does (if they
    are multiples of model.chunk_size). Devices along mesh.context then fetch nothing for chunked layers; costs padding."""
    batch_size: int = 8
    """Rows in a step, B, over all devices and micro-batches."""
    tiles_per_row: int = 8
    """Image tiles that a row can hold, M. A row is closed early when its tiles are used up; 0 only without scenes and clips."""
    max_tiles: int = 4
    """Tiles that one image may be cut into, its global tile aside."""
    resize_to_max_canvas: bool = False
    """Cut small images into as many tiles as max_tiles allows, enlarged, instead of as few as hold them."""
    augment: tuple[Augmentation, ...] = ()
    """Random changes to the images of the training split, one after the other: mirror, crop, colour, grey."""
    windows_per_row: int = 0
    """Windows of sound that a row can hold; 0 only without sounds."""
    video_fps: float = 1.0
    """Frames taken of a second of a video; each is a tile."""
    video_frames: int = 8
    """Frames taken of a video at most; of a longer one, so many evenly spaced."""
    tokenizer: str = "bpe"
    """`bpe` (byte-level, trained once on the training split and cached), `bytes`, or the path of a Hugging Face
    tokenizer.json or of the folder that holds one."""
    tokenizer_size: int = 1024
    """Tokens in the BPE vocabulary that is trained, special tokens included; at most model.vocab_size."""
    scenes: int = 32768
    """Drawn scenes of the training split. A run that uses them up begins again."""
    clips: int = 16384
    """Short clips of the training split."""
    tones: int = 16384
    """Sequences of tones of the training split."""
    window: int = 256
    """Documents packed together; windows are independent, so any row can be found without the ones before."""
    seed: int = 0
    """Decides the order of documents and the content of what is made on the spot."""
    workers: int = 1
    """Processes that make batches ahead of the step; 0 makes them in threads of the trainer."""
    prefetch: int = 4
    """Batches that each worker keeps ready."""
    cache_dir: str = "~/.cache/drover"
    """Where the trained tokenizer and the tokenised text are kept between runs, under a digest of their content."""

    def problems(self) -> Iterator[Problem]:
        known = [*self.paths, *BUILT_IN]
        phases = {"mixture": self.mixture} | {f"curriculum.{step}": phase for step, phase in self.curriculum.items()}
        for option, phase in phases.items():
            if unknown := sorted(set(phase) - set(known)):
                yield option, f"found sources {unknown}, expected names out of {known}; data.paths.NAME=DIR adds one"
            if not phase or min(phase.values()) < 0 or sum(phase.values()) <= 0:
                yield option, f"found weights {dict(phase)}, expected none below zero and a sum above zero"
        for step in self.curriculum:
            if not step.isdecimal():
                yield "curriculum", f"found {step!r}, expected the number of a step"
        if self.mixture_temperature <= 0:
            yield "mixture_temperature", f"found {self.mixture_temperature}, expected more than 0"
        for name, most in self.max_epochs.items():
            if name not in known or most <= 0:
                yield "max_epochs", f"found {name}={most}, expected a source out of {known} and more than 0"
        for name in sorted(set(self.paths) & set(BUILT_IN)):
            yield "paths", f"found {name!r}, which is built in, expected another name"
        if self.sequence_length < 3:
            yield "sequence_length", f"found {self.sequence_length}, expected 3 or more"
        if self.sequence_length % self.row_parts:
            yield "row_parts", f"found {self.row_parts}, expected a divisor of sequence_length={self.sequence_length}"
        if self.video_fps <= 0:
            yield "video_fps", f"found {self.video_fps}, expected more than 0"
        if not self.tokenizer.strip():
            yield "tokenizer", f"found {self.tokenizer!r}, expected bpe, bytes or the path of a tokenizer.json"
        for name, option in (("scenes", "tiles_per_row"), ("clips", "tiles_per_row"), ("tones", "windows_per_row")):
            if getattr(self, option) == 0 and self.mixture.get(name, 0) > 0:
                yield option, f"found 0, expected 1 or more when the mixture has {name}"
