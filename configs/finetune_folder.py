"""A few thousand photographs of your own classes, from published weights: minutes on a GPU, hours on a CPU.

    shiftaddvit train --config configs/finetune_folder.py --workdir runs/mine --config.data.path=DIR

``DIR`` has one folder a class, or ``train`` and ``val`` with such folders. ``:WEIGHTS`` after the file's name
takes other weights, such as ``configs/finetune_folder.py:hf:OpenGVLab/pvt_v2_b2``.

Cost: 30 epochs, for 5,000 photographs 2,344 steps of 64 images. With pvt_v2_b0 on two cores of a CPU a step
takes about 6 s; ``--plan`` times it on your machine.
To expect: layers near the image change little (layer decay 0.75), and the average of the parameters scores
better than the parameters. Not measured on a data set of this size.
"""

from shiftaddvit_jax.train import default_config


def get_config(weights="hf:OpenGVLab/pvt_v2_b0"):
    """Finetuning of ``weights``, any source of `shiftaddvit_jax.from_pretrained`."""
    config = default_config()
    config.init_from = weights
    config.model.update({"new_head": True, "drop_path": 0.1})
    config.data.update({"source": "folder", "batch_size": 64, "augmentation": "crop_flip"})
    config.augment.update({"scale": (0.35, 1.0), "policy": "rand-m7-mstd0.5-inc1", "erase": 0.1})
    config.mixing.update({"mixup_alpha": 0.1, "off_epoch": 25.0})
    config.train.update(
        {
            "epochs": 30.0,
            "warmup_epochs": 2.0,
            "learning_rate": 5e-4,
            "final_learning_rate": 1e-6,
            "layer_decay": 0.75,
            "ema_decay": 0.999,
            "ema_warmup": True,
            "log_every": 20,
            "evaluate_every": 200,
            "checkpoint_every": 200,
        }
    )
    return config
