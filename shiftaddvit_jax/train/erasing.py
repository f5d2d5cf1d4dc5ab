"""Random erasing of a batch where it is, under `jax.jit`: rectangles of an image give way to noise.

Zhong et al., "Random Erasing Data Augmentation", 2017, with the distribution of timm 1.0.31
(``timm.data.random_erasing``); `shiftaddvit_jax.data.random_erasing` does the same to an image on the host.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from shiftaddvit_jax.data.augmentation import ERASING_MODES
from shiftaddvit_jax.validation import check_choice

AREAS = (0.02, 1 / 3)  # of all rectangles together, as a part of the image's
ASPECTS = (0.3, 1 / 0.3)  # height over width
ATTEMPTS = 10  # draws of a rectangle until one is smaller than the image; else there is none


@dataclass(frozen=True)
class Erasing:
    """How images are erased; hashable, so that it may be a static argument of `jax.jit`.

    Attributes:
      probability: that anything of an image is erased.
      mode: what comes instead: ``"const"``, 0; ``"rand"``, one colour a rectangle, from a normal
        distribution; ``"pixel"``, each value from a normal distribution.
      count: largest number of rectangles in an image; the least is 1.

    Raises:
      ValueError: a field out of range.
    """

    probability: float = 0.25
    mode: Literal["const", "rand", "pixel"] = "pixel"
    count: int = 1

    def __post_init__(self) -> None:
        """Check every field."""
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be from 0 to 1, got {self.probability}")
        check_choice("mode", self.mode, ERASING_MODES)
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


def erase(
    erasing: Erasing, key: PRNGKeyArray, images: Float[Array, "batch height width 3"]
) -> Float[Array, "batch height width 3"]:
    """Normalized images with random rectangles replaced, each image by its own draws from ``key``."""
    batch, height, width = images.shape[:3]
    place_key, noise_key = jax.random.split(key)
    inside = draw_rectangles(erasing, place_key, batch, height, width)
    if erasing.mode == "rand":
        colours = jax.random.normal(noise_key, (batch, erasing.count, 3), images.dtype)
        for index in range(erasing.count):  # of rectangles that overlap, the last one's colour
            images = jnp.where(inside[:, index, :, :, None], colours[:, index, None, None], images)
        return images
    noise = jnp.zeros((), images.dtype)
    if erasing.mode == "pixel":
        noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where(jnp.any(inside, axis=1)[..., None], noise, images)


def draw_rectangles(
    erasing: Erasing, key: PRNGKeyArray, batch: int, height: int, width: int
) -> Bool[Array, "batch count height width"]:
    """Which pixels lie in each rectangle of each image."""
    keys = jax.random.split(key, 6)
    erased = jax.random.bernoulli(keys[0], erasing.probability, (batch, 1))
    count = jax.random.randint(keys[1], (batch, 1), 1, erasing.count + 1)
    drawn = erased & (jnp.arange(erasing.count) < count)

    attempts = batch, erasing.count, ATTEMPTS
    area = jax.random.uniform(keys[2], attempts, minval=AREAS[0], maxval=AREAS[1])
    area = area * height * width / count[..., None]
    aspect = jnp.exp(
        jax.random.uniform(keys[3], attempts, minval=math.log(ASPECTS[0]), maxval=math.log(ASPECTS[1]))
    )
    tall, wide = (jnp.round(jnp.sqrt(side)).astype(jnp.int32) for side in (area * aspect, area / aspect))
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits, axis=-1, keepdims=True)
    tall, wide = (jnp.take_along_axis(side, first, axis=-1)[..., 0] for side in (tall, wide))
    drawn &= jnp.any(fits, axis=-1)

    rows, columns = (
        _side(key, length, whole) for key, length, whole in ((keys[4], tall, height), (keys[5], wide, width))
    )
    return drawn[..., None, None] & rows[..., :, None] & columns[..., None, :]


def _side(
    key: PRNGKeyArray, length: Int[Array, "batch count"], whole: int
) -> Bool[Array, "batch count whole"]:
    """Which of ``whole`` pixels lie in a stretch of ``length`` at a random place."""
    start = jax.random.randint(key, length.shape, 0, jnp.maximum(whole - length, 0) + 1)
    place = jnp.arange(whole)
    return (place >= start[..., None]) & (place < (start + length)[..., None])
