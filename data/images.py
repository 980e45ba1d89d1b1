"""Pictures to tiles: the dynamic tiling of Llama 4, for any tile size.

A picture is laid on a canvas of rows x columns tiles, chosen by its aspect ratio and size, scaled down (or up, to at
most one tile a side), padded at the right and the bottom with black, and cut row by row. With more than one tile, a
global tile follows: the whole picture squeezed into one tile, its aspect ratio ignored. Tiles stay uint8; the model
normalises them. With `ImageSpec.resize_to_max_canvas` small pictures take large canvases, and grow to them.

Source of the rules: transformers `models/llama4/image_processing_llama4_fast.py`; of the token layout:
`models/llama4/processing_llama4.py`.

Letters: n tiles of a picture, t side of a tile in pixels.
"""

import functools
import io
import math
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from data.config import ImageSpec
from data.tokenizer import IMAGE, IMAGE_END, IMAGE_START, PATCH, TILE_X_SEPARATOR, TILE_Y_SEPARATOR
from sharding.errors import UserError

_LONGEST_SIDE = 2**16 - 1
"""Pixels, that of JPEG. To scale a strip with a longer side takes gigabytes, however few pixels it has."""
_STRIP_PIXELS = 2**20
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF."""
_VECTOR_FORMATS = ("EPS", "WMF")
"""Pillow knows them, but would start another program to draw them."""


def load_image(path: str | Path) -> Image.Image:
    """The picture in this file, as `read_image` gives it.

    Raises:
        UserError: the file is missing or cannot be read, or what `read_image` refuses. The message names it.
    """
    try:
        with open(path, "rb") as file:
            return _picture(file, str(path))
    except FileNotFoundError:
        raise UserError(f"image {path}: there is no such file. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"image {path}: found a folder, expected a picture file.") from None
    except PermissionError:
        raise UserError(f"image {path}: not allowed to read it. Change its permissions.") from None
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise UserError(f"image {path}: cannot be opened ({error}). Check the path.") from error


def read_image(data: bytes, name: str) -> Image.Image:
    """The picture in these bytes: RGB, upright (EXIF orientation applied), transparency on white.

    Of an animation, and of a file with several pictures, the first one (of an animated PNG, what a viewer without
    animation shows). 16 bits a channel become the upper 8.

    Args:
        data: the content of a picture file.
        name: what a message calls it.

    Raises:
        UserError: no picture, damaged, too large to decode safely, or of pixels without a known scale.
    """
    return _picture(io.BytesIO(data), name)


def _picture(file: BinaryIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image, turn = _decoded(file, name)
            return image.transpose(turn) if turn is not None else image
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"image {name}: found {file.seek(0, io.SEEK_END):,} bytes in no picture format that Pillow knows, expected "
            "PNG, JPEG or alike. If it is one of another format (HEIC, SVG), convert it; if not, save or download it "
            "again."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"image {name}: found more than {Image.MAX_IMAGE_PIXELS:,} pixels, too many to be safe. Scale it down."
        ) from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise UserError(f"image {name}: damaged or cut short ({error}). Save or download it again.") from error


def _check_header(image: Image.Image, name: str) -> None:
    """Refuses what should not even be decoded."""
    if max(image.size) > _LONGEST_SIDE:
        raise UserError(
            f"image {name}: found {image.width:,} x {image.height:,} pixels, expected at most {_LONGEST_SIDE:,} a "
            "side. Scale it down, or cut it."
        )
    if image.format in _VECTOR_FORMATS:
        raise UserError(f"image {name}: found {image.format}, a drawing and no pixels. Convert it, to PNG for example.")


def _decoded(file: BinaryIO, name: str) -> tuple[Image.Image, Image.Transpose | None]:
    """The picture as RGB, and how it is to be turned upright."""
    with Image.open(file) as image:
        _check_header(image, name)
        image.load()
        return _to_rgb(image, name), _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The picture as RGB; transparent parts show white, 16-bit greys are scaled to 8 bits.

    Strip by strip: a picture of the most pixels that there may be takes hundreds of MB, each time that it is copied.
    """
    if image.mode == "F":
        raise UserError(
            f"image {name}: found floating-point pixels, whose black and white nobody knows, expected whole numbers. "
            "Save it with 8 or 16 bits."
        )
    if image.mode == "I":
        least, most = (int(value) for value in np.asarray(image.getextrema()))
        if least < 0 or most >= 2**16:
            raise UserError(
                f"image {name}: found grey values from {least:,} to {most:,}, expected 0 to {2**16 - 1:,}. "
                "Save it with 8 or 16 bits."
            )
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    converted = Image.new("RGB", image.size)
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        converted.paste(_strip_to_rgb(strip), (0, top))
    return converted


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip these at 255
        grey = np.asarray(image)
        clear = grey == image.info.get("transparency", -1)
        return Image.fromarray(np.where(clear, 255, grey >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def choose_canvas(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """Rows and columns of tiles for a picture of this size.

    The smallest canvas on which the picture need not shrink, else the one on which it shrinks least; of several, the
    one with the smallest area. With `resize_to_max_canvas`, the canvas on which the picture can grow most.
    """
    canvases = _canvases(spec.max_tiles)
    size = np.array(canvases, np.float32) * spec.tile_size
    scales = np.minimum(size[:, 1] / np.float32(width), size[:, 0] / np.float32(height))
    growing = scales[scales >= 1]
    best = growing.min() if growing.size and not spec.resize_to_max_canvas else scales.max()
    return min((canvases[i] for i in np.flatnonzero(scales == best)), key=math.prod)


def resized(height: int, width: int, canvas: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """(height, width) that the picture is scaled to before it is padded to the canvas, its aspect ratio kept.

    A picture grows to at most one tile a side; with `resize_to_max_canvas`, to the canvas.
    """
    target_h, target_w = canvas[0] * spec.tile_size, canvas[1] * spec.tile_size
    if not spec.resize_to_max_canvas:
        target_h = min(max(height, spec.tile_size), target_h)
        target_w = min(max(width, spec.tile_size), target_w)
    scale_h, scale_w = target_h / height, target_w / width
    if scale_w < scale_h:
        return max(min(math.floor(height * scale_w), target_h), 1), target_w
    return target_h, max(min(math.floor(width * scale_h), target_w), 1)


def tiles(image: Image.Image, spec: ImageSpec) -> tuple[np.ndarray, tuple[int, int]]:
    """Cuts a picture into tiles.

    Args:
        image: RGB.
        spec: the size of a tile, and how many there may be.

    Returns:
        uint8 [n, t, t, 3], row by row, then the global tile if there is more than one; and the canvas (rows, columns).
    """
    t = spec.tile_size
    canvas = rows, columns = choose_canvas(image.height, image.width, spec)
    height, width = resized(image.height, image.width, canvas, spec)
    padded = np.zeros((rows * t, columns * t, 3), np.uint8)
    padded[:height, :width] = _resize(image, width, height)
    cut = padded.reshape(rows, t, columns, t, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, t, t, 3)
    if rows * columns > 1:
        cut = np.concatenate([cut, _resize(image, t, t)[None]])
    return cut, canvas


def tile_count(canvas: tuple[int, int]) -> int:
    """Tiles of a picture on this canvas, the global one included."""
    return 1 if canvas == (1, 1) else math.prod(canvas) + 1


def layout(canvas: tuple[int, int], spec: ImageSpec) -> list[str]:
    """Names of the special tokens that stand for a picture in the text."""
    rows, columns = canvas
    patches = [PATCH] * spec.tokens_per_tile
    names = [IMAGE_START]
    if rows * columns > 1:
        for _ in range(rows):
            for column in range(columns):
                names += patches
                names.append(TILE_X_SEPARATOR if column < columns - 1 else TILE_Y_SEPARATOR)
    return [*names, IMAGE, *patches, IMAGE_END]


@functools.cache
def _canvases(max_tiles: int) -> list[tuple[int, int]]:
    """Canvases of at most this many tiles, grouped by aspect ratio in the order in which Llama 4 lists them."""
    by_aspect: dict[float, list[tuple[int, int]]] = {}
    for count in range(max_tiles, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                by_aspect.setdefault(rows / (count // rows), []).append((rows, count // rows))
    return [canvas for group in by_aspect.values() for canvas in group]


def _resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)
