import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax import export

from shiftaddvit_jax.ops import dispatch

INPUTS, OUTPUTS = 3, 2
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(4, INPUTS, OUTPUTS)).astype(np.float32)
BIASES = RNG.normal(size=(4, OUTPUTS)).astype(np.float32)


# The experts are functions of one's own, which no kernel computes.
@pytest.fixture(scope="session")
def implementation(xla_implementation):
    return xla_implementation


def experts(count, weights=WEIGHTS):
    """Expert i is relu(x W_i + b_i): not linear, and not 0 for a row of padding."""
    return [
        functools.partial(lambda i, rows: jax.nn.relu(rows @ weights[i] + BIASES[i]), i) for i in range(count)
    ]


def reference(x, expert):
    rows = [np.maximum(token @ WEIGHTS[i] + BIASES[i], 0) for token, i in zip(x, expert, strict=True)]
    return np.array(rows).reshape(len(x), OUTPUTS)


def tokens(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, INPUTS)).astype(np.float32)


@functools.cache
def jitted(count, block_size, implementation):
    return jax.jit(lambda x, expert: dispatch(x, expert, experts(count), block_size, implementation))


# A shape compiles anew: few numbers of tokens for many splits here, all numbers in the test after this.
splits = st.sampled_from([1, 13, 70]).flatmap(
    lambda size: st.lists(st.integers(0, 3), min_size=size, max_size=size)
)


@given(split=splits, count=st.integers(2, 4), block_size=st.sampled_from([None, 5]))
@example(split=[0] * 70, count=2, block_size=None)
@example(split=[1] * 70, count=2, block_size=None)
@example(split=[3] * 70, count=4, block_size=5)
@example(split=[0, 3] * 35, count=4, block_size=1)
def test_any_split_is_computed_token_by_token(implementation, split, count, block_size):
    expert = np.array(split, np.int32) % count
    x = tokens(len(expert))
    y = jitted(count, block_size, implementation)(x, expert)
    np.testing.assert_allclose(y, reference(x, expert), rtol=1e-5, atol=1e-5)


@functools.cache
def jitted_at_every_size(block_size):
    # One program for all the numbers of tokens: the rest of the 70 go to an expert of their own.
    spare = lambda rows: jnp.full((rows.shape[0], OUTPUTS), jnp.nan)  # noqa: E731
    return jax.jit(lambda x, expert: dispatch(x, expert, [*experts(3), spare], block_size))


@given(count=st.integers(1, 70), seed=st.integers(0, 99), block_size=st.sampled_from([3, 128]))
def test_any_number_of_tokens_is_computed_token_by_token(count, seed, block_size):
    x = tokens(70, seed)
    expert = np.random.default_rng(seed).integers(0, 3, 70)
    y = jitted_at_every_size(block_size)(x, np.where(np.arange(70) < count, expert, 3))
    np.testing.assert_allclose(y[:count], reference(x[:count], expert[:count]), rtol=1e-5, atol=1e-5)
    assert np.all(np.isnan(y[count:]))


@pytest.mark.parametrize("count", [1, 2, 9, 23])
def test_small_numbers_of_tokens_need_no_multiple_of_the_block(implementation, count):
    x, expert = tokens(count), np.random.default_rng(1).integers(0, 2, count)
    y = dispatch(x, expert, experts(2), implementation=implementation)
    np.testing.assert_allclose(y, reference(x, expert), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0, 0.2, 1])
def test_an_expert_sees_only_its_own_tokens_and_padding(implementation, share):
    marks = np.where(np.random.default_rng(0).random(50) < share, 1, 2).astype(np.float32)

    def only(mark):
        # NaN for a block with another's token; every row of the block shows it.
        def compute(rows):
            foreign = jnp.any((rows != mark) & (rows != 0))
            return jnp.where(foreign, jnp.nan, rows * 10)

        return compute

    x = np.repeat(marks[:, None], INPUTS, axis=1)
    y = dispatch(x, marks.astype(int) - 1, [only(1), only(2)], 4, implementation)
    np.testing.assert_array_equal(y, x * 10)


def test_no_token_is_dropped_or_computed_twice_even_when_one_expert_takes_all(implementation):
    x = np.arange(1, 101, dtype=np.float32)[:, None]
    for chosen in range(3):
        y = dispatch(x, np.full(100, chosen), [lambda rows: rows] * 3, 8, implementation)
        np.testing.assert_array_equal(y, x)


def test_only_the_blocks_that_hold_tokens_are_computed(implementation):
    calls = []

    def counting(name):
        def compute(rows):
            jax.debug.callback(lambda: calls.append(name))
            return rows

        return compute

    expert = np.array([0] * 9 + [1])
    dispatch(tokens(10), expert, [counting("a"), counting("b")], 4, implementation).block_until_ready()
    jax.effects_barrier()
    assert sorted(calls) == ["a", "a", "a", "b"]


def test_bfloat16_tokens_stay_bfloat16(implementation):
    x = jnp.asarray(tokens(11), jnp.bfloat16)
    y = dispatch(x, np.arange(11) % 2, [lambda rows: rows, lambda rows: -rows], implementation=implementation)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x * jnp.where(jnp.arange(11) % 2, -1, 1)[:, None].astype(x.dtype))


def test_gradients_equal_those_of_the_masked_dense_computation(implementation):
    x, expert = tokens(37), np.random.default_rng(1).integers(0, 3, 37)
    cotangent = np.random.default_rng(2).normal(size=(37, OUTPUTS)).astype(np.float32)

    def dispatched(x, weights):
        return jnp.vdot(dispatch(x, expert, experts(3, weights), 4, implementation), cotangent)

    def masked(x, weights):
        outputs = jnp.stack([compute(x) for compute in experts(3, weights)])
        return jnp.vdot(jnp.sum(outputs * jax.nn.one_hot(expert, 3).T[..., None], axis=0), cotangent)

    actual, expected = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))(x, WEIGHTS[:3]) for loss in (dispatched, masked)
    )
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_vmap_dispatches_each_image_by_itself(implementation):
    x = np.stack([tokens(13, seed) for seed in range(3)])
    expert = np.random.default_rng(1).integers(0, 2, (3, 13))
    mapped = jax.vmap(lambda x, expert: dispatch(x, expert, experts(2), 4, implementation))(x, expert)
    expected = [reference(*image) for image in zip(x, expert, strict=True)]
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)


def test_an_exported_function_takes_any_number_of_tokens():
    count = export.symbolic_shape("batch")[0] * 7
    x, expert = (jax.ShapeDtypeStruct(*of) for of in (((count, INPUTS), jnp.float32), ((count,), jnp.int32)))
    exported = export.export(jax.jit(lambda x, expert: dispatch(x, expert, experts(3))))(x, expert)
    for count in (7, 700):
        x, expert = tokens(count), np.random.default_rng(1).integers(0, 3, count, np.int32)
        np.testing.assert_allclose(exported.call(x, expert), reference(x, expert), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x", "expert"), [((5, 3), (4,)), ((5,), (5,)), ((2, 5, 3), (2,)), ((5, 3), (5, 1))])
def test_shapes_that_do_not_fit_are_named(x, expert):
    with pytest.raises(ValueError, match=r"dispatch expects \[tokens, inputs\] and \[tokens\], got") as error:
        dispatch(jnp.ones(x), jnp.zeros(expert, int), experts(2))
    assert str(x) in str(error.value)


def test_no_expert_is_an_error():
    with pytest.raises(ValueError, match="at least one expert"):
        dispatch(tokens(4), np.zeros(4, int), [])


@pytest.mark.parametrize("block_size", [0, -4])
def test_a_block_holds_at_least_one_row(block_size):
    with pytest.raises(ValueError, match=f"block_size must be at least 1, got {block_size}"):
        dispatch(tokens(4), np.zeros(4, int), experts(2), block_size)
