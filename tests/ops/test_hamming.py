import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shiftaddvit_jax.ops import code_similarity, hamming_product, pack_codes

THRESHOLDS = pytest.mark.parametrize("threshold", ["zero", "sample"])
SHAPES = pytest.mark.parametrize(
    ("leading", "rows", "others", "length"),
    [
        ((), 1, 1, 1),
        ((), 5, 7, 31),
        ((2,), 3, 16, 32),
        ((2, 3), 4, 17, 33),
        ((1,), 1, 35, 64),
        ((3,), 49, 33, 100),
    ],
)


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def codes(x, threshold):
    limit = x.mean(axis=(-2, -1), keepdims=True, dtype=np.float64) if threshold == "sample" else 0
    return np.where(x > limit, 1, -1)


def bits(codes):
    """NumPy's own packing: code c is bit c % 32 of word c // 32."""
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 32)]
    packed = np.packbits(np.pad(codes == 1, padding), axis=-1, bitorder="little")
    return packed.view("<u4")


@THRESHOLDS
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (2, 3, 32), (2, 3, 4, 33), (7, 100)], ids=str)
def test_pack_codes_has_numpys_bits(implementation, threshold, shape):
    x = values(*shape)
    packed = pack_codes(x, threshold, implementation)
    assert packed.dtype == jnp.uint32
    np.testing.assert_array_equal(packed, bits(codes(x, threshold)))


def test_the_bits_past_the_last_code_are_zero(implementation):
    packed = pack_codes(np.ones((3, 5), np.float32), "zero", implementation)
    np.testing.assert_array_equal(packed, [[0b11111]] * 3)


def test_every_image_is_packed_at_its_own_threshold(implementation):
    x = values(3, 4, 20) + np.float32([0, 3, -3])[:, None, None]
    together = pack_codes(x, implementation=implementation)
    one_by_one = [pack_codes(image, implementation=implementation) for image in x]
    np.testing.assert_array_equal(together, one_by_one)


@SHAPES
def test_hamming_product_is_the_product_of_the_codes(implementation, leading, rows, others, length):
    queries = codes(values(*leading, rows, length), "zero")
    keys = codes(values(*leading, others, length, seed=1), "zero")
    product = hamming_product(bits(queries), bits(keys), length, implementation)
    assert product.dtype == jnp.int32
    np.testing.assert_array_equal(product, queries @ keys.swapaxes(-1, -2))


def test_no_rows_have_no_products(implementation):
    queries, keys = values(2, 0, 40), values(2, 7, 40)
    assert pack_codes(queries, implementation=implementation).shape == (2, 0, 2)
    assert code_similarity(queries, keys, implementation=implementation).shape == (2, 0, 7)
    assert code_similarity(keys, queries, implementation=implementation).shape == (2, 7, 0)


# One length of a code, for one kernel: it learns the other sizes at run time, and XLA compiles for each.
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 50), st.integers(0, 99))
@example(1, 1, 1, 0)
def test_one_kernel_takes_any_number_of_codes(batch, rows, others, seed):
    rng = np.random.default_rng(seed)
    queries, keys = rng.choice([-1, 1], (batch, rows, 40)), rng.choice([-1, 1], (batch, others, 40))
    product = hamming_product(bits(queries), bits(keys), 40, "tvm")
    np.testing.assert_array_equal(product, queries @ keys.swapaxes(-1, -2))


def test_a_code_has_its_length_with_itself_and_its_negative_with_its_opposite(implementation):
    code = np.random.default_rng(0).choice([-1, 1], (1, 70))
    both = bits(np.concatenate([code, -code]))
    np.testing.assert_array_equal(hamming_product(both[:1], both, 70, implementation), [[70, -70]])


@THRESHOLDS
@SHAPES
def test_code_similarity_is_the_product_of_the_codes(
    implementation, threshold, leading, rows, others, length
):
    queries, keys = values(*leading, rows, length), values(*leading, others, length, seed=1)
    similarity = code_similarity(queries, keys, threshold, implementation)
    assert similarity.dtype == jnp.float32
    expected = codes(queries, threshold) @ codes(keys, threshold).swapaxes(-1, -2)
    np.testing.assert_array_equal(similarity, expected)


def test_code_similarity_at_the_tensors_mean_lets_images_influence_each_other(xla_implementation):
    x = values(2, 4, 20) + np.float32([3, -3])[:, None, None]
    similarity = code_similarity(x, x, "tensor", xla_implementation)
    expected = np.where(x > x.mean(dtype=np.float64), 1, -1)
    np.testing.assert_array_equal(similarity, expected @ expected.swapaxes(-1, -2))


def test_code_similarity_keeps_bfloat16(xla_implementation):
    x = jnp.asarray(values(4, 20), jnp.bfloat16)
    similarity = code_similarity(x, x, "zero", xla_implementation)
    assert similarity.dtype == jnp.bfloat16
    expected = codes(np.asarray(x, np.float32), "zero")
    np.testing.assert_array_equal(similarity, expected @ expected.T)


def test_the_gradient_of_code_similarity_passes_where_values_lie_between_the_codes(implementation):
    queries, keys = values(2, 5, 40), values(2, 7, 40, seed=1)
    cotangent = values(2, 5, 7, seed=2)
    _, pull_back = jax.vjp(lambda *x: code_similarity(*x, implementation=implementation), queries, keys)
    for gradient, x, expected in zip(
        pull_back(jnp.asarray(cotangent)),
        (queries, keys),
        (cotangent @ codes(keys, "sample"), cotangent.swapaxes(1, 2) @ codes(queries, "sample")),
        strict=True,
    ):
        np.testing.assert_allclose(gradient, np.where(np.abs(x) <= 1, expected, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "length"),
    [((3, 1), (3, 2), 32), ((3, 1), (3, 1), 33), ((2, 3, 1), (3, 3, 1), 5), ((3, 1), (2, 3, 1), 5)],
)
def test_shapes_that_do_not_fit_are_named(queries, keys, length):
    with pytest.raises(ValueError, match=f"hamming_product of codes of length {length} expects") as error:
        hamming_product(jnp.zeros(queries, jnp.uint32), jnp.zeros(keys, jnp.uint32), length)
    assert str(queries) in str(error.value)
    assert str(keys) in str(error.value)
