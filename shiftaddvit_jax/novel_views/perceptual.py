"""LPIPS (Zhang et al., arXiv 1801.03924): how different two views look to a network that knows photos."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from shiftaddvit_jax.checkpoints.weights import read_tensors

# AlexNet's convolutions: the weights' place in the authors' module, stride, padding, and whether a maximum
# over 3 x 3 pixels, every second of them, comes first.
CONVOLUTIONS = (
    ("net.slice1.0", 4, 2, False),
    ("net.slice2.3", 1, 2, True),
    ("net.slice3.6", 1, 1, True),
    ("net.slice4.8", 1, 1, False),
    ("net.slice5.10", 1, 1, False),
)
# The mean and the deviation of colours from -1 to 1 that the authors' module has.
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
SMALLEST = 31  # pixels, from which each convolution has one left
EPSILON = 1e-10


class Lpips(NamedTuple):
    """The weights of LPIPS with AlexNet.

    Attributes:
      kernels: of the convolutions, [outputs, inputs, height, width] as in PyTorch.
      biases: their biases.
      channels: how much each convolution's channels count.
    """

    kernels: tuple[Float[np.ndarray, "_ _ _ _"], ...]
    biases: tuple[Float[np.ndarray, "_"], ...]
    channels: tuple[Float[np.ndarray, "_"], ...]

    def __call__(
        self, rendered: Float[np.ndarray, "height width 3"], true: Float[np.ndarray, "height width 3"]
    ) -> float:
        """The distance of two views with colours from 0 to 1: 0 for equal views.

        Raises:
          ValueError: less than 31 pixels high or wide.
        """
        if min(true.shape[:2]) < SMALLEST:
            raise ValueError(f"LPIPS needs views of at least {SMALLEST} pixels a side, got {true.shape[:2]}")
        return float(_distance(self, np.float32(np.stack([rendered, true]))))


def load_lpips(file: str | Path) -> Lpips:
    """The weights in ``file``, which holds what ``lpips.LPIPS(net="alex").state_dict()`` returns.

    Raises:
      ValueError: a file that can't be read, or that lacks one of the weights.
    """
    tensors = read_tensors(Path(file))

    def find(name):
        if name not in tensors:
            raise ValueError(
                f"{file} has no {name}; expected the state_dict of lpips.LPIPS(net='alex'), saved as .pth or "
                ".safetensors"
            )
        return tensors[name]

    return Lpips(
        tuple(find(f"{name}.weight") for name, *_ in CONVOLUTIONS),
        tuple(find(f"{name}.bias") for name, *_ in CONVOLUTIONS),
        tuple(find(f"lin{index}.model.1.weight").reshape(-1) for index in range(len(CONVOLUTIONS))),
    )


@jax.jit
def _distance(weights: Lpips, views: Float[Array, "2 height width 3"]) -> Float[Array, ""]:
    x = (2 * views - 1 - jnp.array(MEAN)) / jnp.array(DEVIATION)
    total = jnp.zeros(())
    layers = zip(CONVOLUTIONS, *weights, strict=True)
    for (_, stride, padding, halves), kernel, bias, channels in layers:
        if halves:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        around = [(padding, padding)] * 2
        x = jax.lax.conv_general_dilated(
            x, jnp.asarray(kernel), (stride, stride), around, dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        x = jax.nn.relu(x + bias)
        unit = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + EPSILON)
        total += jnp.mean(jnp.square(unit[0] - unit[1]) @ channels)
    return total
