"""PVTv2-nano with multi-head self-attention on scikit-learn's handwritten digits.

python -m shiftaddvit_jax.main --config=configs/digits.py --workdir=runs/digits
"""

from shiftaddvit_jax.train import default_config


def get_config():
    """The defaults are this experiment."""
    return default_config()
