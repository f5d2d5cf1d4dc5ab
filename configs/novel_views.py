"""GNT-nano on one scene, by default that of planes, boxes and spheres: minutes on two cores.

python -m shiftaddvit_jax.main --config=configs/novel_views.py --workdir=runs/views --config.data.path=DIR
"""

from shiftaddvit_jax.train import default_config


def get_config():
    """Adam as GNT's, with a cosine instead of its halving every 50,000 of 250,000 steps."""
    config = default_config()
    config.model.name = "gnt_nano"
    config.data.source = "scene"
    config.data.path = "analytic"
    config.data.batch_size = 256  # rays
    config.train.steps = 800
    config.train.learning_rate = 5e-3
    config.train.warmup_steps = 50
    config.train.weight_decay = 0.0
    config.train.evaluate_every = 400
    config.train.checkpoint_every = 200
    return config
