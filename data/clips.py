"""Short clips: a coloured shape that moves from one quarter of the picture to another, one of eight ways, as a pure
function of (seed, index).

Each of the twelve moves is as likely as another, so the best guess of the way is right 1/6 of the time. It takes two frames
to tell: the best guess from the first frame alone or the last is right 1/3 of the time, from the middle one 5/12.

Training clips have the indices 0, 1, ...; held-out clips start at `scenes.HELD_OUT_START`. Eight (shape, direction)
pairs, one for each direction, occur in held-out clips only: in those with an even index. No clip shows a pair of colour
and shape that training scenes lack, or questions about those would not be novel any more.
"""

import io
import random
from dataclasses import dataclass

import av
import numpy as np
from PIL import Image, ImageDraw

from data.ask import Ask, lines
from data.scene_text import Piece
from data.scenes import COLOURS, HELD_OUT_START, SHAPES, Thing, draw_thing, jitter
from data.scenes import NOVEL as NOVEL_THINGS

DIRECTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
}
"""(x, y) of each; y counts downwards."""
NOVEL = frozenset(zip((*SHAPES, *SHAPES), DIRECTIONS, strict=False))
"""The (shape, direction) pairs that no training clip shows."""

FRAMES = 5
FRAMES_PER_SECOND = 2
SIDE = 0.36
"""Side of the shape, as a fraction of the picture's."""
TRAVEL = 0.5
"""How far the shape moves from the first frame to the last, along each axis in which it does, as such a fraction."""

_JITTER = 0.05
"""How far from the middle of a quarter the shape starts and ends, at most and along each axis, as such a fraction."""
_OVERSAMPLE = 4
_CORNERS = (("top left", "top right"), ("bottom left", "bottom right"))
# A move along one axis has two quarters to start from, a diagonal one has one.
_MOVES = tuple((shape, way) for shape in SHAPES for way, (x, y) in DIRECTIONS.items() for _ in range(1 + (0 in (x, y))))
_NOVEL = tuple(move for move in _MOVES if move in NOVEL)
_SEEN = tuple(move for move in _MOVES if move not in NOVEL)


@dataclass(frozen=True)
class Clip:
    """What a clip shows."""

    index: int
    side: int
    """Of the picture, in pixels."""
    background: tuple[int, int, int]
    shape: str
    colour: str
    rgb: tuple[int, int, int]
    direction: str
    size: float
    """Side of the shape's bounding square, in pixels."""
    middle: tuple[float, float]
    """(x, y) of the shape's centre in the middle frame, in pixels."""

    @property
    def novel(self) -> bool:
        return (self.shape, self.direction) in NOVEL

    def centre(self, frame: int) -> tuple[float, float]:
        """(x, y) of the shape's centre in this frame."""
        moved = (frame / (FRAMES - 1) - 0.5) * TRAVEL * self.side
        x, y = (at + way * moved for at, way in zip(self.middle, DIRECTIONS[self.direction], strict=True))
        return x, y


def make_clip(seed: int, index: int, side: int) -> Clip:
    """The clip of this index, square, `side` pixels wide."""
    rng = random.Random(f"clip/{seed}/{index}")
    novel = index >= HELD_OUT_START and index % 2 == 0
    shape, direction = rng.choice(_NOVEL if novel else _SEEN)
    colour = rng.choice([colour for colour in COLOURS if (colour, shape) not in NOVEL_THINGS])
    # Halfway along an axis in which it moves, else in one half.
    x, y = (0.5 if way else rng.choice((0.25, 0.75)) for way in DIRECTIONS[direction])
    middle = (x + rng.uniform(-_JITTER, _JITTER)) * side, (y + rng.uniform(-_JITTER, _JITTER)) * side
    grey = rng.randrange(205, 246)
    return Clip(
        index=index,
        side=side,
        background=jitter(rng, (grey, grey, grey), 8),
        shape=shape,
        colour=colour,
        rgb=jitter(rng, COLOURS[colour], 14),
        direction=direction,
        size=SIDE * side * rng.uniform(0.93, 1.07),
        middle=middle,
    )


def draw(clip: Clip, frame: int) -> Image.Image:
    """A frame, RGB, antialiased by drawing it four times as large."""
    k, side = _OVERSAMPLE, clip.side
    image = Image.new("RGB", (side * k, side * k), clip.background)
    thing = Thing(clip.shape, clip.colour, "small", 0, 0, clip.centre(frame), clip.size, clip.rgb)
    draw_thing(ImageDraw.Draw(image), thing, k, clip.background)
    return image.reduce(k)


def encode(clip: Clip) -> bytes:
    """The clip as a file: Matroska with FFV1, which keeps every pixel; the same bytes at every call."""
    file = io.BytesIO()
    with av.open(file, "w", "matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=FRAMES_PER_SECOND, options={"flags": "+bitexact"})
        stream.width = stream.height = clip.side
        stream.pix_fmt = "bgr0"
        stream.codec_context.thread_count = 1
        for i in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.asarray(draw(clip, i)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def questions(clip: Clip) -> list[Ask]:
    """Every question about a clip, in a fixed order."""
    asks = []
    for name in (
        f"the {clip.colour} object",
        "the object",
    ):  # not its shape: words would tell which ways it never takes
        ways = (clip.direction, f"it moves {clip.direction}")
        forms = (f"which way does {name} move?", f"where does {name} go?")
        asks.append(Ask("motion", "motion", forms, ways, clip.novel))
    for second in (0, FRAMES // FRAMES_PER_SECOND):  # between them it is in two quarters or four
        x, y = clip.centre(second * FRAMES_PER_SECOND)
        corner = _CORNERS[int(2 * y > clip.side)][int(2 * x > clip.side)]
        forms = (f"where is the {clip.shape} at {second}s?", f"where is the object at {second}s?")
        asks.append(Ask("place", "place", forms, (corner, f"at the {corner}"), clip.novel))
    colours = (f"what colour is the {clip.shape}?", f"which colour is the {clip.shape}?")
    asks.append(Ask("colour", "colour of a clip", colours, (clip.colour, f"it is {clip.colour}"), clip.novel))
    shapes = ("what shape moves?", f"what shape is the {clip.colour} object?")
    asks.append(Ask("shape", "shape of a clip", shapes, (clip.shape, f"a {clip.shape}"), clip.novel))
    return asks


def document(clip: Clip, rng: random.Random) -> list[Piece]:
    """The text that follows the clip: questions about its motion, places and look, and a caption."""
    *asks, colour, shape = questions(clip)
    motion, places = asks[:2], asks[2:]
    asked = [rng.choice((colour, shape)), *places]
    rng.shuffle(asked)
    asked.insert(0 if rng.random() < 0.6 else rng.randint(1, 3), rng.choice(motion))
    start = rng.choice(("This clip shows", "Here is", "There is", "In the clip:"))
    caption = Piece(f"{start} something that moves {clip.direction}, a {clip.colour} {clip.shape}.\n")
    return [caption, *lines(asked, rng)] if rng.random() < 0.2 else [*lines(asked, rng), caption]
