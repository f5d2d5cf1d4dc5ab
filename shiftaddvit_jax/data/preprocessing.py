"""An image as a model's input, by the model's own preprocessing."""

from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from shiftaddvit_jax.data.images import decode_file
from shiftaddvit_jax.models.preprocessing import Preprocessing


def preprocess(
    image: UInt8[np.ndarray, "height width 3"] | str | Path | bytes | BinaryIO | Image.Image,
    preprocessing: Preprocessing,
) -> Float[np.ndarray, "size size 3"]:
    """``image`` as the model takes it, float32.

    Args:
      image: pixels, or what `decode_file` reads.
      preprocessing: the model's.

    Raises:
      ValueError: an array of another type or shape, or a file as in `decode_file`.
    """
    pixels = image if isinstance(image, np.ndarray) else decode_file(image)
    return normalize_as(crop(pixels, preprocessing), preprocessing)


def normalize_as(
    pixels: UInt8[np.ndarray, "*shape 3"], preprocessing: Preprocessing
) -> Float[np.ndarray, "*shape 3"]:
    """Pixels of the model's size as the model takes them: rescaled, less the mean, over the deviation."""
    if preprocessing.channels == "bgr":
        pixels = pixels[..., ::-1]
    values = pixels.astype(np.float32, order="C")
    # In place, and whole rows at once: NumPy is five times as slow where its innermost loop is three long.
    rows = values.reshape(-1, pixels.shape[-2] * 3 if pixels.ndim > 1 else 3)
    mean, deviation = _row(preprocessing.mean, rows.shape[1]), _row(preprocessing.deviation, rows.shape[1])
    rows *= np.float32(preprocessing.rescale)
    rows -= mean
    rows /= deviation
    return values


@lru_cache(maxsize=32)
def _row(color, length):
    return np.tile(np.array(color, np.float32), length // 3)


def resize(image: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The centre square of ``image``, scaled to ``size`` pixels a side (bicubic)."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box))


def crop(
    pixels: UInt8[np.ndarray, "height width 3"], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "size size 3"]:
    """The square of ``pixels`` that the model sees, resized.

    The edges and the place of the square are those of torchvision's ``Resize`` and ``CenterCrop``, which timm
    calls, or of transformers' image processors, see `Preprocessing.crop_rounding`.

    Raises:
      ValueError: an array that is no uint8 RGB image.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels must be uint8 [height, width, 3], got {pixels.dtype} {pixels.shape}")
    size, resize_to = preprocessing.size, preprocessing.resize_to
    height, width = resize_to, resize_to
    if preprocessing.resize == "shortest_edge":
        pixels = _middle(pixels)
        height, width = (resize_to * side // min(pixels.shape[:2]) for side in pixels.shape[:2])
    filter_ = Image.Resampling[preprocessing.interpolation.upper()]
    # Whole, then cut: Pillow would resize the square alone in another order, and round otherwise.
    resized = Image.fromarray(pixels).resize((width, height), filter_)
    if preprocessing.crop_rounding == "even":
        left, top = round((width - size) / 2), round((height - size) / 2)
    else:
        left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized)[top : top + size, left : left + size]


def _middle(pixels):
    """The middle of a thin image, at most eight squares; no more than one is seen of it, at any length."""
    longest = 8 * min(pixels.shape[:2])
    top, left = (max(0, side - longest) // 2 for side in pixels.shape[:2])
    return pixels[top : top + longest, left : left + longest]
