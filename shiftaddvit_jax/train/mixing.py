"""Mixup and CutMix: each image mixed with another of its batch, and labels mixed as the pixels are.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018; Yun et al., "CutMix: Regularization Strategy
to Train Strong Classifiers with Localizable Features", 2019. Formulas are those of timm 1.0.31
(``timm.data.mixup``).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from shiftaddvit_jax.validation import check_choice


@dataclass(frozen=True)
class Mixing:
    """How a batch is mixed; hashable, so that it may be a static argument of `jax.jit`.

    Attributes:
      mixup_alpha: mixup's share of an image is drawn from Beta(alpha, alpha); 0 is no mixup.
      cutmix_alpha: the same for CutMix's share of the area; 0 is no CutMix.
      probability: that a batch, or an image, is mixed.
      switch_probability: that it is mixed by CutMix, where both are on.
      mode: ``"batch"``, one draw for all images; ``"elem"``, one for each.
      label_smoothing: part of each label that is spread over all classes.

    Raises:
      ValueError: a field out of range.
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    probability: float = 1.0
    switch_probability: float = 0.5
    mode: Literal["batch", "elem"] = "batch"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Check every field."""
        check_choice("mode", self.mode, ("batch", "elem"))
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("probability", "switch_probability", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")


def mix(
    mixing: Mixing,
    key: PRNGKeyArray,
    images: Float[Array, "batch height width 3"],
    labels: Int[Array, " batch"],
    num_classes: int,
    active: bool | Bool[Array, ""] = True,
) -> tuple[Float[Array, "batch height width 3"], Float[Array, "batch num_classes"]]:
    """Mixed images, and the probabilities of classes that are their labels; each row's sum is 1.

    The first image is mixed with the last, the second with the last but one, and so on.

    Args:
      mixing: how.
      key: where shares and boxes are drawn from.
      images: the batch.
      labels: its classes.
      num_classes: the number of classes.
      active: whether to mix at all, which may be traced; labels are smoothed either way.
    """
    batch, height, width = images.shape[:3]
    count = batch if mixing.mode == "elem" else 1
    draws, rows, columns = jax.random.split(key, 3)
    share, cut = draw_shares(mixing, draws, count)
    share = jnp.where(active, share, 1.0)
    box, kept = cutmix_box(
        share,
        jax.random.randint(rows, (count,), 0, height),
        jax.random.randint(columns, (count,), 0, width),
        height,
        width,
    )
    others = images[::-1]
    pasted = jnp.where(box[..., None], others, images)
    part = share[:, None, None, None].astype(images.dtype)
    blended = part * images + (1 - part) * others
    mixed = jnp.where(cut[:, None, None, None], pasted, blended)

    share = jnp.where(cut, kept, share)[:, None]
    targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), mixing.label_smoothing)
    return mixed, share * targets + (1 - share) * targets[::-1]


def draw_shares(
    mixing: Mixing, key: PRNGKeyArray, count: int
) -> tuple[Float[Array, " count"], Bool[Array, " count"]]:
    """``count`` shares that images keep of themselves, 1 where nothing is mixed; and which are CutMix's."""
    keys = jax.random.split(key, 4)
    mixup, cutmix = (
        jax.random.beta(key, alpha, alpha, (count,)) if alpha else None
        for key, alpha in zip(keys, (mixing.mixup_alpha, mixing.cutmix_alpha), strict=False)
    )
    cut = jnp.full(count, mixup is None)
    share = jnp.ones(count) if mixup is None else mixup
    if cutmix is not None:
        if mixup is not None:
            cut = jax.random.bernoulli(keys[2], mixing.switch_probability, (count,))
        share = jnp.where(cut, cutmix, share)
    mixed = jax.random.bernoulli(keys[3], mixing.probability, (count,))
    return jnp.where(mixed, share, 1.0), cut


def cutmix_box(
    share: Float[Array, " count"],
    row: Int[Array, " count"],
    column: Int[Array, " count"],
    height: int,
    width: int,
) -> tuple[Bool[Array, "count height width"], Float[Array, " count"]]:
    """Which pixels CutMix replaces, and the share of the area that stays.

    A box has the image's proportions, 1 - ``share`` of its area, and its centre at ``row``, ``column``; the
    image's edges cut it, so that what stays may be more than ``share``.
    """

    def side(length, centre):
        cut = jnp.floor(length * jnp.sqrt(1 - share)).astype(jnp.int32)
        first = jnp.clip(centre - cut // 2, 0, length)
        end = jnp.clip(centre + (cut + 1) // 2, 0, length)
        place = jnp.arange(length)
        return (place >= first[:, None]) & (place < end[:, None]), end - first

    inside_rows, tall = side(height, row)
    inside_columns, wide = side(width, column)
    return inside_rows[:, :, None] & inside_columns[:, None, :], 1 - tall * wide / (height * width)
