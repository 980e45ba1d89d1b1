"""Files of every kind: each gives the picture that a viewer shows, or one message that names the file."""

import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import images
from data.config import ImageSpec
from sharding.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def pixels(path: Path) -> np.ndarray:
    picture = images.load_image(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes | None, before_pixels: bytes = b"") -> bytes:
    """A PNG by hand, for what Pillow reads and cannot write. `colour`: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = before_pixels + (b"" if rows is None else chunk(b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


# What a viewer shows


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_every_exif_orientation_is_applied(tmp_path, kind):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # white in one corner: no turn or mirroring leaves it where it was
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    for orientation, array in stored.items():
        picture = Image.fromarray(np.ascontiguousarray(array))
        exif = picture.getexif()
        exif[0x0112] = orientation
        picture.save(tmp_path / f"turned.{kind}", exif=exif, lossless=True)
        np.testing.assert_allclose(pixels(tmp_path / f"turned.{kind}"), upright, atol=2, err_msg=str(orientation))


def test_transparency_shows_white(tmp_path):
    Image.new("RGBA", (4, 4), (*RED, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png", transparency=0)
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.gif", transparency=0)
    Image.new("RGBA", (4, 4), (*RED, 0)).save(tmp_path / "rgba.webp")
    Image.new("L", (4, 4), 7).save(tmp_path / "key_of_grey.png", transparency=7)
    Image.new("RGB", (4, 4), RED).save(tmp_path / "key_of_rgb.png", transparency=RED)
    deep = b"".join(b"\0" + struct.pack(">2H", 500, 500) for _ in range(2))
    (tmp_path / "key_of_deep_grey.png").write_bytes(png(2, 2, 16, 0, deep, chunk(b"tRNS", struct.pack(">H", 500))))
    for path in sorted(tmp_path.iterdir()):
        assert pixels(path).min() == 255, path.name


def test_half_transparency_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert np.abs(pixels(tmp_path / "half.png").astype(int) - 127).max() <= 1


def test_a_partly_transparent_palette_keeps_its_other_colours(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, *BLUE])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    assert pixels(tmp_path / "palette.png").tolist() == [[[255, 255, 255], [*BLUE]]]


@pytest.mark.parametrize(
    ("mode", "kind"), [("P", "png"), ("P", "gif"), ("CMYK", "tiff"), ("CMYK", "jpg"), ("L", "png")]
)
def test_other_colour_spaces_become_rgb(tmp_path, mode, kind):
    colour = (128, 128, 128) if mode == "L" else RED
    Image.new("RGB", (8, 8), colour).convert(mode).save(tmp_path / f"picture.{kind}")
    np.testing.assert_allclose(pixels(tmp_path / f"picture.{kind}"), np.full((8, 8, 3), colour), atol=3)


def test_one_bit_pictures_are_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert pixels(tmp_path / "bits.png").tolist() == [[[255] * 3, [0] * 3]]


def test_sixteen_bits_are_cut_to_eight_whatever_the_file_calls_them(tmp_path):
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    big_endian = grey.astype(">u2").tobytes()
    opaque = np.stack([grey, np.full_like(grey, 65535)], -1).astype(">u2").tobytes()
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).save(tmp_path / "grey.tiff")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "grey_in_32_bits.tiff")
    (tmp_path / "grey.pgm").write_bytes(b"P5 5 1 65535\n" + big_endian)
    (tmp_path / "rgb.png").write_bytes(png(5, 1, 16, 2, b"\0" + np.repeat(grey, 3).astype(">u2").tobytes()))
    (tmp_path / "grey_alpha.png").write_bytes(png(5, 1, 16, 4, b"\0" + opaque))
    modes = set()
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as picture:
            modes.add(picture.mode)
        assert pixels(path)[0, :, 0].tolist() == [0, 0, 1, 128, 255], path.name
    assert {"I;16", "I", "RGB"} <= modes


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_an_animation_gives_its_first_picture(tmp_path, kind):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    first.save(tmp_path / f"moving.{kind}", save_all=True, append_images=[second])
    with Image.open(tmp_path / f"moving.{kind}") as moving:
        assert getattr(moving, "n_frames", 1) == 2
    np.testing.assert_allclose(pixels(tmp_path / f"moving.{kind}"), np.full((8, 8, 3), RED), atol=2)


@pytest.mark.parametrize("size", [(1, 1), (1, 30000), (30000, 1)])
def test_dots_and_strips_are_read_and_cut(tmp_path, size):
    Image.new("RGB", size, RED).save(tmp_path / "strip.png")
    tiles, _ = images.tiles(images.load_image(tmp_path / "strip.png"), ImageSpec(336, 144, 16))
    assert tiles[0, 0, 0].tolist() == [*RED]


READ = """
import resource, sys
from data.images import load_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
picture = load_image(sys.argv[1])
print(*picture.size, *picture.getpixel((0, picture.height - 1)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize(("depth", "colour", "pixel"), [(16, 0, b"\x80\0"), (8, 6, b"\0\0\0\x7f"), (8, 2, b"\x80" * 3)])
def test_the_largest_picture_takes_little_more_than_its_pixels_twice(tmp_path, depth, colour, pixel):
    """In Pillow, a pixel of RGB or RGBA takes four bytes, and what is read and what comes of it are two pictures."""
    side = math.isqrt(Image.MAX_IMAGE_PIXELS or 0)
    packer, row = zlib.compressobj(1), b"\0" + pixel * side
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    (tmp_path / "largest.png").write_bytes(png(side, side, depth, colour, None, chunk(b"IDAT", packed)))
    root = Path(images.__file__).parents[1]
    command = [sys.executable, "-c", READ, str(tmp_path / "largest.png")]
    read = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    *found, memory = map(int, read.stdout.split())
    assert found == [side, side, 128, 128, 128]
    assert memory < 8.5 * side**2, f"{memory / side**2:.1f} bytes a pixel"


# What cannot be read


def saved(tmp_path: Path, name: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    return (tmp_path / name).read_bytes()


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tiff", "webp", "jp2"])
def test_a_file_that_was_cut_short_is_named(tmp_path, kind):
    whole = saved(tmp_path, f"whole.{kind}")
    for share in (0.5, 0.95):
        (tmp_path / f"cut.{kind}").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=rf"image .*cut\.{kind}: damaged or cut short") as raised:
            images.load_image(tmp_path / f"cut.{kind}")
        assert "again" in str(raised.value)


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'
HEIC = struct.pack(">I", 24) + b"ftypheic" + b"\0\0\0\0mif1heic" + bytes(64)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.png", b"", "found 0 bytes in no picture format"),
        ("text.png", b"not a picture", "found 13 bytes in no picture format"),
        ("phone.heic", HEIC, r"found .* no picture format .* \(HEIC, SVG\), convert it"),
        ("drawing.svg", SVG, r"found .* no picture format .* \(HEIC, SVG\), convert it"),
        ("drawing.eps", EPS, "found EPS, a drawing and no pixels. Convert it"),
        ("bomb.png", png(60000, 60000, 8, 2, b""), "found more than 89,478,485 pixels, too many .* Scale it down"),
        ("large.png", png(10000, 10000, 8, 2, b""), "found more than 89,478,485 pixels, too many .* Scale it down"),
        ("strip.png", png(1, 2**24, 8, 0, b""), "found 1 x 16,777,216 pixels, expected at most 65,535 a side"),
    ],
    ids=["empty", "text", "heic", "svg", "eps", "bomb", "large", "strip"],
)
def test_an_unusable_file_is_named_with_what_to_do(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"image .*{name}: {expected}"):
        images.load_image(tmp_path / name)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png(60000, 60000, 8, 2, b""))
    (tmp_path / "strip.png").write_bytes(png(1, 2**24, 8, 0, b""))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    for name in ("bomb.png", "strip.png"):
        with pytest.raises(UserError, match=name):
            images.load_image(tmp_path / name)


def test_pixels_without_a_known_scale_are_refused(tmp_path):
    Image.fromarray(np.array([[0.5]], np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.array([[70000]], np.int32)).save(tmp_path / "large.tiff")
    Image.fromarray(np.array([[-1]], np.int32)).save(tmp_path / "negative.tiff")
    for name, found in {"float": "floating-point", "large": "from 70,000 to 70,000", "negative": "from -1 to"}.items():
        with pytest.raises(UserError, match=rf"{name}\.tiff: found .*{found}.* Save it with 8 or 16 bits"):
            images.load_image(tmp_path / f"{name}.tiff")


def test_damaged_content_is_named(tmp_path):
    whole = saved(tmp_path, "whole.png")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    (tmp_path / "damaged.png").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged\.png: damaged"):
        images.load_image(tmp_path / "damaged.png")


def test_bytes_are_read_and_refused_as_a_file_is(tmp_path):
    content = saved(tmp_path, "whole.png")
    from_file, from_bytes = images.load_image(tmp_path / "whole.png"), images.read_image(content, "whole.png")
    np.testing.assert_array_equal(np.asarray(from_file), np.asarray(from_bytes))
    for data in (b"", b"not a picture", content[:-50], EPS, png(60000, 60000, 8, 2, b"")):
        (tmp_path / "bad.png").write_bytes(data)
        with pytest.raises(UserError, match=r"^image shard\.tar:bad\.png: ") as of_bytes:
            images.read_image(data, "shard.tar:bad.png")
        with pytest.raises(UserError) as of_file:
            images.load_image(tmp_path / "bad.png")
        assert str(of_file.value).replace(str(tmp_path / "bad.png"), "shard.tar:bad.png") == str(of_bytes.value)


def test_a_path_that_cannot_be_is_named(tmp_path):
    for path in (tmp_path / ("long" * 100), "zero\0byte.png"):
        with pytest.raises(UserError, match="cannot be opened"):
            images.load_image(path)


def test_what_is_no_file_is_named(tmp_path):
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
