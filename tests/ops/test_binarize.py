import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shiftaddvit_jax.ops import binarize
from shiftaddvit_jax.ops.binarize import LEVELS, THRESHOLDS

ALL = pytest.mark.parametrize(
    ("implementation", "threshold", "levels"),
    [
        (implementation, threshold, levels)
        for implementation in (None, "xla", "tvm")
        for threshold in THRESHOLDS
        for levels in LEVELS
        if (implementation, threshold) != ("tvm", "tensor")
    ],
)
# Multiples of 1/8 have exact means over these 8 entries an image, so no threshold rests on rounding.
VALUES = arrays(np.float32, (3, 2, 4), elements=st.integers(-40, 40).map(lambda n: n / 8))


def mean_of(x, threshold):
    if threshold == "zero":
        return 0.0
    axes = (-2, -1) if threshold == "sample" else None
    return np.mean(np.asarray(x, np.float64), axis=axes, keepdims=True)


def reference(x, threshold, levels):
    return np.where(np.asarray(x, np.float64) > mean_of(x, threshold), levels[1], levels[0])


@ALL
@given(x=VALUES)
def test_codes_are_numpys(implementation, threshold, levels, x):
    codes = binarize(x, threshold, levels, implementation)
    # 24 entries: the tensor's mean is a float32 quotient, so a tie with it may fall either way.
    clear = np.abs(x - mean_of(x, threshold)) > 1e-6 if threshold == "tensor" else np.full(x.shape, True)
    np.testing.assert_array_equal(np.asarray(codes)[clear], reference(x, threshold, levels)[clear])


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 4, 5)])
def test_any_leading_axes_have_a_threshold_each(implementation, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(binarize(x, implementation=implementation), reference(x, "sample", (0, 1)))


def test_a_value_at_the_threshold_takes_the_lower_level(implementation):
    np.testing.assert_array_equal(binarize(jnp.full((2, 3), 0.25), "sample", (-1, 1), implementation), -1)
    np.testing.assert_array_equal(binarize(jnp.zeros((2, 3)), "zero", (0, 1), implementation), 0)


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_have_the_dtype_of_the_values(xla_implementation, levels):
    x = jnp.asarray([[-2, -0.5], [0.5, 2]], jnp.bfloat16)
    codes = binarize(x, "zero", levels, xla_implementation)
    assert codes.dtype == jnp.bfloat16
    np.testing.assert_array_equal(codes, [[levels[0]] * 2, [levels[1]] * 2])


def images():
    offset = np.float32([0, 3, -3])[:, None, None]
    return np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32) + offset


def one_by_one(x, threshold, implementation):
    return np.concatenate([binarize(image[None], threshold, (0, 1), implementation) for image in x])


def test_by_default_a_batch_has_the_codes_of_its_images_one_by_one(implementation):
    x = images()
    codes = binarize(x, implementation=implementation)
    np.testing.assert_array_equal(codes, one_by_one(x, "sample", implementation))


def test_the_tensors_mean_lets_images_influence_each_other(xla_implementation):
    x = images()
    codes = binarize(x, "tensor", (0, 1), xla_implementation)
    assert np.any(np.asarray(codes) != one_by_one(x, "tensor", xla_implementation))


@ALL
def test_the_gradient_passes_where_the_value_lies_between_the_levels_ends_included(
    implementation, threshold, levels
):
    low, high = levels
    tiny = np.float32(1e-6)
    x = np.float32([[low, high, low - tiny, high + tiny], [(low + high) / 2, 0.5, -7, 7]])
    cotangent = np.arange(1, 9, dtype=np.float32).reshape(x.shape)
    gradient = jax.grad(lambda x: jnp.vdot(binarize(x, threshold, levels, implementation), cotangent))(x)
    np.testing.assert_array_equal(gradient, np.where([[1, 1, 0, 0], [1, 1, 0, 0]], cotangent, 0))


@pytest.mark.parametrize("levels", [(1, 0), (0, 2), (-1, 0)])
def test_other_levels_are_an_error(levels):
    with pytest.raises(ValueError, match=r"levels must be \(0, 1\) or \(-1, 1\), got"):
        binarize(jnp.ones((2, 2)), levels=levels)


def test_an_unknown_threshold_names_the_nearest():
    with pytest.raises(ValueError, match="unknown threshold 'samples'; did you mean 'sample'"):
        binarize(jnp.ones((2, 2)), "samples")


def test_one_axis_is_an_error():
    with pytest.raises(ValueError, match=r"expects \[\.\.\., tokens, head_dim\], got shape \(3,\)"):
        binarize(jnp.ones(3))


def test_forward_mode_is_straight_through_too():
    x, tangent = jnp.float32([[-2, -0.5, 0.25, 3]]), jnp.float32([[1, 2, 3, 4]])
    codes, changes = jax.jit(lambda x, t: jax.jvp(lambda x: binarize(x, "zero", (-1, 1)), (x,), (t,)))(
        x, tangent
    )
    np.testing.assert_array_equal(codes, [[-1, -1, 1, 1]])
    np.testing.assert_array_equal(changes, [[0, 2, 3, 0]])
