"""Tiles and windows of sound as pictures for a page."""

import base64
import io

import numpy as np
from PIL import Image


def png(image: Image.Image) -> str:
    """Base64 of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def strip(tiles_M: np.ndarray) -> Image.Image:
    """Tiles [M, side, side, 3] side by side."""
    return Image.fromarray(np.concatenate(list(tiles_M), axis=1))


def spectrogram(frames: np.ndarray) -> Image.Image:
    """Log-mel frames [frames, mel bins]: time to the right, pitch upwards, silence white."""
    grey = np.uint8(255) - np.interp(frames, (-1.5, 1.5), (0, 255)).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(grey.T[::-1]))
