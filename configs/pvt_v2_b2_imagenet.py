"""PVTv2-B2 on ImageNet-1k: from the published weights to shifts and adds.

    shiftaddvit train --config configs/pvt_v2_b2_imagenet.py:STAGE --workdir runs/pvt_v2_b2/STAGE

with STAGE dense, then add_attention, then moe or shift. ImageNet's ``train`` and ``val`` are expected in
``imagenet/``; ``--config.data.path=DIR`` says otherwise.

Cost: 500,456 steps of 256 images each; ``--plan`` times one on your devices. The authors used eight GPUs.
To expect: the weights begin at 82.0 % top-1 (whai362/PVT).
The stage dense gives softmax attention in place of spatial reductions.
The paper (arXiv 2306.06446) keeps close to the dense accuracy with mixtures, and loses some with shifts
alone. These configs have not been run to their end.
"""

from shiftaddvit_jax.train.recipes import imagenet_config


def get_config(stage="dense"):
    """``dense``, ``add_attention``, ``moe`` or ``shift``."""
    return imagenet_config("pvt_v2_b2", stage)
