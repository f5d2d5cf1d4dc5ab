"""Optimization: from a config to a trained model in a folder."""

from shiftaddvit_jax.optional import require

require("train", "training")

from shiftaddvit_jax.train.config import default_config
from shiftaddvit_jax.train.evaluate import evaluate
from shiftaddvit_jax.train.loop import train_and_evaluate

__all__ = ["default_config", "evaluate", "train_and_evaluate"]
