import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest

from shiftaddvit_jax.models.pvt_v2 import OverlapPatchEmbed
from shiftaddvit_jax.nn import Primitives
from shiftaddvit_jax.nn.plan import Unnormalized


def variables_and_images(embed, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    shapes = jax.eval_shape(embed.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes), x


def nearest(x, precision):
    return x.astype(ml_dtypes.bfloat16 if precision == "bfloat16" else np.float32).astype(np.float64)


def reference(params, x, patch, stride, eps, precision):
    """Each token's patch, cut out of the padded image, times the kernel; then the LayerNorm, in float64."""
    margin = patch // 2
    padded = np.pad(nearest(x, precision), ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    rows, columns = ((side + 2 * margin - patch) // stride + 1 for side in x.shape[1:3])
    kernel = nearest(params["proj"]["kernel"], precision)
    y = np.empty((len(x), rows, columns, kernel.shape[-1]))
    for row, column in np.ndindex(rows, columns):
        top, left = row * stride, column * stride
        window = padded[:, top : top + patch, left : left + patch]
        y[:, row, column] = np.tensordot(window, kernel, 3) + params["proj"]["bias"]
    return normalized(y, params["norm"], eps)


def normalized(x, params, eps):
    """A LayerNorm in float64."""
    centred = x - x.mean(axis=-1, keepdims=True, dtype=np.float64)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return centred / deviation * params["scale"] + params["bias"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "tvm"])
@pytest.mark.parametrize(
    ("shape", "patch", "stride"),
    [
        ((2, 21, 34, 3), 7, 4),
        ((1, 9, 6, 20), 3, 2),
        ((1, 1, 1, 3), 7, 4),
        ((3, 2, 1, 16), 3, 2),
        ((1, 5, 5, 1), 3, 2),
    ],
)
def test_overlapping_patches_are_their_formula_in_float64(implementation, precision, shape, patch, stride):
    primitives = Primitives(precision=precision, implementation=implementation)
    embed = OverlapPatchEmbed(48, patch, stride, 1e-3, primitives)
    variables, x = variables_and_images(embed, shape)
    y = jax.jit(embed.apply)(variables, x)
    expected = reference(variables["params"], x, patch, stride, 1e-3, precision)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def embed_of_unnormalized(shape):
    """A patch embedding on kernels, its variables, and images whose LayerNorm is left to it."""
    embed = OverlapPatchEmbed(48, 3, 2, 1e-3, Primitives(implementation="tvm"))
    variables, x = variables_and_images(embed, shape)
    rng = np.random.default_rng(1)
    scale, bias = (rng.normal(size=shape[-1]).astype(np.float32) for _ in range(2))
    return embed, variables, Unnormalized(x, scale, bias, 1e-3)


@pytest.mark.parametrize("shape", [(2, 9, 6, 32), (1, 1, 1, 16), (3, 2, 1, 48), (1, 30, 31, 16)])
def test_a_kernel_normalizes_the_pixels_and_not_the_zeros_around(shape):
    embed, variables, given = embed_of_unnormalized(shape)
    y = jax.jit(embed.apply)(variables, given)
    pixels = normalized(given.x, {"scale": given.scale, "bias": given.bias}, 1e-3)
    expected = reference(variables["params"], pixels, 3, 2, 1e-3, "float32")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_layer_norm_left_to_a_kernel_has_the_gradient_of_xlas_modules():
    embed, variables, given = embed_of_unnormalized((2, 9, 6, 32))

    def on_kernels(variables, given):
        return (embed.apply(variables, given) ** 2).sum()

    def on_xla(variables, given):
        x = nn.LayerNorm(1e-3).apply({"params": {"scale": given.scale, "bias": given.bias}}, given.x)
        return (embed.clone(primitives=Primitives(implementation="xla")).apply(variables, x) ** 2).sum()

    gradients, expected = (jax.grad(loss, (0, 1))(variables, given) for loss in (on_kernels, on_xla))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max()),
        gradients,
        expected,
    )
