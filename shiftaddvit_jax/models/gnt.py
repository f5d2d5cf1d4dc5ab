"""GNT (Varma et al., arXiv 2207.13298): novel views of a scene from photographs, by two transformers."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shiftaddvit_jax.models.resunet import ResUNet
from shiftaddvit_jax.nn import Primitives, make_layer_norm, make_linear
from shiftaddvit_jax.nn.mlp import ReluMlp
from shiftaddvit_jax.nn.norm import PATCH_EPSILON
from shiftaddvit_jax.nn.view_attention import ViewRayBlock
from shiftaddvit_jax.ops.cameras import Rays, Views, direction_differences, inside, project
from shiftaddvit_jax.ops.grid_sample import grid_sample

# The kinds of attention along a ray: those of a sequence of tokens without a class token.
ATTENTION_KINDS = ("msa", "linear", "hamming_linear", "hamming_quadratic", "binary_softmax")
# Kernels as small as ViT's would take thousands of steps to grow.
KERNEL_INIT = nn.initializers.lecun_uniform()
OCTAVES = 10  # of the encodings of positions and directions


class Samples(NamedTuple):
    """What photographs show of the points of rays.

    Attributes:
      tokens: a point's colour and features in each view.
      differences: between the directions of ray and view, see `direction_differences`.
      visible: whether the view shows the point.
      encodings: of the points' positions and of the rays' directions.
    """

    tokens: Float[Array, "rays points views _inputs"]
    differences: Float[Array, "rays points views 4"]
    visible: Bool[Array, "rays points views"]
    encodings: Float[Array, "rays points _encodings"]


class GeneralizableNerfTransformer(nn.Module):
    """GNT: what a camera sees along its rays, from photographs that other cameras took.

    A point of a ray is projected into every photograph; the colours and features found there are its tokens.
    In turn, a view transformer sums each point's tokens over the views, and a ray transformer lets the points
    of a ray attend to each other. A linear layer makes a ray's colour of the mean over its points.

    Attributes:
      variant: the row of `VARIANTS` that the model was made from.
      channels: of the transformers.
      depth: number of view transformers, and of ray transformers.
      num_heads: heads of the ray transformers.
      points: depths of a ray in training.
      views: photographs that a ray is rendered from in training.
      feature_widths: channels of `ResUNet`'s stages.
      feature_depths: residual blocks of `ResUNet`'s stages.
      features: channels of a photograph's features.
      attention: kind of the ray transformers' attention, one entry.
      mlp: kind of linear layer in the MLPs, one entry.
      projections: the same for the attentions' other linear layers.
      dropout: rate in attentions and MLPs.
      layer_norm_eps: epsilon of every LayerNorm; by default the original's 1e-6, and 1e-5 in the last.
      primitives: how shifts and additions are computed.
    """

    variant: str
    channels: int
    depth: int
    num_heads: int
    points: int
    views: int
    feature_widths: tuple[int, int, int]
    feature_depths: tuple[int, int, int]
    features: int
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    projections: tuple[str, ...]
    dropout: float = 0.0
    layer_norm_eps: float | None = None
    primitives: Primitives = Primitives()

    outputs: ClassVar[int] = 3  # red, green, blue

    def setup(self) -> None:
        """The layers by their names."""
        primitives = dataclasses.replace(self.primitives, kernel_init=KERNEL_INIT)
        self.image_features = ResUNet(
            self.feature_widths, self.feature_depths, self.features, self.primitives.dtype
        )
        inside = primitives.inside("embed")
        self.embed = ReluMlp(self.channels, self.channels, self.mlp[0], primitives=inside)
        self.blocks = [
            ViewRayBlock(
                self.num_heads,
                self.attention[0],
                self.mlp[0],
                self.projections[0],
                mixes=index % 2 == 1,
                dropout=self.dropout,
                layer_norm_eps=self.layer_norm_eps,
                primitives=primitives.inside(f"block{index}"),
                name=f"block{index}",
            )
            for index in range(1, self.depth + 1)
        ]
        self.norm = make_layer_norm(self.layer_norm_eps, primitives, default=PATCH_EPSILON)
        self.head = make_linear("dense", self.outputs, primitives)

    def __call__(
        self,
        rays: Rays,
        views: Views,
        image_features: Float[Array, "views _rows _columns features"] | None = None,
        train: bool = False,
    ) -> Float[Array, "rays 3"]:
        """Red, green and blue of each ray, in float32, about 0 to 1.

        Args:
          rays: where a camera looks, and the depths of points on its rays.
          views: the photographs.
          image_features: the photographs' features, where `encode` has made them already.
          train: whether there is dropout and routers' noise.
        """
        return self.render(self.look_up(rays, views, image_features), train)

    def look_up(
        self,
        rays: Rays,
        views: Views,
        image_features: Float[Array, "views _rows _columns features"] | None = None,
    ) -> Samples:
        """What the photographs show of each ray's points; arguments as in a call."""
        if image_features is None or self.is_initializing():
            made = self.encode(views.images)
            image_features = made if image_features is None else image_features
        tokens, differences, visible = self._look_up(rays, views, image_features)
        points = encode_positions(rays.points)
        directions = rays.directions / jnp.linalg.norm(rays.directions, axis=-1, keepdims=True)
        directions = jnp.broadcast_to(encode_positions(directions)[:, None], points.shape)
        encodings = jnp.concatenate([points, directions], axis=-1).astype(tokens.dtype)
        return Samples(tokens, differences, visible, encodings)

    def render(self, samples: Samples, train: bool = False) -> Float[Array, "rays 3"]:
        """The colours of rays that `look_up` sampled; each ray's depends on its own samples alone."""
        tokens = self.embed(samples.tokens, train)
        x = jnp.max(tokens, axis=2)
        for block in self.blocks:
            x = block(x, tokens, samples.differences, samples.visible, samples.encodings, train)
        return self.head(jnp.mean(self.norm(x), axis=1)).astype(jnp.float32)

    def encode(
        self, images: Float[Array, "views height width 3"]
    ) -> Float[Array, "views _rows _columns _features"]:
        """The photographs' features, at a quarter of their resolution."""
        return self.image_features(images.astype(self.primitives.dtype or jnp.float32))

    @nn.nowrap
    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """The shapes and dtypes of the arguments of a call for ``batch`` rays, features made before."""
        side, views = 32, self.views

        def make():
            rays = Rays(jnp.zeros((batch, 3)), jnp.zeros((batch, 3)), jnp.zeros((batch, self.points)))
            images = jnp.zeros((views, side, side, 3))
            cameras = jnp.zeros((views, 3, 3)), jnp.zeros((views, 4, 4))
            return rays, Views(images, *cameras), jnp.zeros((views, side // 4, side // 4, self.features))

        return jax.eval_shape(make)

    @nn.nowrap
    def _look_up(self, rays, views, image_features):
        """Each point's colour and features in each view, difference of directions, and whether it is seen."""
        height, width = views.images.shape[1:3]
        points = rays.points
        flat = points.reshape(-1, 3)
        pixels, depths = jax.vmap(project, (None, 0, 0))(flat, views.intrinsics, views.poses)
        visible = inside(pixels, height, width) & (depths > 0)
        # Features lie on a coarser grid with the same corners.
        size = jnp.array([width - 1, height - 1])
        coarse = jnp.array([image_features.shape[2] - 1, image_features.shape[1] - 1])
        found = [
            grid_sample(views.images.astype(image_features.dtype), pixels),
            grid_sample(image_features, pixels * (coarse / size)),
        ]
        tokens = jnp.moveaxis(jnp.concatenate(found, axis=-1), 0, 1)
        differences = direction_differences(points, rays.origins, views.poses[:, :3, 3])
        each = (*points.shape[:2], len(views.images))
        return (
            tokens.reshape(*each, tokens.shape[-1]),
            differences.astype(tokens.dtype),
            jnp.moveaxis(visible, 0, 1).reshape(each),
        )


def encode_positions(x: Float[Array, "*batch channels"]) -> Float[Array, "*batch _encoded"]:
    """``x``, and sines and cosines of x, 2 x, 4 x, ..., 512 x, one octave after the other."""
    parts = [x]
    for octave in range(OCTAVES):
        parts += [jnp.sin(2**octave * x), jnp.cos(2**octave * x)]
    return jnp.concatenate(parts, axis=-1)


def _variant(depth, channels=64, points=64, views=10, widths=(64, 128, 256), depths=(3, 4, 6), features=32):
    return {
        "channels": channels,
        "depth": depth,
        "num_heads": 4,
        "points": points,
        "views": views,
        "feature_widths": widths,
        "feature_depths": depths,
        "features": features,
        "attention": ("msa",),
    }


# GNT's own, for many scenes and for a single one (`trans_depth` in its configs); nano is this project's own.
VARIANTS = {
    "gnt": _variant(8),
    "gnt_single": _variant(4),
    "gnt_nano": _variant(
        2, channels=32, points=24, views=4, widths=(16, 16, 16), depths=(1, 1, 1), features=8
    ),
}
