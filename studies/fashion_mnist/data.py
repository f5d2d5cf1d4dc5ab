"""Fashion-MNIST with 5,000 of its training images in the place of its test images."""

import gzip
from pathlib import Path

import numpy as np

from shiftaddvit_jax.data import load_dataset
from shiftaddvit_jax.data.images import whole
from shiftaddvit_jax.files import whole_folder

COUNT = 5000


def hold_out(data: Path, folder: Path) -> Path:
    """``folder`` with four IDX files: training images of ``data`` alone, ``COUNT`` of them to test on."""
    if folder.exists():
        return folder
    examples = load_dataset("idx", str(data)).train
    images = np.stack([whole(examples.open(index))[..., 0] for index in range(len(examples))])
    order = np.random.default_rng(0).permutation(len(images))
    with whole_folder(folder) as temporary:
        for name, chosen in (("t10k", order[:COUNT]), ("train", order[COUNT:])):
            chosen = np.sort(chosen)
            _write_idx(temporary / f"{name}-images-idx3-ubyte.gz", images[chosen])
            _write_idx(temporary / f"{name}-labels-idx1-ubyte.gz", np.asarray(examples.labels)[chosen])
    return folder


def _write_idx(path, array):
    header = (0x800 + array.ndim).to_bytes(4, "big") + b"".join(
        side.to_bytes(4, "big") for side in array.shape
    )
    with gzip.open(path, "wb", 1) as file:
        file.write(header + array.astype(np.uint8).tobytes())
