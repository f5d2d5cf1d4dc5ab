"""Learning rates: by step, and with the size of batches, as timm sets them."""

import math
from functools import lru_cache

import jax.numpy as jnp
import optax


def cosine_schedule(
    peak: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    start: float = 0.0,
    end: float = 0.0,
    warmup_first: bool = False,
    steps_per_epoch: int = 1,
) -> optax.Schedule:
    """The learning rate by step: a linear rise, a cosine's half wave down, then ``end``, the cool-down.

    Numbers are those of ``timm.scheduler.CosineLRScheduler`` (timm 1.0.31) with one cycle. Equal
    arguments give the same function, see `create_optimizer`.

    Args:
      peak: learning rate at the top.
      steps: length of the cosine, within which the warm-up lies: the rate jumps at the end of the warm-up to
        what the cosine is by then. What is trained longer is the cool-down.
      warmup_steps: length of the rise.
      start: learning rate of the first step, where there is a warm-up.
      end: learning rate after the cosine.
      warmup_first: whether the cosine begins after the warm-up, and ends ``warmup_steps`` later.
      steps_per_epoch: the rate changes once in so many steps: 1 is timm's ``--sched-on-updates``, the steps
        of an epoch are its default.

    Raises:
      ValueError: ``steps`` or ``steps_per_epoch`` below 1, or a warm-up that is no part of ``steps``.
    """
    if min(steps, steps_per_epoch) < 1:
        raise ValueError(f"steps and steps_per_epoch must be at least 1, got {steps} and {steps_per_epoch}")
    if warmup_steps < 0 or (warmup_steps > steps and not warmup_first):
        raise ValueError(f"warmup_steps must be from 0 to {steps}, got {warmup_steps}")
    return _cosine(peak, steps, warmup_steps, start, end, warmup_first, steps_per_epoch)


@lru_cache(maxsize=32)
def _cosine(peak, steps, warmup_steps, start, end, warmup_first, steps_per_epoch):
    begin = warmup_steps if warmup_first else 0

    def schedule(step):
        step = step // steps_per_epoch * steps_per_epoch
        along = jnp.clip((step - begin) / steps, 0, 1)
        cosine = end + (peak - end) * (1 + jnp.cos(jnp.pi * along)) / 2
        rise = start + (peak - start) * step / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, rise, cosine)

    return schedule


def scaled_learning_rate(
    base: float,
    batch_size: int,
    optimizer: str,
    *,
    base_batch_size: int = 256,
    scaling: str = "",
) -> float:
    """The learning rate for batches of ``batch_size``, where ``base`` is that for ``base_batch_size``.

    With accumulated gradients, ``batch_size`` counts the images of one update.

    Args:
      base: learning rate for ``base_batch_size``.
      batch_size: images of one update.
      optimizer: its name.
      base_batch_size: images that ``base`` is meant for.
      scaling: ``"linear"``, in proportion, or ``"sqrt"``, as the square root; by default as timm's
        ``train.py`` chooses: the root for optimizers with "ada" or "lamb" in their name.
    """
    ratio = batch_size / base_batch_size
    adapts = "ada" in optimizer or "lamb" in optimizer
    is_root = scaling == "sqrt" or (not scaling and adapts)
    return base * (math.sqrt(ratio) if is_root else ratio)
