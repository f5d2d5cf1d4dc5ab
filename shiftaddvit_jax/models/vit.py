"""ViT (Dosovitskiy et al., arXiv 2010.11929) and DeiT (Touvron et al., arXiv 2012.12877), patch size 16."""

import math
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from shiftaddvit_jax.models.position import Interpolation, resize_position_embeddings
from shiftaddvit_jax.models.preprocessing import Preprocessing
from shiftaddvit_jax.nn import Block, Primitives, make_layer_norm, make_linear, make_patch_conv
from shiftaddvit_jax.validation import check_images

PATCH_SIZE = 16
# The kinds that the paper gives DeiT.
ATTENTION_KINDS = ("msa", "linear", "hamming_linear", "hamming_quadratic")


class VisionTransformer(nn.Module):
    """ViT or DeiT: one stage of blocks, with any kind of attention and linear layer.

    Attributes:
      variant: the row of `VARIANTS` that the model was made from.
      image_size: side in pixels of the model's own images; for other sizes, the position embeddings are
        interpolated.
      num_classes: number of logits.
      embed_dim: channels.
      depth: number of blocks.
      num_heads: heads.
      distilled: whether there is a distillation token beside the class token, as in distilled DeiT. It has a
        head of its own, and the logits are the mean of both heads' logits.
      attention: kind of attention, one entry.
      mlp: kind of linear layer in the MLPs, one entry.
      projections: the same for the attentions' linear layers.
      dropout: rate in attention and MLP.
      drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
      layer_norm_eps: epsilon of every LayerNorm; by default the original's 1e-6.
      primitives: how shifts and additions are computed.
    """

    interpolation: ClassVar[Interpolation] = "bicubic"

    variant: str
    image_size: int
    num_classes: int
    embed_dim: int
    depth: int
    num_heads: int
    distilled: bool
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    projections: tuple[str, ...]
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_norm_eps: float | None = None
    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits, in float32; ``train`` and the collections are as in `PyramidVisionTransformerV2`.

        Raises:
          ValueError: images of another rank, without 3 channels, or whose sides are not multiples of 16.
        """
        check_images(images)
        for side in (self.image_size, *images.shape[1:3]):
            if side < PATCH_SIZE or side % PATCH_SIZE:
                raise ValueError(
                    f"{self.variant} cuts images into patches of {PATCH_SIZE} x {PATCH_SIZE} pixels: their "
                    f"sides must be multiples of {PATCH_SIZE}, got {side}"
                )
        dtype = self.primitives.dtype or jnp.float32
        init = nn.initializers.truncated_normal(0.02)
        patch_embed = make_patch_conv(self.embed_dim, PATCH_SIZE, self.primitives, name="patch_embed")
        x = patch_embed(images.astype(dtype))
        batch, *sides, channels = x.shape
        grid = sides[0], sides[1]
        first = [self.param("cls_token", init, (channels,), jnp.float32)]
        if self.distilled:
            first.append(self.param("dist_token", init, (channels,), jnp.float32))
        trained_grid = (self.image_size // PATCH_SIZE,) * 2
        shape = (len(first) + trained_grid[0] ** 2, channels)
        embeddings = self.param("pos_embed", init, shape, jnp.float32)
        embeddings = resize_position_embeddings(embeddings, trained_grid, grid, self.interpolation)
        tokens = jnp.broadcast_to(jnp.stack(first).astype(dtype), (batch, len(first), channels))
        x = jnp.concatenate([tokens, x.reshape(batch, math.prod(grid), channels)], axis=1)
        x = x + embeddings.astype(dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for index, rate in enumerate(np.linspace(0, self.drop_path, self.depth)):
            x = Block(
                num_heads=self.num_heads,
                attention=self.attention[0],
                mlp=self.mlp[0],
                projections=self.projections[0],
                dropout=self.dropout,
                drop_path=float(rate),
                layer_norm_eps=self.layer_norm_eps,
                primitives=self.primitives,
                name=f"block{index + 1}",
            )(x, grid, train)
        x = make_layer_norm(self.layer_norm_eps, self.primitives, name="norm")(x)
        logits = make_linear("dense", self.num_classes, self.primitives, name="head")(x[:, 0])
        if self.distilled:
            head = make_linear("dense", self.num_classes, self.primitives, name="head_dist")
            logits = (logits + head(x[:, 1])) / 2
        return logits.astype(jnp.float32)


# As in timm, whose files these are (`vision_transformer.py`, `_cfg`): crop_pct 0.9, Inception's mean.
AUGREG = Preprocessing(size=224, resize_to=248, mean=(0.5,) * 3, deviation=(0.5,) * 3)
# As DeiT's authors evaluate it (https://github.com/facebookresearch/deit, datasets.py): crop ratio 0.875.
DEIT = Preprocessing(size=224, resize_to=256)


def _variant(embed_dim, num_heads, preprocessing, distilled=False):
    return {
        "embed_dim": embed_dim,
        "depth": 12,
        "num_heads": num_heads,
        "distilled": distilled,
        "attention": ("msa",),
        "preprocessing": preprocessing,
    }


# Table 1 of the DeiT paper; a ViT of the same size differs only in its training.
VARIANTS = {
    "vit_tiny": _variant(192, 3, AUGREG),
    "vit_small": _variant(384, 6, AUGREG),
    "vit_base": _variant(768, 12, AUGREG),
    "deit_tiny": _variant(192, 3, DEIT),
    "deit_small": _variant(384, 6, DEIT),
    "deit_base": _variant(768, 12, DEIT),
    "deit_tiny_distilled": _variant(192, 3, DEIT, distilled=True),
    "deit_small_distilled": _variant(384, 6, DEIT, distilled=True),
    "deit_base_distilled": _variant(768, 12, DEIT, distilled=True),
}
