"""An image as a model's input, by the model's own preprocessing."""

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
    values = pixels.astype(np.float32) * np.float32(preprocessing.rescale)
    if preprocessing.channels == "bgr":
        values = values[..., ::-1]
    mean, deviation = (np.array(x, np.float32) for x in (preprocessing.mean, preprocessing.deviation))
    return (values - mean) / deviation


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
