"""GNT-nano on one scene, by default that of planes, boxes and spheres: minutes on two cores.

python -m shiftaddvit_jax.main --config=configs/novel_views.py --workdir=runs/views --config.data.path=DIR
"""

from shiftaddvit_jax.train.views import scene_config


def get_config():
    """800 steps of 256 rays at a rate of 0.005, as `shiftaddvit nvs train` has them."""
    config = scene_config()
    config.train.evaluate_every = 400
    config.train.checkpoint_every = 200
    return config
