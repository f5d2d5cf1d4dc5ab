"""Pixels: where images come from, and the batches made of them."""

from shiftaddvit_jax.data.pipeline import load_image, normalize, test_batches, train_iterator
from shiftaddvit_jax.data.sources import Dataset, load_dataset

__all__ = ["Dataset", "load_dataset", "load_image", "normalize", "test_batches", "train_iterator"]
