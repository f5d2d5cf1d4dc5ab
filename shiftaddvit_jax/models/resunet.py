"""GNT's image features: the first stages of a ResNet-34 with instance norm, and two up-convolutions.

It is the encoder of IBRNet (Wang et al., arXiv 2102.13090), as GNT (arXiv 2207.13298) uses it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SMALLEST = 17  # pixels of a side

Image = Float[Array, "batch _height _width _channels"]


class Convolution(nn.Module):
    """A convolution with reflected borders.

    Attributes:
      features: channels of the result.
      side: of the kernel, odd.
      stride: distance of two windows.
      use_bias: whether there is a bias.
      dtype: dtype of the computation.
    """

    features: int
    side: int
    stride: int = 1
    use_bias: bool = False
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Image) -> Image:
        border = self.side // 2
        x = jnp.pad(x, ((0, 0), (border, border), (border, border), (0, 0)), mode="reflect")
        return nn.Conv(
            self.features,
            (self.side, self.side),
            self.stride,
            "VALID",
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name="conv",
        )(x)


class InstanceNorm(nn.Module):
    """Each channel of each image less its mean, over its deviation, times a scale, plus a bias."""

    @nn.compact
    def __call__(self, x: Image) -> Image:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        whole = x.astype(jnp.float32)
        mean = jnp.mean(whole, axis=(1, 2), keepdims=True)
        variance = jnp.mean(jnp.square(whole - mean), axis=(1, 2), keepdims=True)
        return ((whole - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


class ResidualBlock(nn.Module):
    """Two convolutions beside the input, or beside a strided convolution of it.

    Attributes:
      features: channels of the result.
      stride: of the first convolution.
      dtype: dtype of the computation.
    """

    features: int
    stride: int = 1
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Image) -> Image:
        y = Convolution(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(x)
        y = jax.nn.relu(InstanceNorm(name="norm1")(y))
        y = Convolution(self.features, 3, dtype=self.dtype, name="conv2")(y)
        y = InstanceNorm(name="norm2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = Convolution(self.features, 1, self.stride, dtype=self.dtype, name="shortcut")(x)
            x = InstanceNorm(name="shortcut_norm")(x)
        return jax.nn.relu(x + y)


class NormedConvolution(nn.Module):
    """A convolution, instance norm and ELU.

    Attributes:
      features: channels of the result.
      dtype: dtype of the computation.
    """

    features: int
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Image) -> Image:
        x = Convolution(self.features, 3, use_bias=True, dtype=self.dtype, name="conv")(x)
        return jax.nn.elu(InstanceNorm(name="norm")(x))


class ResUNet(nn.Module):
    """Features of images at a quarter of their resolution.

    Attributes:
      widths: channels of the three stages; GNT's are 64, 128 and 256.
      depths: residual blocks of the stages; GNT's are 3, 4 and 6.
      features: channels of the result; GNT's are 32.
      dtype: dtype of the computation.
    """

    widths: tuple[int, int, int]
    depths: tuple[int, int, int]
    features: int
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch _height _width features"]:
        """Features, in the dtype of the computation.

        They have a quarter of the images' sides where 16 divides these, and up to 3 points more elsewhere.

        Raises:
          ValueError: sides of less than 17 pixels, which leave nothing to reflect.
        """
        if min(images.shape[1:3]) < SMALLEST:
            height, width = images.shape[1:3]
            raise ValueError(
                f"photographs must be at least {SMALLEST} pixels high and wide, got {width} x {height}"
            )
        x = Convolution(self.widths[0], 7, 2, dtype=self.dtype, name="conv1")(images)
        x = jax.nn.relu(InstanceNorm(name="norm1")(x))
        stages = []
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True), 1):
            for block in range(1, depth + 1):
                name = f"layer{stage}_{block}"
                x = ResidualBlock(width, 2 if block == 1 else 1, dtype=self.dtype, name=name)(x)
            stages.append(x)
        for level, result in ((3, self.widths[1]), (2, self.features)):
            beside = stages[level - 2]
            x = NormedConvolution(beside.shape[-1], self.dtype, name=f"upconv{level}")(_twice_as_large(x))
            x = jnp.concatenate([x, _padded(beside, *x.shape[1:3])], axis=-1)
            x = NormedConvolution(result, self.dtype, name=f"iconv{level}")(x)
        return nn.Conv(self.features, (1, 1), dtype=self.dtype, name="out")(x)


def _twice_as_large(x):
    """Bilinear, with the first and last pixels where they were."""
    rows, columns = (_interpolation(side, 2 * side).astype(x.dtype) for side in x.shape[1:3])
    return jnp.einsum("rh,bhwc,sw->brsc", rows, x, columns)


def _interpolation(old: int, new: int) -> np.ndarray:
    """[new, old]: row i interpolates at i (old - 1) / (new - 1)."""
    at = np.arange(new) * (old - 1) / (new - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))


def _padded(x, height, width):
    """``x`` with rows and columns of zeros around it, the odd one at the end."""
    down, right = height - x.shape[1], width - x.shape[2]
    return jnp.pad(x, ((0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0)))
