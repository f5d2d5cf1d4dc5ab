"""DeiT-Small on ImageNet-1k: from the published weights to shifts and adds.

    shiftaddvit train --config configs/deit_small_imagenet.py:STAGE --workdir runs/deit_small/STAGE

with STAGE dense, then add_attention, then moe or shift. ImageNet's ``train`` and ``val`` are expected in
``imagenet/``; ``--config.data.path=DIR`` says otherwise.

Cost: 500,456 steps of 256 images each; ``--plan`` times one on your devices. The authors used eight GPUs.
To expect: the weights begin at 79.9 % top-1 (facebookresearch/deit).
The paper (arXiv 2306.06446) keeps close to the dense accuracy with mixtures, and loses some with shifts
alone. These configs have not been run to their end.
"""

from shiftaddvit_jax.train.recipes import imagenet_config


def get_config(stage="dense"):
    """``dense``, ``add_attention``, ``moe`` or ``shift``."""
    return imagenet_config("deit_small", stage)
