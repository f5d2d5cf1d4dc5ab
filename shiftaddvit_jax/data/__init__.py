"""Pixels: where images come from, and the batches made of them."""

from shiftaddvit_jax.data.augmentation import AUGMENTATIONS, Augmentation, affine, no_augmentation
from shiftaddvit_jax.data.examples import Dataset, Examples
from shiftaddvit_jax.data.images import decode_file
from shiftaddvit_jax.data.pipeline import (
    check_data,
    evaluation_batches,
    load_image,
    normalize,
    train_iterator,
)
from shiftaddvit_jax.data.preprocessing import preprocess
from shiftaddvit_jax.data.sources import load_dataset

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Dataset",
    "Examples",
    "affine",
    "check_data",
    "decode_file",
    "evaluation_batches",
    "load_dataset",
    "load_image",
    "no_augmentation",
    "normalize",
    "preprocess",
    "train_iterator",
]
