"""PVTv2 (Wang et al., arXiv 2106.13797): a pyramid of four stages with overlapping patch embeddings."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from shiftaddvit_jax.nn import Block, Primitives

STAGES = 4


class OverlapPatchEmbed(nn.Module):
    """A strided convolution whose patches overlap, then a LayerNorm over channels.

    Attributes:
      features: channels of a token.
      patch_size: side of a patch in pixels, odd.
      stride: distance of two patches in pixels.
      primitives: gives the dtype.
    """

    features: int
    patch_size: int
    stride: int
    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns features"]:
        dtype = self.primitives.dtype
        sides = (self.patch_size,) * 2
        # He initialisation for the fan-out, as in the original.
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        x = nn.Conv(
            self.features,
            sides,
            (self.stride,) * 2,
            [(self.patch_size // 2,) * 2] * 2,
            kernel_init=init,
            dtype=dtype,
            name="proj",
        )(x)
        return nn.LayerNorm(1e-5, dtype=dtype, name="norm")(x)


class Stage(nn.Module):
    """Patch embedding, blocks and a LayerNorm: one level of the pyramid.

    Attributes:
      features: channels of a token.
      depth: number of blocks.
      patch_size: side of a patch in pixels.
      stride: distance of two patches in pixels.
      drop_path: each block's rate of stochastic depth.
      block: arguments of every `Block`.
    """

    features: int
    depth: int
    patch_size: int
    stride: int
    drop_path: tuple[float, ...]
    block: dict

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns features"]:
        primitives = self.block["primitives"]
        x = OverlapPatchEmbed(self.features, self.patch_size, self.stride, primitives, name="patch_embed")(x)
        batch, *grid, channels = x.shape
        x = x.reshape(batch, -1, channels)
        for index in range(self.depth):
            block = Block(**self.block, drop_path=self.drop_path[index], name=f"block{index + 1}")
            x = block(x, tuple(grid))
        x = nn.LayerNorm(1e-6, dtype=primitives.dtype, name="norm")(x)
        return x.reshape(batch, *grid, channels)


class PyramidVisionTransformerV2(nn.Module):
    """PVTv2, its attentions and linear layers of any kind, stage by stage.

    Attributes:
      variant: the row of `VARIANTS` it was made from.
      image_size: side in pixels of the images it is meant for; others work too.
      num_classes: number of logits.
      embed_dims: channels of each stage.
      depths: blocks of each stage.
      num_heads: heads of each stage.
      mlp_ratios: hidden width of each stage's MLP over its channels.
      sr_ratios: each stage's spatial reduction, for attention ``"sra"``.
      attention: each stage's kind of attention, see `shiftaddvit_jax.nn.ATTENTION_KINDS`.
      mlp: each stage's kind of linear layer in the MLP: ``"dense"``, ``"shift"`` or ``"moe"``.
      projections: the same for the attention's linear layers.
      dropout: rate in attention and MLP.
      drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
      primitives: how shifts and additions are computed.
    """

    variant: str
    image_size: int
    num_classes: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    sr_ratios: tuple[int, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    projections: tuple[str, ...]
    dropout: float = 0.0
    drop_path: float = 0.0
    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits, in float32.

        With ``train``, dropout and stochastic depth use the random stream ``"dropout"`` and MoE layers
        ``"router"``. Collections: ``"params"``; ``"hash"`` where attention is hashed (see
        `shiftaddvit_jax.nn.attention.HashedAttention`); ``"routing"``, when mutable, receives each MoE
        layer's statistics.

        Raises:
          ValueError: images of another rank, without 3 channels, or too small for the pyramid.
        """
        self._check(images)
        rates = np.split(np.linspace(0, self.drop_path, sum(self.depths)), np.cumsum(self.depths)[:-1])
        x = images.astype(self.primitives.dtype or jnp.float32)
        for stage in range(STAGES):
            block = {
                "num_heads": self.num_heads[stage],
                "attention": self.attention[stage],
                "mlp": self.mlp[stage],
                "projections": self.projections[stage],
                "mlp_ratio": self.mlp_ratios[stage],
                "sr_ratio": self.sr_ratios[stage],
                "depthwise": True,
                "dropout": self.dropout,
                "primitives": self.primitives,
                "train": train,
            }
            x = Stage(
                features=self.embed_dims[stage],
                depth=self.depths[stage],
                patch_size=7 if stage == 0 else 3,
                stride=4 if stage == 0 else 2,
                drop_path=tuple(float(rate) for rate in rates[stage]),
                block=block,
                name=f"stage{stage + 1}",
            )(x)
        x = jnp.mean(x, axis=(1, 2))
        head_init = nn.initializers.truncated_normal(0.02)
        logits = nn.Dense(self.num_classes, dtype=self.primitives.dtype, kernel_init=head_init, name="head")(
            x
        )
        return logits.astype(jnp.float32)

    def _check(self, images):
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be [batch, height, width, 3], got shape {images.shape}")
        side = 4
        for kind, ratio in zip(self.attention, self.sr_ratios, strict=True):
            needed = side * (ratio if kind == "sra" else 1) - side + 1
            if min(images.shape[1:3]) < needed:
                raise ValueError(
                    f"{self.variant} with attention {kind!r} needs images of at least {needed} x {needed} "
                    f"pixels, got {images.shape[1]} x {images.shape[2]}"
                )
            side *= 2


def _variant(embed_dims, depths, num_heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), image_size=224):
    return {
        "embed_dims": embed_dims,
        "depths": depths,
        "num_heads": num_heads,
        "mlp_ratios": mlp_ratios,
        "sr_ratios": (8, 4, 2, 1),
        "image_size": image_size,
    }


# Table 1 of the paper; nano is this project's own, for images of 32 x 32 pixels.
VARIANTS = {
    "pvt_v2_nano": _variant((32, 48, 64, 96), (1, 1, 1, 1), (1, 2, 4, 4), (4, 4, 4, 4), 32),
    "pvt_v2_b0": _variant((32, 64, 160, 256), (2, 2, 2, 2)),
    "pvt_v2_b1": _variant((64, 128, 320, 512), (2, 2, 2, 2)),
    "pvt_v2_b2": _variant((64, 128, 320, 512), (3, 4, 6, 3)),
    "pvt_v2_b3": _variant((64, 128, 320, 512), (3, 4, 18, 3)),
    "pvt_v2_b4": _variant((64, 128, 320, 512), (3, 8, 27, 3)),
    "pvt_v2_b5": _variant((64, 128, 320, 512), (3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}
