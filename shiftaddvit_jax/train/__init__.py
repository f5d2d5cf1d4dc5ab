"""Optimization: from a config to a trained model in a folder."""

from shiftaddvit_jax.optional import require

require("train", "training")

from shiftaddvit_jax.train.compute import compute_as
from shiftaddvit_jax.train.config import default_config
from shiftaddvit_jax.train.distillation import distillation_loss, label_logits
from shiftaddvit_jax.train.ema import ema_decay, update_ema
from shiftaddvit_jax.train.erasing import Erasing, erase
from shiftaddvit_jax.train.evaluate import evaluate
from shiftaddvit_jax.train.loop import train_and_evaluate
from shiftaddvit_jax.train.losses import classification_loss
from shiftaddvit_jax.train.mixing import Mixing, mix
from shiftaddvit_jax.train.optimizers import create_optimizer
from shiftaddvit_jax.train.schedules import cosine_schedule, scaled_learning_rate

__all__ = [
    "Erasing",
    "Mixing",
    "classification_loss",
    "compute_as",
    "cosine_schedule",
    "create_optimizer",
    "default_config",
    "distillation_loss",
    "ema_decay",
    "erase",
    "evaluate",
    "label_logits",
    "mix",
    "scaled_learning_rate",
    "train_and_evaluate",
    "update_ema",
]
