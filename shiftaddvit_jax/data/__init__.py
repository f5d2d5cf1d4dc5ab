"""Pixels: where images come from, and the batches made of them."""

from shiftaddvit_jax.data.augmentation import Augmentation
from shiftaddvit_jax.data.images import decode_file
from shiftaddvit_jax.data.pipeline import evaluation_batches, load_image, normalize, train_iterator
from shiftaddvit_jax.data.preprocessing import preprocess
from shiftaddvit_jax.data.sources import Dataset, load_dataset

__all__ = [
    "Augmentation",
    "Dataset",
    "decode_file",
    "evaluation_batches",
    "load_dataset",
    "load_image",
    "normalize",
    "preprocess",
    "train_iterator",
]
