"""Pictures to tiles: the dynamic tiling of Llama 4, for any tile size.

A picture is laid on a canvas of rows x columns tiles, chosen by its aspect ratio and size, scaled down (or up, to at
most one tile a side), padded at the right and the bottom with black, and cut row by row. With more than one tile, a
global tile follows: the whole picture squeezed into one tile, its aspect ratio ignored. Tiles stay uint8; the model
normalises them.

Source of the rules: transformers `models/llama4/image_processing_llama4_fast.py`; of the token layout:
`models/llama4/processing_llama4.py`.
"""

import functools
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.tokenizer import IMAGE, IMAGE_END, IMAGE_START, PATCH, TILE_X_SEPARATOR, TILE_Y_SEPARATOR
from sharding.errors import UserError


def load_image(path: str | Path) -> Image.Image:
    """The picture in this file: RGB, upright (EXIF orientation applied), transparency on white.

    Raises:
        UserError: the file is missing, no picture, damaged, or too large to decode safely. The message names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"image {path}: there is no such file. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"image {path}: found a folder, expected a picture file.") from None
    except PermissionError:
        raise UserError(f"image {path}: not allowed to read it. Change its permissions.") from None
    except UnidentifiedImageError:
        raise UserError(
            f"image {path}: found no picture format that Pillow knows, expected PNG, JPEG or alike."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"image {path}: found more than {Image.MAX_IMAGE_PIXELS:,} pixels, too many to be safe. Scale it down."
        ) from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise UserError(f"image {path}: damaged or cut short ({error}). Save or download it again.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as RGB; transparent parts show white, 16-bit greys are scaled to 8 bits."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # Pillow would clip these at 255
        grey = np.clip(np.asarray(image, np.int64) // 257, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def choose_canvas(height: int, width: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of tiles for a picture of this size.

    The smallest canvas on which the picture need not shrink, else the one on which it shrinks least; of several, the
    one with the smallest area.
    """
    canvases = _canvases(max_tiles)
    size = np.array([(rows * tile_size, columns * tile_size) for rows, columns in canvases], np.float32)
    scales = np.minimum(size[:, 1] / np.float32(width), size[:, 0] / np.float32(height))
    growing = scales[scales >= 1]
    best = growing.min() if growing.size else scales.max()
    return min((canvases[i] for i in np.flatnonzero(scales == best)), key=math.prod)


def resized(height: int, width: int, tile_size: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that the picture is scaled to before it is padded to the canvas, its aspect ratio kept.

    A picture grows to at most one tile a side.
    """
    target_h = min(max(height, tile_size), canvas[0] * tile_size)
    target_w = min(max(width, tile_size), canvas[1] * tile_size)
    scale_h, scale_w = target_h / height, target_w / width
    if scale_w < scale_h:
        return max(min(math.floor(height * scale_w), target_h), 1), target_w
    return target_h, max(min(math.floor(width * scale_h), target_w), 1)


def tiles(image: Image.Image, tile_size: int, max_tiles: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Cuts a picture into tiles.

    Args:
        image: RGB.
        tile_size: side t of a tile, in pixels.
        max_tiles: tiles of the canvas at most, the global tile aside.

    Returns:
        uint8 [n, t, t, 3], row by row, then the global tile if there is more than one; and the canvas (rows, columns).
    """
    canvas = rows, columns = choose_canvas(image.height, image.width, tile_size, max_tiles)
    height, width = resized(image.height, image.width, tile_size, canvas)
    padded = np.zeros((rows * tile_size, columns * tile_size, 3), np.uint8)
    padded[:height, :width] = _resize(image, width, height)
    cut = padded.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 1, 3, 4)
    cut = cut.reshape(rows * columns, tile_size, tile_size, 3)
    if rows * columns > 1:
        cut = np.concatenate([cut, _resize(image, tile_size, tile_size)[None]])
    return cut, canvas


def tile_count(canvas: tuple[int, int]) -> int:
    """Tiles of a picture on this canvas, the global one included."""
    return 1 if canvas == (1, 1) else math.prod(canvas) + 1


def layout(canvas: tuple[int, int], tokens_per_tile: int) -> list[str]:
    """Names of the special tokens that stand for a picture in the text."""
    rows, columns = canvas
    names = [IMAGE_START]
    if rows * columns > 1:
        for _ in range(rows):
            for column in range(columns):
                names += [PATCH] * tokens_per_tile
                names.append(TILE_X_SEPARATOR if column < columns - 1 else TILE_Y_SEPARATOR)
    return [*names, IMAGE, *[PATCH] * tokens_per_tile, IMAGE_END]


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
