"""PVTv2 (Wang et al., arXiv 2106.13797): a pyramid of four stages with overlapping patch embeddings."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from shiftaddvit_jax.models.outputs import Outputs
from shiftaddvit_jax.models.preprocessing import Preprocessing
from shiftaddvit_jax.models.pyramid import SIDES, SR_RATIOS, STAGES, check_size, reductions, stage_arguments
from shiftaddvit_jax.nn import Block, Conv, Primitives, make_layer_norm, make_linear
from shiftaddvit_jax.nn.norm import PATCH_EPSILON
from shiftaddvit_jax.nn.plan import (
    Unnormalized,
    in_one_kernel,
    leave_to_reader,
    mean_head,
    normalized,
    patch_embedding,
)
from shiftaddvit_jax.validation import check_images


class OverlapPatchEmbed(nn.Module):
    """A strided convolution whose patches overlap, then a LayerNorm over channels.

    Attributes:
      features: channels of a token.
      patch_size: side of a patch in pixels, odd.
      stride: distance between neighbouring patches in pixels.
      layer_norm_eps: epsilon of the LayerNorm; by default the original's 1e-5.
      primitives: how products are computed.
    """

    features: int
    patch_size: int
    stride: int
    layer_norm_eps: float | None = None
    primitives: Primitives = Primitives()

    def setup(self) -> None:
        """The layers by their names."""
        self.proj = Conv(
            self.features,
            (self.patch_size,) * 2,
            (self.stride,) * 2,
            [(self.patch_size // 2,) * 2] * 2,
            # He initialisation for the fan-out, as in the original.
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            dtype=self.primitives.dtype,
            conv_general_dilated=self.primitives.conv_general_dilated,
        )
        self.norm = make_layer_norm(self.layer_norm_eps, self.primitives, default=PATCH_EPSILON)

    @in_one_kernel(patch_embedding)
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch rows columns features"]:
        return self.norm(self.proj(x))


class Stage(nn.Module):
    """Patch embedding, blocks and a LayerNorm: one level of the pyramid.

    Attributes:
      features: channels of a token.
      patch_size: side of a patch in the stage's own input.
      stride: distance between neighbouring patches in the stage's own input.
      drop_path: each block's rate of stochastic depth.
      block: the blocks' other arguments.
    """

    features: int
    patch_size: int
    stride: int
    drop_path: tuple[float, ...]
    block: dict

    @property
    def primitives(self) -> Primitives:
        """The primitives of the blocks."""
        return self.block["primitives"]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"] | Unnormalized, train: bool = False
    ) -> Float[Array, "batch rows columns features"] | Unnormalized:
        """The stage's tokens on their grid; on kernels, their LayerNorm is left to the reader."""
        epsilon = self.block["layer_norm_eps"]
        tokens = OverlapPatchEmbed(
            self.features, self.patch_size, self.stride, epsilon, self.primitives, name="patch_embed"
        )(x, train=train)
        batch, rows, columns, channels = tokens.shape
        tokens = tokens.reshape(batch, rows * columns, channels)
        for index, rate in enumerate(self.drop_path):
            name = f"block{index + 1}"
            block: dict[str, Any] = {**self.block, "primitives": self.primitives.inside(name)}
            tokens = Block(**block, drop_path=rate, name=name)(tokens, (rows, columns), train)
        norm = make_layer_norm(epsilon, self.primitives, name="norm")
        return leave_to_reader(self, norm, tokens.reshape(batch, rows, columns, channels), train)


class MeanHead(nn.Module):
    """A dense layer applied to the mean of an image's tokens.

    Attributes:
      features: number of logits.
      primitives: how products are computed.
    """

    features: int
    primitives: Primitives = Primitives()

    def setup(self) -> None:
        """The layer, whose parameters are the head's own."""
        self.dense = make_linear("dense", self.features, self.primitives)
        nn.share_scope(self, self.dense)

    @in_one_kernel(mean_head)
    def __call__(
        self, x: Float[Array, "batch rows columns channels"], train: bool = False
    ) -> Float[Array, "batch features"]:
        return self.dense(jnp.mean(x, axis=(1, 2)))


class PyramidVisionTransformerV2(nn.Module):
    """PVTv2, with any kind of attention and linear layer in each stage.

    Attributes:
      variant: the row of `VARIANTS` that the model was made from.
      image_size: side in pixels of the model's own images; other sizes work too.
      num_classes: number of logits; 0 for a model without a head, whose result is what the head would get.
      embed_dims: channels of each stage.
      depths: blocks of each stage.
      num_heads: heads of each stage.
      mlp_ratios: hidden width of each stage's MLP over its channels.
      mlp_relu: whether the MLPs have a ReLU before the depthwise convolution (b2_li).
      sr_ratios: each stage's spatial reduction, for attention ``"sra"``.
      attention: each stage's kind of attention, see `shiftaddvit_jax.nn.ATTENTION_KINDS`.
      mlp: each stage's kind of linear layer in the MLP: ``"dense"``, ``"shift"`` or ``"moe"``.
      projections: the same for the attention's linear layers.
      dropout: rate in attention and MLP.
      drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
      layer_norm_eps: epsilon of every LayerNorm; by default the original's: 1e-6, and 1e-5 in patch
        embeddings and spatial reductions.
      primitives: how shifts and additions are computed.
    """

    variant: str
    image_size: int
    num_classes: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    mlp_relu: bool
    sr_ratios: tuple[int, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    projections: tuple[str, ...]
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_norm_eps: float | None = None
    primitives: Primitives = Primitives()

    def setup(self) -> None:
        """The layers by their names."""
        sides = [-(-self.image_size // side) for side in SIDES]
        self.stages = [
            Stage(
                patch_size=7 if stage == 0 else 3,
                stride=4 if stage == 0 else 2,
                name=f"stage{stage + 1}",
                **arguments,
            )
            for stage, arguments in enumerate(
                stage_arguments(self, sides, depthwise=True, relu=self.mlp_relu)
            )
        ]
        if self.num_classes:
            self.head = MeanHead(self.num_classes, self.primitives)

    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, "batch outputs"]:
        """Logits, in float32; without a head, the mean of the last stage's tokens.

        With ``train``, dropout and stochastic depth use the random stream ``"dropout"`` and MoE layers
        ``"router"``. Given a stream ``"rounding"``, shift layers round at random, see `ShiftDense`.
        Collections: ``"params"``; ``"hash"`` where attention is hashed (see
        `shiftaddvit_jax.nn.attention.HashedAttention`); ``"routing"``, when mutable, receives each MoE
        layer's statistics.

        Raises:
          ValueError: images of another rank, that are not floating-point numbers or have not 3 channels, or
            too small for the pyramid.
        """
        return self._classify(self._run_stages(images, train)[-1], train)

    def features(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> tuple[Float[Array, "batch _rows _columns _channels"], ...]:
        """Each stage's tokens after the stage's LayerNorm, in the dtype of the computation.

        They are what transformers' ``PvtV2Backbone`` and the authors' detectors take. The grids have a token
        for 4, 8, 16 and 32 pixels, rounded up. ``train``, collections and errors are as in ``__call__``.
        """
        return tuple(normalized(x) for x in self._run_stages(images, train))

    def outputs(self, images: Float[Array, "batch height width 3"], train: bool = False) -> Outputs:
        """Logits, those of the one head, and features; arguments and errors are as in ``__call__``."""
        stages = self._run_stages(images, train)
        logits = self._classify(stages[-1], train)
        return Outputs(logits, (logits,), tuple(normalized(x) for x in stages))

    @nn.nowrap
    def _classify(self, x, train):
        y = self.head(x, train=train) if self.num_classes else jnp.mean(normalized(x), axis=(1, 2))
        return y.astype(jnp.float32)

    @nn.nowrap
    def _run_stages(self, images, train):
        """Each stage's tokens; on kernels, their LayerNorm is left to the reader."""
        check_images(images)
        # Padding rounds the sides of every grid up; a reduction needs one whole window.
        smallest = tuple(side * (ratio - 1) + 1 for side, ratio in zip(SIDES, reductions(self), strict=True))
        check_size(self, images.shape, smallest)
        outputs = [images.astype(self.primitives.dtype or jnp.float32)]
        for stage in self.stages:
            outputs.append(stage(outputs[-1], train))
        return outputs[1:]


# As the authors evaluate it (https://github.com/whai362/PVT, datasets.py): resized by 256 / 224, bicubic.
PREPROCESSING = Preprocessing(size=224, resize_to=256)


def _variant(
    embed_dims,
    depths,
    num_heads=(1, 2, 5, 8),
    mlp_ratios=(8, 8, 4, 4),
    preprocessing=PREPROCESSING,
    linear=False,
):
    return {
        "embed_dims": embed_dims,
        "depths": depths,
        "num_heads": num_heads,
        "mlp_ratios": mlp_ratios,
        "mlp_relu": linear,
        "sr_ratios": SR_RATIOS,
        "attention": ("linear_sra" if linear else "sra",) * STAGES,
        "preprocessing": preprocessing,
    }


# Table 1 of the paper; nano is this project's own, for images of 32 x 32 pixels, all of the centre.
VARIANTS = {
    "pvt_v2_nano": _variant(
        (32, 48, 64, 96),
        (1, 1, 1, 1),
        (1, 2, 4, 4),
        (4, 4, 4, 4),
        Preprocessing(size=32, resize_to=32),
    ),
    "pvt_v2_b0": _variant((32, 64, 160, 256), (2, 2, 2, 2)),
    "pvt_v2_b1": _variant((64, 128, 320, 512), (2, 2, 2, 2)),
    "pvt_v2_b2": _variant((64, 128, 320, 512), (3, 4, 6, 3)),
    "pvt_v2_b2_li": _variant((64, 128, 320, 512), (3, 4, 6, 3), linear=True),
    "pvt_v2_b3": _variant((64, 128, 320, 512), (3, 4, 18, 3)),
    "pvt_v2_b4": _variant((64, 128, 320, 512), (3, 8, 27, 3)),
    "pvt_v2_b5": _variant((64, 128, 320, 512), (3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}
