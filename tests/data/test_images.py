"""Tiling and token layout against Llama 4's own (tests/golden/preprocess) and against what was published of them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import images
from data.config import ImageSpec
from data.tokenizer import IMAGE, IMAGE_END, IMAGE_START, PATCH, TILE_X_SEPARATOR, TILE_Y_SEPARATOR

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "preprocess" / "reference.npz")
IDS = {
    IMAGE_START: 240,
    IMAGE_END: 241,
    TILE_X_SEPARATOR: 244,
    TILE_Y_SEPARATOR: 245,
    IMAGE: 250,
    PATCH: 252,
}
CANVASES = [(rows, columns) for rows in range(1, 17) for columns in range(1, 17) if rows * columns <= 16]


def spec(tile_size: int = 16, tokens_per_tile: int = 9, max_tiles: int = 16, largest: bool = False) -> ImageSpec:
    return ImageSpec(tile_size, tokens_per_tile, max_tiles, largest)


@pytest.mark.parametrize(("key", "largest"), [("canvas_336_16", False), ("canvas_336_16_max", True)])
def test_canvas_and_resized_size_are_llama_4s(key, largest):
    llama_4 = spec(336, 144, 16, largest)
    for height, width, *expected in GOLDEN[key].tolist():
        canvas = images.choose_canvas(height, width, llama_4)
        assert [*canvas, *images.resized(height, width, canvas, llama_4)] == expected, (height, width)


@pytest.mark.parametrize("i", range(5))
def test_pixels_and_tokens_are_llama_4s(i):
    small = spec(56, 4, 4)
    tiles, canvas = images.tiles(Image.fromarray(GOLDEN[f"{i}/image"]), small)
    normalised = (tiles.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    # Pillow's bilinear differs from torchvision's by at most one step of 255, and the golden was rounded to bfloat16.
    np.testing.assert_allclose(normalised, GOLDEN[f"{i}/pixel_values"], atol=0.012)
    assert list(canvas) == GOLDEN[f"{i}/aspect"].tolist()
    assert [IDS[name] for name in images.layout(canvas, small)] == GOLDEN[f"{i}/tokens_4_per_tile"].tolist()


@pytest.mark.parametrize("tokens_per_tile", [1, 4, 144])
def test_a_picture_has_as_many_tokens_as_was_published(tokens_per_tile):
    """147 for one tile of 144 tokens, else 145 a b + 147 on a canvas of a x b; 2467 at most."""
    n = tokens_per_tile
    for a, b in CANVASES:
        names = images.layout((a, b), spec(tokens_per_tile=n))
        assert len(names) == (n + 3 if a * b == 1 else (n + 1) * a * b + n + 3)
        assert names.count(PATCH) == n * images.tile_count((a, b))
        assert names.count(TILE_X_SEPARATOR) == a * (b - 1)
        assert names.count(TILE_Y_SEPARATOR) == (a if a * b > 1 else 0)
    assert max(len(images.layout(canvas, spec(tokens_per_tile=144))) for canvas in CANVASES) == 2467


def test_every_canvas_is_taken_by_a_picture_of_its_size():
    assert len(CANVASES) == 50
    for rows, columns in CANVASES:
        assert images.choose_canvas(rows * 336, columns * 336, spec(336)) == (rows, columns)


SIDES = st.integers(1, 700) | st.sampled_from([1, 2, 5000, 30000])


@given(SIDES, SIDES, st.integers(1, 6), st.booleans())
def test_any_size_fits_its_canvas(height, width, max_tiles, largest):
    if height * width > 10**6:
        height = 1
    some = spec(16, 9, max_tiles, largest)
    tiles, canvas = images.tiles(Image.new("RGB", (width, height), "white"), some)
    names = images.layout(canvas, some)
    assert canvas[0] * canvas[1] <= max_tiles
    assert tiles.shape == (images.tile_count(canvas), 16, 16, 3)
    assert names.count(PATCH) == 9 * len(tiles)
    assert (tiles[-1] if len(tiles) > 1 else tiles[0, :1, :1]).min() == 255  # the global tile has no padding


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(1, 1, (1, 1)), (1, 5000, (1, 15)), (5000, 1, (15, 1)), (1, 5376, (1, 16)), (1, 65535, (1, 16))],
)
def test_strips_and_dots_are_cut_at_llama_4s_own_tile_size(height, width, expected):
    tiles, canvas = images.tiles(Image.new("RGB", (width, height), "white"), spec(336))
    assert canvas == expected
    assert tiles[0, 0, 0].tolist() == [255] * 3


def test_a_small_picture_takes_the_largest_canvas_if_asked_and_grows_to_it():
    picture = Image.new("RGB", (20, 10), "white")
    small, canvas = images.tiles(picture, spec(16, max_tiles=8))
    assert (canvas, len(small)) == ((1, 2), 3)
    assert images.resized(10, 20, canvas, spec(16, max_tiles=8)) == (10, 20)
    large, canvas = images.tiles(picture, spec(16, max_tiles=8, largest=True))
    assert (canvas, len(large)) == ((2, 4), 9)
    assert images.resized(10, 20, canvas, spec(16, max_tiles=8, largest=True)) == (32, 64)
    assert large.min() == 255


def test_a_side_is_rounded_down_even_by_an_error_of_the_last_bit():
    """As transformers rounds it: 45 times 672 / 15 is a little less than 2016."""
    assert images.resized(15, 45, (2, 6), spec(336, largest=True)) == (672, 2015)


def test_padding_is_black_at_the_right_and_bottom():
    one = spec(max_tiles=1)
    tiles, _ = images.tiles(Image.new("RGB", (10, 6), "white"), one)
    height, width = images.resized(6, 10, (1, 1), one)
    assert tiles[0, :height, :width].min() == 255
    assert tiles[0, height:].max(initial=0) == tiles[0, :, width:].max(initial=0) == 0


def test_tiles_are_cut_row_by_row_and_the_whole_picture_comes_last():
    pixels = np.arange(6, dtype=np.uint8).repeat(16 * 16).reshape(2, 3, 16, 16).transpose(0, 2, 1, 3).reshape(32, 48)
    tiles, canvas = images.tiles(Image.fromarray(pixels * 40).convert("RGB"), spec())
    assert canvas == (2, 3)
    assert [np.unique(tile).tolist() for tile in tiles[:6]] == [[i * 40] for i in range(6)]
    assert len(tiles) == 7
    assert len(np.unique(tiles[6])) > 6
