"""What a run does to images, weights and rates, as published: the pieces that configs are made of."""

import ml_collections

from shiftaddvit_jax.checkpoints.published import list_pretrained
from shiftaddvit_jax.train.config import default_config
from shiftaddvit_jax.validation import check_choice

# By stage: where it starts, what it changes, and its learning rates (first, peak for 512 images, last).
STAGES = {
    "dense": (None, {"attention": "msa"}, (1e-7, 5e-5, 1e-6)),
    "add_attention": ("dense", {"attention": "hamming_linear"}, (1e-7, 5e-5, 1e-6)),
    "moe": ("add_attention", {"mlp": "moe", "projections": "moe"}, (5e-8, 1e-5, 5e-7)),
    "shift": ("add_attention", {"mlp": "shift", "projections": "shift"}, (5e-8, 1e-5, 5e-7)),
}


def imagenet_config(
    variant: str, stage: str = "dense", *, drop_path: float = 0.1
) -> ml_collections.ConfigDict:
    """One stage of the paper's on ImageNet: 100 epochs of 256 images a step, from the stage before it.

    The numbers are the authors' (the commands in ``pvt/README.md`` and the defaults in ``pvt/params.py`` of
    github.com/GATECH-EIC/ShiftAddViT), which are DeiT's but for the learning rates: AdamW, weight decay 0.05,
    5 epochs of warm-up and a cosine, RandAugment, mixup, CutMix, erasing, label smoothing, each image three
    times in a row. Theirs change learning rates every epoch; here they change every step.

    The first stage begins with published weights. Others begin with what the stage before left in
    ``runs/VARIANT/STAGE``, so a stage's workdir is ``runs/VARIANT/`` and its name.

    Args:
      variant: a name that `shiftaddvit_jax.list_pretrained` has weights of.
      stage: ``"dense"``, softmax attention in all stages; ``"add_attention"``, stage 1 of the paper;
        ``"moe"`` and ``"shift"``, stage 2 with mixtures or with shifts alone.
      drop_path: of the last block.

    Raises:
      ValueError: an unknown variant or stage.
    """
    check_choice("stage", stage, STAGES)
    before, kinds, (first, peak, last) = STAGES[stage]
    config = default_config()
    config.init_from = f"runs/{variant}/{before}/model" if before else list_pretrained(variant)[0]
    config.model.update({"name": variant, "drop_path": drop_path, **kinds})
    config.data.update(
        {"source": "folder", "path": "imagenet", "image_size": 224, "batch_size": 256, "repeats": 3}
    )
    photographs(config)
    config.train.update(
        {
            "epochs": 100.0,
            "warmup_epochs": 5.0,
            "warmup_learning_rate": first,
            "learning_rate": peak,
            "learning_rate_batch_size": 512,
            "learning_rate_scaling": "linear",
            "final_learning_rate": last,
            "clip_norm": 0.0,
            "log_every": 100,
            "evaluate_every": 5000,
            "checkpoint_every": 5000,
        }
    )
    return config


def photographs(config: ml_collections.ConfigDict) -> None:
    """Give ``config`` DeiT's changes to images: crops, RandAugment, erasing, mixup, CutMix."""
    config.data.augmentation = "crop_flip"
    config.augment.update(
        {
            "interpolation": "bicubic",
            "policy": "rand-m9-mstd0.5-inc1",
            "erase": 0.25,
            "erase_mode": "pixel",
        }
    )
    config.mixing.update({"mixup_alpha": 0.8, "cutmix_alpha": 1.0})
