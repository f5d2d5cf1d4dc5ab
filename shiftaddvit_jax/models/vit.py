"""ViT (Dosovitskiy et al., arXiv 2010.11929) and DeiT (Touvron et al., arXiv 2012.12877)."""

import math
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from shiftaddvit_jax.models.outputs import Outputs
from shiftaddvit_jax.models.preprocessing import Preprocessing
from shiftaddvit_jax.nn import Block, Primitives, make_layer_norm, make_linear, make_patch_conv
from shiftaddvit_jax.nn.plan import in_one_kernel, patch_embedding
from shiftaddvit_jax.nn.position import Interpolation, resize_position_embeddings
from shiftaddvit_jax.validation import check_images

PATCH_SIZE = 16  # of all published variants
# The kinds that the paper gives DeiT, and that of BinaryAttention.
ATTENTION_KINDS = ("msa", "linear", "hamming_linear", "hamming_quadratic", "binary_softmax")


class PatchEmbed(nn.Module):
    """A convolution over patches that do not overlap.

    Attributes:
      features: channels of a token.
      patch_size: side of a patch.
      primitives: how products are computed.
    """

    norm: ClassVar[None] = None  # there is no LayerNorm behind it

    features: int
    patch_size: int
    primitives: Primitives

    def setup(self) -> None:
        """The convolution, whose parameters are the embedding's own."""
        self.proj = make_patch_conv(self.features, self.patch_size, self.primitives)
        nn.share_scope(self, self.proj)

    @in_one_kernel(patch_embedding)
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch rows columns features"]:
        return self.proj(x)


class VisionTransformer(nn.Module):
    """ViT or DeiT: one stage of blocks, with any kind of attention and linear layer.

    Attributes:
      variant: the row of `VARIANTS` that the model was made from.
      image_size: side in pixels of the model's own images; for other sizes, the position embeddings
        and biases are interpolated.
      num_classes: number of logits; 0 for a model without a head, whose result is what the head would get.
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
      patch_size: side of a patch in pixels.
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
    patch_size: int = PATCH_SIZE

    def setup(self) -> None:
        """The layers by their names."""
        init, channels = nn.initializers.truncated_normal(0.02), self.embed_dim
        self.patch_embed = PatchEmbed(channels, self.patch_size, self.primitives)
        self.first = [
            self.param(name, init, (channels,), jnp.float32)
            for name in (("cls_token", "dist_token") if self.distilled else ("cls_token",))
        ]
        tokens = len(self.first) + math.prod(self._trained_grid)
        self.pos_embed = self.param("pos_embed", init, (tokens, channels), jnp.float32)
        # The random stream depends on the name, and runs go on where they were killed.
        self.token_dropout = nn.Dropout(self.dropout, name="Dropout_0")
        self.blocks = [
            Block(
                num_heads=self.num_heads,
                attention=self.attention[0],
                mlp=self.mlp[0],
                projections=self.projections[0],
                dropout=self.dropout,
                drop_path=float(rate),
                layer_norm_eps=self.layer_norm_eps,
                trained_grid=self._trained_grid,
                primitives=self.primitives.inside(name),
                name=name,
            )
            for name, rate in zip(
                [f"block{index + 1}" for index in range(self.depth)],
                np.linspace(0, self.drop_path, self.depth),
                strict=True,
            )
        ]
        self.norm = make_layer_norm(self.layer_norm_eps, self.primitives)
        if self.num_classes:
            self.head = make_linear("dense", self.num_classes, self.primitives)
            if self.distilled:
                self.head_dist = make_linear("dense", self.num_classes, self.primitives)

    def __call__(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> Float[Array, "batch outputs"]:
        """Logits, in float32; without a head, the class token after the last LayerNorm.

        In distilled DeiT both are means: of both heads' logits, or of the class and the distillation token.
        ``train`` and the collections are as in `PyramidVisionTransformerV2`.

        Raises:
          ValueError: images of another rank, that are not floating-point numbers or have not 3 channels, or
            whose sides are not multiples of the patch size.
        """
        x, _ = self._run_blocks(images, train)
        return _mean(self._heads(x))

    def features(
        self, images: Float[Array, "batch height width 3"], train: bool = False
    ) -> tuple[Float[Array, "batch _rows _columns _channels"], ...]:
        """The tokens of the grid after the last LayerNorm, one entry, in the dtype of the computation.

        They are transformers' ``last_hidden_state`` without the class and distillation tokens. ``train``,
        collections and errors are as in ``__call__``.
        """
        return (self._on_grid(*self._run_blocks(images, train)),)

    def outputs(self, images: Float[Array, "batch height width 3"], train: bool = False) -> Outputs:
        """Logits, those of each head, and features; arguments and errors are as in ``__call__``."""
        x, grid = self._run_blocks(images, train)
        heads = self._heads(x)
        return Outputs(_mean(heads), heads, (self._on_grid(x, grid),))

    @property
    def _trained_grid(self):
        return (self.image_size // self.patch_size,) * 2

    @nn.nowrap
    def _heads(self, x):
        """Each head's logits, in float32; without heads, what they would get."""
        y = [x[:, index] for index in range(len(self.first))]
        if self.num_classes:
            heads = (self.head, self.head_dist) if self.distilled else (self.head,)
            y = [head(token) for head, token in zip(heads, y, strict=True)]
        return tuple(logits.astype(jnp.float32) for logits in y)

    @nn.nowrap
    def _on_grid(self, x, grid):
        """The tokens of the grid alone."""
        return x[:, len(self.first) :].reshape(x.shape[0], *grid, self.embed_dim)

    @nn.nowrap
    def _run_blocks(self, images, train):
        """All tokens after the last LayerNorm, those before the grid first, and the grid."""
        check_images(images)
        patch = self.patch_size
        for side in (self.image_size, *images.shape[1:3]):
            if side < patch or side % patch:
                raise ValueError(
                    f"{self.variant} cuts images into patches of {patch} x {patch} pixels: their "
                    f"sides must be multiples of {patch}, got {side}"
                )
        dtype = self.primitives.dtype or jnp.float32
        x = self.patch_embed(images.astype(dtype), train=train)
        batch, *sides, channels = x.shape
        grid = sides[0], sides[1]
        embeddings = resize_position_embeddings(self.pos_embed, self._trained_grid, grid, self.interpolation)
        # Parameters that every image has are summed over images in their gradient, so their dtype comes last.
        first = jnp.stack(self.first)
        first = jnp.broadcast_to(first, (batch, *first.shape)).astype(dtype)
        x = jnp.concatenate([first, x.reshape(batch, math.prod(grid), channels)], axis=1)
        x = self.token_dropout((x + embeddings).astype(dtype), deterministic=not train)
        for block in self.blocks:
            x = block(x, grid, train)
        return self.norm(x), grid


def _mean(heads):
    return heads[0] if len(heads) == 1 else (heads[0] + heads[1]) / 2


# As in timm, whose files these are (`vision_transformer.py`, `_cfg`): crop_pct 0.9, Inception's mean.
AUGREG = Preprocessing(size=224, resize_to=248, mean=(0.5,) * 3, deviation=(0.5,) * 3)
# As DeiT's authors evaluate it (https://github.com/facebookresearch/deit, datasets.py): crop ratio 0.875.
DEIT = Preprocessing(size=224, resize_to=256)


def _variant(embed_dim, num_heads, preprocessing, distilled=False, depth=12, patch_size=PATCH_SIZE):
    return {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "distilled": distilled,
        "attention": ("msa",),
        "patch_size": patch_size,
        "preprocessing": preprocessing,
    }


# Table 1 of the DeiT paper; a ViT of the same size differs only in its training. Nano is this project's own,
# for images of 32 x 32 pixels, all of the centre.
VARIANTS = {
    "deit_nano": _variant(64, 4, Preprocessing(size=32, resize_to=32), depth=6, patch_size=4),
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
