"""PVTv2-nano on Fashion-MNIST's 60,000 photographs of clothes, 28 x 28 pixels in grey; evaluated on 10,000.

    shiftaddvit train --config configs/fashion_mnist.py --workdir runs/fashion_mnist

The four files are those of Debian's package dataset-fashion-mnist; ``--config.data.path=DIR`` says another
place.

Cost: 4,688 steps of 128 images, each about 0.15 s on two cores of a CPU: a quarter of an hour.
To expect: 77 % top-1 after the first 300 steps of 64 images with small rotations instead of crops; these ten
epochs have not been run to their end.
"""

from shiftaddvit_jax.train import default_config


def get_config():
    """Ten epochs of crops and mirrored images."""
    config = default_config()
    config.data.update(
        {
            "source": "idx",
            "path": "/usr/share/datasets/fashion-mnist",
            "batch_size": 128,
            "augmentation": "crop_flip",
        }
    )
    config.augment.update({"scale": (0.6, 1.0), "ratio": (0.9, 1.1), "interpolation": "bicubic"})
    config.train.update(
        {
            "epochs": 10.0,
            "warmup_steps": 200,
            "log_every": 100,
            "evaluate_every": 1000,
            "checkpoint_every": 500,
        }
    )
    return config
