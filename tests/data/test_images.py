"""Tiling against Llama 4's own (tests/golden/preprocess), and files that are not what they should be."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import images
from data.tokenizer import IMAGE, IMAGE_END, IMAGE_START, PATCH, TILE_X_SEPARATOR, TILE_Y_SEPARATOR
from sharding.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "preprocess" / "reference.npz")
IDS = {
    IMAGE_START: 240,
    IMAGE_END: 241,
    TILE_X_SEPARATOR: 244,
    TILE_Y_SEPARATOR: 245,
    IMAGE: 250,
    PATCH: 252,
}


def test_canvas_and_resized_size_are_llama_4s():
    for height, width, *expected in GOLDEN["canvas_336_16"].tolist():
        canvas = images.choose_canvas(height, width, 336, 16)
        assert [*canvas, *images.resized(height, width, 336, canvas)] == expected, (height, width)


@pytest.mark.parametrize("i", range(5))
def test_pixels_and_tokens_are_llama_4s(i):
    tiles, canvas = images.tiles(Image.fromarray(GOLDEN[f"{i}/image"]), 56, 4)
    normalised = (tiles.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    # Pillow's bilinear differs from torchvision's by at most one step of 255, and the golden was rounded to bfloat16.
    np.testing.assert_allclose(normalised, GOLDEN[f"{i}/pixel_values"], atol=0.012)
    assert list(canvas) == GOLDEN[f"{i}/aspect"].tolist()
    assert [IDS[name] for name in images.layout(canvas, 4)] == GOLDEN[f"{i}/tokens_4_per_tile"].tolist()


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 6))
def test_any_size_fits_its_canvas(height, width, max_tiles):
    tiles, canvas = images.tiles(Image.new("RGB", (width, height), "white"), 16, max_tiles)
    names = images.layout(canvas, 9)
    assert canvas[0] * canvas[1] <= max_tiles
    assert tiles.shape == (images.tile_count(canvas), 16, 16, 3)
    assert names.count(PATCH) == 9 * len(tiles)
    assert (tiles[-1] if len(tiles) > 1 else tiles[0, :1, :1]).min() == 255  # the global tile has no padding


def test_padding_is_black_at_the_right_and_bottom():
    tiles, _ = images.tiles(Image.new("RGB", (10, 6), "white"), 16, 1)
    height, width = images.resized(6, 10, 16, (1, 1))
    assert tiles[0, :height, :width].min() == 255
    assert tiles[0, height:].max(initial=0) == tiles[0, :, width:].max(initial=0) == 0


def test_transparency_shows_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (4, 4), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    for name in ("clear", "palette", "grey"):
        assert np.asarray(images.load_image(tmp_path / f"{name}.png")).min() == 255, name


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (8, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert images.load_image(tmp_path / "turned.jpg").size == (4, 8)


def test_sixteen_bit_greys_are_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(images.load_image(tmp_path / "deep.png")).max() == 127


def _bomb() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _saved(tmp_path: Path, name: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    return (tmp_path / name).read_bytes()


def test_unusable_files_give_one_message_that_names_them(tmp_path):
    png, jpeg = _saved(tmp_path, "whole.png"), _saved(tmp_path, "whole.jpg")
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    contents = {
        "empty.png": (b"", "no picture format"),
        "text.png": (b"not a picture", "no picture format"),
        "cut.png": (png[: len(png) // 2], "cut short"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "cut short"),
        "damaged.png": (bytes(damaged), "damaged"),
        "bomb.png": (_bomb(), "Scale it down"),
    }
    for name, (content, expected) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=expected) as raised:
            images.load_image(tmp_path / name)
        assert name in str(raised.value)
    with pytest.raises(UserError, match=r"missing\.png: there is no such file"):
        images.load_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match="found a folder"):
        images.load_image(tmp_path)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
def test_no_damage_gets_past_the_user_error(tmp_path_factory, seed, kind):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("damage") / "picture"
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(path, kind)
    content = bytearray(path.read_bytes())
    for at in rng.integers(0, len(content), 8):
        content[at] = rng.integers(0, 256)
    path.write_bytes(bytes(content[: rng.integers(1, len(content) + 1)]))
    try:
        assert images.load_image(path).mode == "RGB"
    except UserError as error:
        assert str(path) in str(error)
