"""Drawn scenes: a few coloured shapes, sometimes a written word, as a pure function of (seed, index).

Training scenes have the indices 0, 1, ...; held-out scenes start at `HELD_OUT_START`. Six (colour, shape) pairs, one
for each colour and each shape, occur in held-out scenes only: in those with an even index, which always show at least
one. So accuracy can be told apart for combinations that training has shown and for novel ones.
"""

import functools
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from data.config import ImageSpec

COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 220),
    "yellow": (240, 205, 20),
    "purple": (140, 40, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
SIZES = {"small": 0.28, "large": 0.46}
"""Side of an object, as a fraction of the tile."""
WORDS = (
    "ant", "bird", "boat", "cat", "cup", "dog", "fish", "frog",
    "hat", "key", "lion", "milk", "moon", "sun", "tree", "wolf",
)  # fmt: skip
"""Words that are written into some scenes."""

NOVEL = frozenset(
    {
        ("red", "triangle"),
        ("green", "star"),
        ("blue", "circle"),
        ("yellow", "ring"),
        ("purple", "square"),
        ("black", "cross"),
    }
)
"""The (colour, shape) pairs that no training scene contains."""

HELD_OUT_START = 2**32
"""Index of the first held-out scene."""

_OVERSAMPLE = 4
_COUNT_WEIGHTS = (3, 3, 2, 2)
_PAIRS_SEEN = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in NOVEL)
_PAIRS_NOVEL = tuple(sorted(NOVEL))
_PAIRS_ALL = _PAIRS_SEEN + _PAIRS_NOVEL


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    row: int
    """0 in the upper half of the picture, 1 in the lower."""
    column: int
    """0 in the left half, 1 in the right."""
    centre: tuple[float, float]
    """(x, y) in pixels."""
    side: float
    """Side of the bounding square, in pixels."""
    rgb: tuple[int, int, int]

    @property
    def novel(self) -> bool:
        return (self.colour, self.shape) in NOVEL


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    index: int
    width: int
    height: int
    background: tuple[int, int, int]
    things: tuple[Thing, ...]
    word: str = ""
    """A word written across one half of the picture, or empty."""
    word_row: int = 0
    word_offset: tuple[float, float] = (0.0, 0.0)
    """Displacement (x, y) of the word from the middle of its half, in pixels."""


def make_scene(seed: int, index: int, image: ImageSpec) -> Scene:
    """The scene of this index.

    Args:
        seed: data seed.
        index: 0 and up for training, `HELD_OUT_START` and up for held-out scenes.
        image: decides the size. Most scenes are as large as a tile, 1 in 12 is two tiles wide or tall (none if
            pictures are not cut).
    """
    tile_size = image.tile_size
    rng = random.Random(f"scene/{seed}/{index}")
    held_out = index >= HELD_OUT_START
    wide, tall = 1, 1
    if image.max_tiles >= 2 and rng.random() < 1 / 12:
        wide, tall = (2, 1) if rng.random() < 0.5 else (1, 2)
    width, height = wide * tile_size, tall * tile_size

    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    word, word_row, word_offset = "", 0, (0.0, 0.0)
    if rng.random() < 0.15:
        word, word_row = rng.choice(WORDS), rng.randrange(2)
        word_offset = (rng.uniform(-0.04, 0.04) * tile_size, rng.uniform(-0.04, 0.04) * tile_size)
        cells = [cell for cell in cells if cell[0] != word_row]
    count = min(rng.choices((1, 2, 3, 4), _COUNT_WEIGHTS)[0], len(cells))
    cells = rng.sample(cells, count)

    pairs = _PAIRS_ALL if held_out and index % 2 == 0 else _PAIRS_SEEN
    chosen = [rng.choice(pairs) for _ in cells]
    if count > 1 and rng.random() < 0.35:  # several of one shape, or counting would always give one
        chosen = [rng.choice([p for p in pairs if p[1] == chosen[0][1]]) for _ in cells]
    if pairs is _PAIRS_ALL:
        chosen[rng.randrange(count)] = rng.choice(_PAIRS_NOVEL)

    things = []
    for (row, column), (colour, shape) in zip(cells, chosen, strict=True):
        size = rng.choice(tuple(SIZES))
        side = SIZES[size] * tile_size * rng.uniform(0.93, 1.07)
        cell_w, cell_h = width / 2, height / 2
        slack_x, slack_y = max(cell_w - side, 0) * 0.4, max(cell_h - side, 0) * 0.4
        centre = (
            (column + 0.5) * cell_w + rng.uniform(-slack_x, slack_x),
            (row + 0.5) * cell_h + rng.uniform(-slack_y, slack_y),
        )
        rgb = jitter(rng, COLOURS[colour], 14)
        things.append(Thing(shape, colour, size, row, column, centre, side, rgb))
    grey = rng.randrange(205, 246)
    background = jitter(rng, (grey, grey, grey), 8)
    return Scene(index, width, height, background, tuple(things), word, word_row, word_offset)


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB, antialiased by drawing it four times as large."""
    k = _OVERSAMPLE
    image = Image.new("RGB", (scene.width * k, scene.height * k), scene.background)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        draw_thing(pen, thing, k, scene.background)
    if scene.word:
        unit = min(scene.width, scene.height)
        x = scene.width / 2 + scene.word_offset[0]
        y = scene.height * (0.25 + 0.5 * scene.word_row) + scene.word_offset[1]
        pen.text((x * k, y * k), scene.word, fill=(30, 30, 30), font=_font(round(unit * 0.36 * k)), anchor="mm")
    return image.reduce(k)


def jitter(rng: random.Random, rgb: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    """A colour near this one."""
    r, g, b = (min(max(value + rng.randint(-by, by), 0), 255) for value in rgb)
    return r, g, b


def draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, k: int, background: tuple[int, int, int]) -> None:
    """Draws an object, k times as large."""
    x, y, r = thing.centre[0] * k, thing.centre[1] * k, thing.side * k / 2
    box, fill = (x - r, y - r, x + r, y + r), thing.rgb
    match thing.shape:
        case "circle":
            pen.ellipse(box, fill)
        case "square":
            pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill)
        case "triangle":
            pen.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill)
        case "cross":
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)
        case "ring":
            pen.ellipse(box, fill)
            pen.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), background)
        case "star":
            pen.polygon([(x + r * px, y + r * py) for px, py in _STAR], fill)


_STAR = (  # five points, outer radius 1, inner radius 0.42, first point up
    (0.0, -1.0), (0.247, -0.340), (0.951, -0.309), (0.399, 0.130), (0.588, 0.809),
    (0.0, 0.42), (-0.588, 0.809), (-0.399, 0.130), (-0.951, -0.309), (-0.247, -0.340),
)  # fmt: skip


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
