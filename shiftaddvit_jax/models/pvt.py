"""PVT (Wang et al., arXiv 2102.12122): four stages with position embeddings and a class token."""

import math
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from shiftaddvit_jax.models.outputs import Outputs
from shiftaddvit_jax.models.preprocessing import Preprocessing
from shiftaddvit_jax.models.pyramid import SIDES, SR_RATIOS, STAGES, check_size, reductions, stage_arguments
from shiftaddvit_jax.nn import Block, Primitives, make_layer_norm, make_linear, make_patch_conv
from shiftaddvit_jax.nn.norm import PATCH_EPSILON
from shiftaddvit_jax.nn.plan import in_one_kernel, patch_embedding
from shiftaddvit_jax.nn.position import Interpolation, resize_position_embeddings
from shiftaddvit_jax.validation import check_images


class Stage(nn.Module):
    """Patches that do not overlap, position embeddings, blocks: one level of the pyramid.

    Attributes:
      features: channels of a token.
      patch_size: side of a patch in the stage's own input.
      interpolation: how the position embeddings are interpolated to another grid.
      class_token: whether a class token comes before the grid.
      drop_path: each block's rate of stochastic depth.
      block: the blocks' other arguments.
    """

    features: int
    patch_size: int
    interpolation: Interpolation
    class_token: bool
    drop_path: tuple[float, ...]
    block: dict

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> tuple[Float[Array, "batch tokens features"], tuple[int, int]]:
        """The stage's tokens, and their grid."""
        primitives = self.block["primitives"]
        dtype = primitives.dtype or x.dtype
        x = PatchEmbed(
            self.features, self.patch_size, self.block["layer_norm_eps"], primitives, name="patch_embed"
        )(x, train=train)
        batch, *sides, channels = x.shape
        grid = sides[0], sides[1]
        x = x.reshape(batch, math.prod(grid), channels)
        init = nn.initializers.truncated_normal(0.02)
        if self.class_token:
            # What every image has is summed over images in its gradient, so its dtype comes last.
            token = self.param("cls_token", init, (channels,), jnp.float32)
            token = jnp.broadcast_to(token, (batch, 1, channels)).astype(dtype)
            x = jnp.concatenate([token, x], axis=1)
        trained_grid = self.block["trained_grid"]
        shape = (self.class_token + math.prod(trained_grid), channels)
        embeddings = self.param("pos_embed", init, shape, jnp.float32)
        embeddings = resize_position_embeddings(embeddings, trained_grid, grid, self.interpolation)
        x = nn.Dropout(self.block["dropout"], deterministic=not train)((x + embeddings).astype(dtype))
        for index, rate in enumerate(self.drop_path):
            name = f"block{index + 1}"
            block = {**self.block, "primitives": primitives.inside(name)}
            x = Block(**block, drop_path=rate, name=name)(x, grid, train)
        return x, grid


class PatchEmbed(nn.Module):
    """A convolution over patches that do not overlap, then a LayerNorm over channels.

    Attributes:
      features: channels of a token.
      patch_size: side of a patch.
      layer_norm_eps: epsilon of the LayerNorm; by default the original's 1e-5.
      primitives: how products are computed.
    """

    features: int
    patch_size: int
    layer_norm_eps: float | None
    primitives: Primitives

    def setup(self) -> None:
        """The layers by their names."""
        self.proj = make_patch_conv(self.features, self.patch_size, self.primitives)
        self.norm = make_layer_norm(self.layer_norm_eps, self.primitives, default=PATCH_EPSILON)

    @in_one_kernel(patch_embedding)
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch rows columns features"]:
        return self.norm(self.proj(x))


class PyramidVisionTransformer(nn.Module):
    """PVT, with any kind of attention and linear layer in each stage.

    Attributes:
      variant: the row of `VARIANTS` that the model was made from.
      image_size: side in pixels of the model's own images; for other sizes, the position embeddings are
        interpolated.
      num_classes: number of logits; 0 for a model without a head, whose result is what the head would get.
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
      layer_norm_eps: epsilon of every LayerNorm; by default the original's: 1e-6, and 1e-5 in patch
        embeddings and spatial reductions.
      primitives: how shifts and additions are computed.
    """

    interpolation: ClassVar[Interpolation] = "bilinear"

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
    layer_norm_eps: float | None = None
    primitives: Primitives = Primitives()

    def setup(self) -> None:
        """The layers by their names."""
        sides = [self.image_size // side for side in SIDES]
        self.stages = [
            Stage(
                patch_size=4 if stage == 0 else 2,
                interpolation=self.interpolation,
                class_token=stage == STAGES - 1,
                name=f"stage{stage + 1}",
                **arguments,
            )
            for stage, arguments in enumerate(stage_arguments(self, sides))
        ]
        self.norm = make_layer_norm(self.layer_norm_eps, self.primitives)
        if self.num_classes:
            self.head = make_linear("dense", self.num_classes, self.primitives)

    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, "batch outputs"]:
        """Logits, in float32; without a head, the class token after the model's LayerNorm.

        ``train`` and the collections are as in `PyramidVisionTransformerV2`.

        Raises:
          ValueError: images of another rank, that are not floating-point numbers or have not 3 channels, or
            too small for the pyramid.
        """
        tokens, _ = self._run_stages(images, train)[-1]
        return self._classify(self.norm(tokens[:, 0]))

    def features(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> tuple[Float[Array, "batch _rows _columns _channels"], ...]:
        """Each stage's tokens, in the dtype of the computation.

        As in transformers' ``PvtModel``, the first three stages' are as the last block leaves them, and the
        last stage's are those after the model's LayerNorm, without the class token, to which they attend.
        The authors' detectors have neither that LayerNorm nor a class token. The grids have a token for 4, 8,
        16 and 32 pixels, rounded down. ``train``, collections and errors are as in ``__call__``.
        """
        return self._normalized_stages(images, train)[1]

    def outputs(self, images: Float[Array, "batch height width 3"], train: bool = False) -> Outputs:
        """Logits, those of the one head, and features; arguments and errors are as in ``__call__``."""
        token, features = self._normalized_stages(images, train)
        logits = self._classify(token)
        return Outputs(logits, (logits,), features)

    @nn.nowrap
    def _classify(self, y):
        y = self.head(y) if self.num_classes else y
        return y.astype(jnp.float32)

    @nn.nowrap
    def _normalized_stages(self, images, train):
        """The class token after the model's LayerNorm, and each stage's tokens on their grid."""
        stages = self._run_stages(images, train)
        tokens, grid = stages[-1]
        tokens = self.norm(tokens)
        stages[-1] = tokens[:, 1:], grid
        return tokens[:, 0], tuple(x.reshape(x.shape[0], *grid, x.shape[-1]) for x, grid in stages)

    @nn.nowrap
    def _run_stages(self, images, train):
        """Each stage's tokens, the class token first in the last one, and their grid."""
        check_images(images)
        smallest = tuple(side * ratio for side, ratio in zip(SIDES, reductions(self), strict=True))
        for shape in (images.shape, (1, self.image_size, self.image_size, 3)):
            check_size(self, shape, smallest)
        x, outputs = images.astype(self.primitives.dtype or jnp.float32), []
        for stage in self.stages:
            tokens, grid = stage(x, train)
            outputs.append((tokens, grid))
            if not stage.class_token:
                x = tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])
        return outputs


# As the authors evaluate it (https://github.com/whai362/PVT, datasets.py): resized by 256 / 224, bicubic.
PREPROCESSING = Preprocessing(size=224, resize_to=256)


def _variant(depths):
    return {
        "embed_dims": (64, 128, 320, 512),
        "depths": depths,
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": (8, 8, 4, 4),
        "sr_ratios": SR_RATIOS,
        "attention": ("sra",) * STAGES,
        "preprocessing": PREPROCESSING,
    }


# Table 1 of the paper.
VARIANTS = {
    "pvt_tiny": _variant((2, 2, 2, 2)),
    "pvt_small": _variant((3, 4, 6, 3)),
    "pvt_medium": _variant((3, 4, 18, 3)),
    "pvt_large": _variant((3, 8, 27, 3)),
}
