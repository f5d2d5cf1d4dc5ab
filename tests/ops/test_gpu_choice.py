"""What ``implementation=None`` is on a GPU: traced here for one, and the mechanism on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_tvm.gpu import library
from shiftaddvit_jax.models import create_model
from shiftaddvit_jax.nn import MoEDense
from shiftaddvit_jax.ops import (
    binarize,
    code_similarity,
    depthwise_conv_1d,
    depthwise_conv_2d,
    depthwise_conv_gelu,
    hadamard,
    hamming_product,
    matadd,
    matshift,
    pack_codes,
    pack_weight,
    packed_product,
    shift_product,
)
from shiftaddvit_jax.ops.implementation import custom_call
from shiftaddvit_jax.ops.implementation.custom_call import unless_differentiated

on_a_gpu = pytest.mark.usefixtures("as_on_a_gpu")


def normal(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)


FIVE_BITS, FOUR_BITS = (pack_weight(2.0 ** jnp.round(normal(8, 6)), bits) for bits in (5, 4))
CODES, BITS = jnp.sign(normal(2, 5, 8)), jnp.ones((2, 5, 1), jnp.uint32)
# Ops of floats: each with the arrays that it computes from.
FLOATS = {
    "binarize": (binarize, normal(2, 5, 8)),
    "code_similarity": (code_similarity, normal(2, 5, 8), normal(2, 7, 8)),
    "depthwise_conv_1d": (depthwise_conv_1d, normal(2, 5, 8), normal(3, 8)),
    "depthwise_conv_2d": (depthwise_conv_2d, normal(2, 5, 4, 8), normal(3, 3, 8)),
    "depthwise_conv_gelu": (depthwise_conv_gelu, normal(2, 5, 4, 8), normal(3, 3, 8), normal(8)),
    "hadamard": (hadamard, normal(2, 5, 8)),
    "matadd": (matadd, CODES, normal(2, 8, 3)),
    "packed_product": (lambda x, **chosen: packed_product(x, FIVE_BITS, 6, **chosen), normal(2, 5, 8)),
    "packed_product int8": (
        lambda x, **chosen: packed_product(x, FOUR_BITS, 6, "int8", **chosen),
        normal(2, 5, 8),
    ),
}
INTEGERS = {
    "hamming_product": (lambda q, k, **chosen: hamming_product(q, k, 20, **chosen), BITS, BITS + 6),
    "matadd int8": (matadd, CODES.astype(jnp.int8), jnp.ones((2, 8, 3), jnp.int8)),
    "pack_codes": (pack_codes, normal(2, 5, 8)),
}
OPS = FLOATS | INTEGERS
ALL = pytest.mark.parametrize("name", OPS)
DIFFERENTIABLE = pytest.mark.parametrize("name", FLOATS)
FORWARD_MODE = pytest.mark.parametrize("name", [name for name in FLOATS if "conv" not in name])


def kernels_in(function, *arrays):
    """How many kernels a function calls on an NVIDIA GPU."""
    text = (
        jax.jit(lambda *arrays: function(*arrays))
        .trace(*arrays)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    return text.count('@"shiftaddvit.')


def total(op):
    return lambda *arrays: jnp.sum(op(*arrays))


@on_a_gpu
@ALL
def test_none_is_the_kernel_where_nothing_differentiates(name):
    op, *arrays = OPS[name]
    kernels = 3 if name == "code_similarity" else 1
    assert kernels_in(op, *arrays) == kernels
    assert kernels_in(jax.jit(op), *arrays) == kernels
    assert kernels_in(lambda *arrays: op(*arrays, implementation="xla"), *arrays) == 0


@on_a_gpu
@DIFFERENTIABLE
def test_training_holds_no_kernel_forward_or_backward(name):
    op, *arrays = FLOATS[name]
    assert kernels_in(jax.value_and_grad(total(op)), *arrays) == 0
    assert kernels_in(jax.grad(total(jax.jit(op))), *arrays) == 0


@on_a_gpu
@DIFFERENTIABLE
def test_tvm_that_is_asked_for_runs_the_kernel_forward_and_xla_backward(name):
    op, *arrays = FLOATS[name]
    chosen = total(lambda *arrays: op(*arrays, implementation="tvm"))
    assert kernels_in(jax.value_and_grad(chosen), *arrays) == kernels_in(op, *arrays)


@on_a_gpu
@FORWARD_MODE
def test_forward_mode_holds_no_kernel(name):
    op, *arrays = FLOATS[name]
    assert kernels_in(lambda *arrays: jax.jvp(op, arrays, arrays), *arrays) == 0


@on_a_gpu
@ALL
def test_none_runs_on_a_cpu_beside_the_gpu(name):
    op, *arrays = OPS[name]
    np.testing.assert_array_equal(op(*arrays), op(*arrays, implementation="xla"))


@on_a_gpu
@ALL
def test_what_cannot_be_compiled_is_left_to_xla_with_a_warning(name, monkeypatch):
    def no_compiler(kernel, target):
        raise RuntimeError("nvcc failed")

    custom_call._register_gpu.cache_clear()
    monkeypatch.setattr(library, "load", no_compiler)
    op, *arrays = OPS[name]
    with pytest.warns(UserWarning, match="XLA computes what TVM has a kernel for: nvcc failed"):
        assert kernels_in(op, *arrays) == 0
    with pytest.raises(RuntimeError, match="nvcc failed"):
        kernels_in(lambda *arrays: op(*arrays, implementation="tvm"), *arrays)
    custom_call._register_gpu.cache_clear()


@on_a_gpu
def test_weights_that_are_not_packed_stay_on_xla():
    x, weight = normal(5, 8), jnp.ones((8, 6))
    assert kernels_in(shift_product, x, weight) == 0
    assert kernels_in(lambda x: matshift(x, weight, -weight), x) == 0
    layer = MoEDense(6)
    assert kernels_in(layer.apply, layer.init(jax.random.key(0), x), x) == 0


@on_a_gpu
def test_a_model_takes_the_kernels_in_inference_and_none_in_training():
    model = create_model("pvt_v2_nano", attention="hamming_linear")
    images = jnp.ones((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    # Three stages of two codes, two products and a convolution; each MLP's convolution.
    assert kernels_in(model.apply, variables, images) == 3 * 5 + 4
    rngs = {"dropout": jax.random.key(0)}
    assert kernels_in(lambda *given: model.apply(*given, train=True, rngs=rngs), variables, images) == 0


def fake_kernel(x, y):
    """Not what the reference says, so that it shows which of them ran."""
    return jnp.full_like(x, 7)


def reference(x, y):
    return jnp.sin(x) * y


X, Y = jnp.float32([0.25, 0.5]), jnp.float32([2, 3])
CHOSEN = unless_differentiated(fake_kernel, reference)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap, lambda f: jax.jit(jax.vmap(f))])
def test_the_kernel_runs_where_nothing_is_differentiated(transform):
    np.testing.assert_array_equal(transform(CHOSEN)(X, Y), [7, 7])


@pytest.mark.parametrize("function", [CHOSEN, jax.jit(CHOSEN), jax.vmap(CHOSEN)], ids=["", "jit", "vmap"])
def test_the_reference_alone_runs_under_reverse_mode(function):
    y, pull = jax.vjp(function, X, Y)
    np.testing.assert_allclose(y, np.sin(X) * Y, rtol=1e-6)
    for gradient, expected in zip(pull(jnp.ones(2)), (np.cos(X) * Y, np.sin(X)), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_the_reference_alone_runs_under_forward_mode():
    y, tangent = jax.jit(lambda x, y: jax.jvp(CHOSEN, (x, y), (y, x)))(X, Y)
    np.testing.assert_allclose(y, np.sin(X) * Y, rtol=1e-6)
    np.testing.assert_allclose(tangent, np.cos(X) * Y * Y + np.sin(X) * X, rtol=1e-6)


def test_integers_beside_what_is_differentiated_have_no_gradient():
    function = unless_differentiated(lambda x, n: 7 * x, lambda x, n: x**2 * n)
    np.testing.assert_allclose(
        jax.grad(lambda x, n: jnp.sum(function(x, n)))(X, jnp.int32([3, 5])), X * np.array([6, 10])
    )


def test_a_result_of_integers_has_no_gradient():
    function = unless_differentiated(lambda x: jnp.int32(x) + 7, jnp.int32)
    np.testing.assert_array_equal(function(Y), [9, 10])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(x * function(x)))(Y), [2, 3])


# Ops with nothing to compute, or nothing to sum: what they give, by their shape and the one number in it.
EMPTY = {
    "matadd inner": (lambda **c: matadd(jnp.ones((2, 5, 0)), jnp.ones((2, 0, 3)), **c), (2, 5, 3), 0),
    "matadd rows": (lambda **c: matadd(jnp.ones((2, 0, 4)), jnp.ones((2, 4, 3)), **c), (2, 0, 3), 0),
    "matadd columns": (lambda **c: matadd(jnp.ones((2, 5, 4)), jnp.ones((2, 4, 0)), **c), (2, 5, 0), 0),
    "matadd batch": (lambda **c: matadd(jnp.ones((0, 5, 4)), jnp.ones((0, 4, 3)), **c), (0, 5, 3), 0),
    "hamming rows": (lambda **c: hamming_product(BITS[:, :0], BITS, 20, **c), (2, 0, 5), 0),
    "hamming others": (lambda **c: hamming_product(BITS, BITS[:, :0], 20, **c), (2, 5, 0), 0),
    "hamming length": (lambda **c: hamming_product(BITS[..., :0], BITS[..., :0], 0, **c), (2, 5, 5), 0),
    "hadamard tokens": (lambda **c: hadamard(jnp.ones((2, 0, 8)), **c), (2, 0, 8), 0),
    "binarize tokens": (lambda **c: binarize(jnp.ones((2, 0, 8)), **c), (2, 0, 8), 0),
    "binarize head_dim": (lambda **c: binarize(jnp.ones((2, 5, 0)), **c), (2, 5, 0), 0),
    "pack_codes tokens": (lambda **c: pack_codes(jnp.ones((2, 0, 8)), **c), (2, 0, 1), 0),
    "pack_codes head_dim": (lambda **c: pack_codes(jnp.ones((2, 5, 0)), **c), (2, 5, 0), 0),
    "similarity others": (lambda **c: code_similarity(CODES, CODES[:, :0], **c), (2, 5, 0), 0),
    "similarity head_dim": (lambda **c: code_similarity(CODES[..., :0], CODES[..., :0], **c), (2, 5, 5), 0),
    "conv images": (
        lambda **c: depthwise_conv_2d(jnp.ones((0, 5, 4, 8)), jnp.ones((3, 3, 8)), **c),
        (0, 5, 4, 8),
        0,
    ),
    "conv height": (
        lambda **c: depthwise_conv_2d(jnp.ones((2, 0, 4, 8)), jnp.ones((3, 3, 8)), **c),
        (2, 0, 4, 8),
        0,
    ),
    "conv channels": (
        lambda **c: depthwise_conv_1d(jnp.ones((2, 5, 0)), jnp.ones((3, 0)), **c),
        (2, 5, 0),
        0,
    ),
    "packed rows": (lambda **c: packed_product(normal(0, 8), FIVE_BITS, 6, **c), (0, 6), 0),
    "shift outputs": (lambda **c: shift_product(normal(5, 8), jnp.ones((8, 0)), **c), (5, 0), 0),
}


@on_a_gpu
@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("implementation", [None, "tvm", "tvm_shift"])
def test_nothing_to_compute_launches_nothing(name, implementation):
    call, shape, number = EMPTY[name]
    assert kernels_in(lambda: call(implementation=implementation)) == 0
    np.testing.assert_array_equal(call(implementation=implementation), np.full(shape, number))


@on_a_gpu
@pytest.mark.parametrize("implementation", [None, "tvm"])
def test_a_mixture_of_no_rows_launches_nothing(implementation):
    layer = MoEDense(6, implementation=implementation)
    variables = MoEDense(6, implementation="xla").init(jax.random.key(0), normal(5, 8))
    assert kernels_in(layer.apply, variables, normal(0, 8)) == 0
    assert jax.jit(layer.apply)(variables, normal(0, 8)).shape == (0, 6)
