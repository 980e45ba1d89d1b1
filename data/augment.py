"""Random changes to pictures while training, by name. None changes the size of a picture, which decides its tokens."""

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _mirror(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def _crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    scale = random.uniform(0.8, 1.0)
    width, height = image.width * scale, image.height * scale
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    return image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))


def _colour(image: Image.Image, random: np.random.Generator) -> Image.Image:
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(random.uniform(0.8, 1.2))
    return image


def _grey(image: Image.Image, random: np.random.Generator) -> Image.Image:
    return image.convert("L").convert("RGB") if random.random() < 0.1 else image


AUGMENTATIONS: Mapping[str, Change] = {"mirror": _mirror, "crop": _crop, "colour": _colour, "grey": _grey}
"""Left and right exchanged, half the time; a part of at least 0.8 of each side, enlarged; brightness, contrast and saturation
by up to a fifth; no colour, one time in ten."""


def augmented(image: Image.Image, names: tuple[str, ...], key: tuple[int, ...]) -> Image.Image:
    """The picture, changed by these one after the other; `key` decides how."""
    random = np.random.default_rng(key)
    for name in names:
        image = AUGMENTATIONS[name](image, random)
    return image
