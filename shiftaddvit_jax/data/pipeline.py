"""From decoded images to batches: resizing, augmentation, normalisation, and an order that can be resumed."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from shiftaddvit_jax.data.images import decode_file
from shiftaddvit_jax.data.preprocessing import crop, normalize_as, preprocess
from shiftaddvit_jax.data.sources import Examples
from shiftaddvit_jax.models.preprocessing import IMAGENET_DEVIATION, IMAGENET_MEAN, Preprocessing
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.validation import check_choice

AUGMENTATIONS = ("none", "affine", "crop_flip")
MEAN = np.array(IMAGENET_MEAN, np.float32)
STANDARD_DEVIATION = np.array(IMAGENET_DEVIATION, np.float32)


def normalize(image: UInt8[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """Pixels less ImageNet's mean, over its standard deviation, channel by channel, float32."""
    return (image.astype(np.float32) / 255 - MEAN) / STANDARD_DEVIATION


def resize(image: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The centre square of ``image``, scaled to ``size`` pixels a side (bicubic)."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box))


def load_image(path: str | Path, size: int) -> Float[np.ndarray, "size size 3"]:
    """The centre square of an image file at a size, with ImageNet's normalization.

    What a model expects may be something else: `preprocess` makes that.

    Raises:
      ValueError: as `decode_file`.
    """
    return normalize(resize(decode_file(path), size))


def train_iterator(
    examples: Examples,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    augmentation: str,
    seed: int,
    first_batch: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches ``{"image": float32 [batch, size, size, 3], "label": int32 [batch]}``.

    Batch n depends on the arguments and n alone, so a run that stopped goes on at ``first_batch`` with the
    batches it would have seen. Every epoch has an order of its own.

    Args:
      examples: what to draw from.
      preprocessing: the model's; without augmentation, images are cut out as it says.
      batch_size: images a batch; the last of one epoch and the first of the next share a batch.
      augmentation: ``"none"``; ``"affine"``, small rotations, scalings and shifts, for handwriting;
        ``"crop_flip"``, random crops of 8 % to 100 % of the area, mirrored half the time, for photographs.
      seed: seed of the order and the augmentation.
      first_batch: number of the first batch.

    Raises:
      ValueError: an unknown augmentation, or a batch size below 1.
    """
    require("train", "the order of training images", "grain")
    import grain

    check_choice("augmentation", augmentation, AUGMENTATIONS)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    augment = {"none": _centre, "affine": _affine, "crop_flip": _crop_flip}[augmentation]

    def prepare(example, rng):
        pixels = augment(example["image"], preprocessing, rng)
        return {"image": normalize_as(pixels, preprocessing), "label": example["label"]}

    # Endless in effect. Without a number of epochs, Grain's length overflows for a single example.
    epochs = 2**40 // len(examples)
    batches = (
        grain.MapDataset.source(examples)
        .seed(seed)
        .shuffle()
        .repeat(epochs)
        .random_map(prepare)
        .batch(batch_size)
    )
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
    iterator.set_state({"next_index": first_batch})
    return iterator


def evaluation_batches(
    examples: Examples, *, preprocessing: Preprocessing, batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Every example once, in order: batches as in `train_iterator`, each with its number of real examples."""
    for first in range(0, len(examples), batch_size):
        chosen = [examples[index] for index in range(first, min(first + batch_size, len(examples)))]
        padding = batch_size - len(chosen)
        batch = {
            "image": np.stack([preprocess(example["image"], preprocessing) for example in chosen]),
            "label": np.stack([example["label"] for example in chosen]),
        }
        yield (
            {name: np.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)) for name, part in batch.items()},
            len(chosen),
        )


def _centre(image, preprocessing, rng):
    return crop(image, preprocessing)


def _affine(image, preprocessing, rng):
    size = preprocessing.size
    angle = np.deg2rad(rng.uniform(-12, 12))
    scale_x, scale_y = rng.uniform(0.88, 1.15, size=2)
    shift_x, shift_y = rng.uniform(-0.1, 0.1, size=2) * size
    shear = rng.uniform(-0.15, 0.15)
    square = Image.fromarray(resize(image, size))
    # Pillow wants the map from output to input pixels, here about the centre.
    a, b = math.cos(angle) / scale_x, math.sin(angle) / scale_x + shear
    d, e = -math.sin(angle) / scale_y, math.cos(angle) / scale_y
    centre = size / 2
    c = centre - a * (centre + shift_x) - b * (centre + shift_y)
    f = centre - d * (centre + shift_x) - e * (centre + shift_y)
    corner = tuple(int(value) for value in image[0, 0])
    return np.asarray(
        square.transform(
            (size, size),
            Image.Transform.AFFINE,
            (a, b, c, d, e, f),
            Image.Resampling.BILINEAR,
            fillcolor=corner,
        )
    )


def _crop_flip(image, preprocessing, rng):
    size, filter_ = preprocessing.size, Image.Resampling[preprocessing.interpolation.upper()]
    height, width = image.shape[:2]
    area = height * width * rng.uniform(0.08, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_width = min(width, max(1, round(math.sqrt(area * aspect))))
    crop_height = min(height, max(1, round(math.sqrt(area / aspect))))
    left = rng.integers(width - crop_width + 1)
    top = rng.integers(height - crop_height + 1)
    box = (left, top, left + crop_width, top + crop_height)
    cropped = np.asarray(Image.fromarray(image).resize((size, size), filter_, box))
    return cropped[:, ::-1] if rng.random() < 0.5 else cropped
