"""PVTv2-nano on Fashion-MNIST's 60,000 photographs of clothes, 28 x 28 pixels in grey; evaluated on 10,000.

    shiftaddvit train --config configs/fashion_mnist.py --workdir runs/fashion_mnist

The four files are those of Debian's package dataset-fashion-mnist; ``--config.data.path=DIR`` says another
place.

Cost: 14,063 steps of 128 images, each about 0.2 s on one core of a CPU: three quarters of an hour.
To expect: 92.66 % top-1 on the test images with seed 0 (`docs/results.md`).
"""

from shiftaddvit_jax.train import default_config


def get_config():
    """Thirty epochs of slight crops and mirrored images, chosen on 5,000 images held out of training."""
    config = default_config()
    config.data.update(
        {
            "source": "idx",
            "path": "/usr/share/datasets/fashion-mnist",
            "batch_size": 128,
            "augmentation": "crop_flip",
        }
    )
    config.augment.update({"scale": (0.85, 1.0), "ratio": (0.9, 1.1), "interpolation": "bicubic"})
    config.train.update(
        {
            "epochs": 30.0,
            "learning_rate": 3e-3,
            "label_smoothing": 0.05,
            "warmup_steps": 200,
            "log_every": 100,
            "evaluate_every": 2000,
            "checkpoint_every": 500,
        }
    )
    return config
