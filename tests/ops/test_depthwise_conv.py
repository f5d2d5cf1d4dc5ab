import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate
from scipy.special import erf

from shiftaddvit_jax.ops import depthwise_conv_1d, depthwise_conv_2d, depthwise_conv_gelu

LEADING = pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
GRIDS = [((1, 1), (3, 3)), ((5, 7), (3, 3)), ((2, 3), (5, 5)), ((6, 1), (1, 3))]
LENGTHS = [(1, 3), (7, 3), (4, 9), (5, 1)]
CHANNELS = 3


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(x, kernel):
    """SciPy's correlation, an image and a channel at a time."""
    spatial = x.shape[-kernel.ndim : -1]
    y = np.empty(x.shape)
    for image in np.ndindex(x.shape[: -kernel.ndim]):
        for c in range(x.shape[-1]):
            y[(*image, ..., c)] = correlate(x[(*image, ..., c)], kernel[..., c], np.float64, mode="constant")
    assert spatial == y.shape[-kernel.ndim : -1]
    return y


@LEADING
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_2d_is_scipys_zero_padded_correlation(implementation, leading, grid, size):
    x, kernel = random(*leading, *grid, CHANNELS), random(*size, CHANNELS, seed=1)
    y = depthwise_conv_2d(x, kernel, implementation)
    np.testing.assert_allclose(y, reference(x, kernel), rtol=1e-5, atol=1e-5)


@LEADING
@pytest.mark.parametrize(("tokens", "size"), LENGTHS)
def test_1d_is_scipys_zero_padded_correlation(implementation, leading, tokens, size):
    x, kernel = random(*leading, tokens, CHANNELS), random(size, CHANNELS, seed=1)
    y = depthwise_conv_1d(x, kernel, implementation)
    np.testing.assert_allclose(y, reference(x, kernel), rtol=1e-5, atol=1e-5)


@LEADING
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_a_bias_and_a_gelu_follow(implementation, leading, grid, size):
    x, kernel = random(*leading, *grid, CHANNELS), random(*size, CHANNELS, seed=1)
    bias = random(CHANNELS, seed=2)
    y = depthwise_conv_gelu(x, kernel, bias, implementation)
    total = reference(x, kernel) + bias
    np.testing.assert_allclose(y, total * (1 + erf(total / np.sqrt(2))) / 2, rtol=1e-5, atol=1e-5)


def test_bfloat16_images_stay_bfloat16(xla_implementation):
    x = jnp.asarray(random(2, 5, 7, CHANNELS), jnp.bfloat16)
    kernel = jnp.asarray(random(3, 3, CHANNELS, seed=1), jnp.bfloat16)
    y = depthwise_conv_2d(x, kernel, xla_implementation)
    assert y.dtype == jnp.bfloat16
    exact = reference(np.asarray(x, np.float32), np.asarray(kernel, np.float32))
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-6, atol=2**-4)


def xla_grouped_convolution(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None, :],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def gradients(function, x, kernel, cotangent):
    return jax.jit(lambda *inputs: jax.vjp(function, *inputs)[1](jnp.asarray(cotangent)))(x, kernel)


@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_2d_gradients_are_those_of_xlas_grouped_convolution(implementation, grid, size):
    x, kernel = random(2, *grid, CHANNELS), random(*size, CHANNELS, seed=1)
    cotangent = random(*x.shape, seed=2)
    ours = gradients(lambda *inputs: depthwise_conv_2d(*inputs, implementation), x, kernel, cotangent)
    for actual, expected in zip(ours, gradients(xla_grouped_convolution, x, kernel, cotangent), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@LEADING
def test_1d_gradients_are_those_of_xlas_grouped_convolution(implementation, leading):
    x, kernel = random(*leading, 7, CHANNELS), random(5, CHANNELS, seed=1)
    cotangent = random(*x.shape, seed=2)

    def grouped(x, kernel):
        images = x.reshape(-1, 1, *x.shape[-2:])
        return xla_grouped_convolution(images, kernel[None]).reshape(x.shape)

    ours = gradients(lambda *inputs: depthwise_conv_1d(*inputs, implementation), x, kernel, cotangent)
    for actual, expected in zip(ours, gradients(grouped, x, kernel, cotangent), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_forward_mode_is_that_of_xlas_grouped_convolution(implementation):
    inputs = random(2, 5, 7, CHANNELS), random(3, 5, CHANNELS, seed=1)
    tangents = random(3, 2, 5, 7, CHANNELS, seed=2), random(3, 3, 5, CHANNELS, seed=3)

    def forward_mode(function):
        return jax.jit(jax.vmap(lambda *tangents: jax.jvp(function, inputs, tangents)))(*tangents)

    ours = forward_mode(lambda *inputs: depthwise_conv_2d(*inputs, implementation))
    for actual, expected in zip(ours, forward_mode(xla_grouped_convolution), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradients_have_the_dtypes_of_what_they_are_of(xla_implementation):
    x, kernel = jnp.asarray(random(2, 5, 7, CHANNELS), jnp.bfloat16), random(3, 3, CHANNELS, seed=1)
    loss = lambda x, kernel: jnp.sum(depthwise_conv_2d(x, kernel, xla_implementation))  # noqa: E731
    grad_x, grad_kernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)
    assert grad_x.dtype == jnp.bfloat16
    assert grad_kernel.dtype == jnp.float32


def test_vmap_is_a_leading_axis(implementation):
    x, kernel = random(3, 5, 7, CHANNELS), random(3, 3, CHANNELS, seed=1)
    mapped = jax.vmap(lambda image: depthwise_conv_2d(image, kernel, implementation))(x)
    np.testing.assert_allclose(mapped, reference(x, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(2, 3), (3, 4)])
def test_a_kernel_of_even_size_is_an_error(size):
    with pytest.raises(ValueError, match="depthwise_conv_2d needs a kernel of odd size"):
        depthwise_conv_2d(jnp.ones((5, 5, 2)), jnp.ones((*size, 2)))
    with pytest.raises(ValueError, match="depthwise_conv_1d needs a kernel of odd size"):
        depthwise_conv_1d(jnp.ones((5, 2)), jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("x", "kernel"),
    [((5, 5, 2), (3, 3, 3)), ((5, 2), (3, 3, 2)), ((5, 5, 2), (3, 2)), ((5, 5, 2), (3, 3, 1, 2))],
)
def test_2d_shapes_that_do_not_fit_are_named(x, kernel):
    with pytest.raises(ValueError, match="depthwise_conv_2d expects") as error:
        depthwise_conv_2d(jnp.ones(x), jnp.ones(kernel))
    assert str(x) in str(error.value)
    assert str(kernel) in str(error.value)


@pytest.mark.parametrize(("x", "kernel"), [((5, 2), (3, 3)), ((2,), (3, 2)), ((5, 2), (3, 1, 2))])
def test_1d_shapes_that_do_not_fit_are_named(x, kernel):
    with pytest.raises(ValueError, match="depthwise_conv_1d expects") as error:
        depthwise_conv_1d(jnp.ones(x), jnp.ones(kernel))
    assert str(x) in str(error.value)
    assert str(kernel) in str(error.value)


def test_in_bfloat16_a_kernels_gradient_is_summed_in_float32():
    # Summed in bfloat16 over these 4,096 tokens, it was off by 8 %.
    x, cotangent = (jnp.asarray(1 + random(64, 64, CHANNELS, seed=seed), jnp.bfloat16) for seed in (0, 1))
    kernel = random(3, CHANNELS, seed=2)

    def loss(kernel, dtype):
        y = depthwise_conv_1d(x.astype(dtype), kernel, "xla")
        return jnp.vdot(y.astype(jnp.float32), cotangent.astype(jnp.float32))

    exact, rounded = (jax.jit(jax.grad(loss), static_argnums=1)(kernel, d) for d in ("float32", "bfloat16"))
    np.testing.assert_allclose(rounded, exact, rtol=1e-3)
