import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_tvm import store
from kernels_tvm.cpu import library
from shiftaddvit_jax.nn import Primitives, make_attention
from shiftaddvit_jax.ops import (
    binarize,
    code_similarity,
    depthwise_conv_1d,
    depthwise_conv_2d,
    dispatch,
    hadamard,
    hamming_product,
    matadd,
    matshift,
    pack_codes,
    pack_weight,
    packed_product,
    shift_product,
)
from shiftaddvit_jax.ops.implementation import custom_call, uses_tvm, with_gradient

SQUARE, HALF, CODES = jnp.ones((3, 3)), jnp.ones((3, 3), jnp.bfloat16), jnp.ones((3, 3), jnp.int8)
BITS = jnp.ones((3, 1), jnp.uint32)
FOUR_BITS, FIVE_BITS = (pack_weight(SQUARE, bits) for bits in (4, 5))

# The name that errors give, and a valid call of the op.
OPS = {
    "binarize": ("binarize", lambda **chosen: binarize(SQUARE, **chosen)),
    "pack_codes": ("pack_codes", lambda **chosen: pack_codes(SQUARE, **chosen)),
    "code_similarity": ("code_similarity", lambda **chosen: code_similarity(SQUARE, SQUARE, **chosen)),
    "hadamard": ("hadamard", lambda **chosen: hadamard(jnp.ones((3, 4)), **chosen)),
    "hamming_product": ("hamming_product", lambda **chosen: hamming_product(BITS, BITS, 3, **chosen)),
    "depthwise_conv_1d": ("depthwise_conv_1d", lambda **chosen: depthwise_conv_1d(SQUARE, SQUARE, **chosen)),
    "depthwise_conv_2d": (
        "depthwise_conv_2d",
        lambda **chosen: depthwise_conv_2d(SQUARE[..., None], SQUARE[..., None], **chosen),
    ),
    "matadd": ("matadd", lambda **chosen: matadd(SQUARE, SQUARE, **chosen)),
    "matshift": ("matshift", lambda **chosen: matshift(SQUARE, CODES, CODES, **chosen)),
    "shift_product": ("matshift", lambda **chosen: shift_product(SQUARE, SQUARE, **chosen)),
    "packed_product": ("matshift", lambda **chosen: packed_product(SQUARE, FIVE_BITS, 3, **chosen)),
}
ALL = pytest.mark.parametrize(("name", "call"), OPS.values(), ids=OPS)
TVM = pytest.mark.parametrize("tvm", ["tvm", "tvm_shift"])


def dispatch_square(**chosen):
    return dispatch(SQUARE, jnp.zeros(3, int), [lambda rows: rows], **chosen)


WHOLE_BATCH = "a threshold of the whole batch has no kernel"
# What has no kernel, why, and a call that is valid on XLA.
UNSUPPORTED = {
    "binarize tensor": (WHOLE_BATCH, lambda **chosen: binarize(SQUARE, "tensor", **chosen)),
    "binarize bfloat16": ("in float32, not bfloat16", lambda **chosen: binarize(HALF, **chosen)),
    "hadamard bfloat16": ("in float32, not bfloat16", lambda **chosen: hadamard(HALF[:, :2], **chosen)),
    "pack_codes tensor": (WHOLE_BATCH, lambda **chosen: pack_codes(SQUARE, "tensor", **chosen)),
    "pack_codes bfloat16": ("in float32, not bfloat16", lambda **chosen: pack_codes(HALF, **chosen)),
    "code_similarity tensor": (
        WHOLE_BATCH,
        lambda **chosen: code_similarity(SQUARE, SQUARE, "tensor", **chosen),
    ),
    "code_similarity bfloat16": (
        "in float32, not bfloat16",
        lambda **chosen: code_similarity(SQUARE, HALF, **chosen),
    ),
    "depthwise_conv_1d bfloat16": (
        "in float32, not bfloat16",
        lambda **chosen: depthwise_conv_1d(HALF, SQUARE, **chosen),
    ),
    "depthwise_conv_2d bfloat16": (
        "in float32, not bfloat16",
        lambda **chosen: depthwise_conv_2d(SQUARE[..., None], HALF[..., None], **chosen),
    ),
    "dispatch": ("functions of one's own have no kernel", dispatch_square),
    "matadd bfloat16": (
        "adds float32 or int8 values, not bfloat16",
        lambda **chosen: matadd(CODES, HALF, **chosen),
    ),
    "matshift bfloat16": (
        "in float32, not bfloat16",
        lambda **chosen: matshift(HALF, CODES, CODES, **chosen),
    ),
    "matshift fixed_point": (
        "no kernel for fixed-point activations",
        lambda **chosen: matshift(SQUARE, CODES, CODES, activations="fixed_point", **chosen),
    ),
    "packed_product bfloat16": (
        "in float32, not bfloat16",
        lambda **chosen: packed_product(HALF, FIVE_BITS, 3, **chosen),
    ),
}
WITHOUT_KERNEL = pytest.mark.parametrize(("reason", "call"), UNSUPPORTED.values(), ids=UNSUPPORTED)


@pytest.fixture
def without_tvm(monkeypatch):
    monkeypatch.setattr(store, "is_installed", lambda: False)
    yield from forgetting_what_is_available()


@pytest.fixture
def on_an_unknown_cpu(monkeypatch):
    monkeypatch.setattr(library, "host_target", lambda: None)
    yield from forgetting_what_is_available()


@pytest.fixture
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    yield from forgetting_what_is_available()


def forgetting_what_is_available():
    custom_call.unavailable.cache_clear()
    yield
    custom_call.unavailable.cache_clear()


@pytest.mark.parametrize("chosen", [None, "xla", "tvm", "tvm_shift"])
def test_weights_of_five_bits_are_refused_with_int8_activations(chosen):
    with pytest.raises(ValueError, match="int8 activations need weights of 4 bits, these have 5"):
        packed_product(SQUARE, FIVE_BITS, 3, "int8", implementation=chosen)


def runs_a_kernel(call):
    return "shiftaddvit." in jax.jit(call).lower().as_text()


@ALL
@pytest.mark.parametrize("chosen", [None, "xla", "tvm", "tvm_shift"])
def test_every_implementation_computes_the_same(name, call, chosen):
    y, expected = call(implementation=chosen), call(implementation="xla")
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@ALL
def test_tvm_runs_a_kernel_and_xla_none(name, call):
    assert runs_a_kernel(lambda: call(implementation="tvm"))
    assert not runs_a_kernel(lambda: call(implementation="xla"))


@pytest.mark.parametrize("name", sorted(set(OPS) - {"packed_product"}))
def test_none_runs_xla_where_weights_are_not_packed(name):
    assert not runs_a_kernel(OPS[name][1])


def test_none_runs_a_kernel_where_weights_are_packed():
    assert runs_a_kernel(OPS["packed_product"][1])
    assert runs_a_kernel(lambda: packed_product(SQUARE, FOUR_BITS, 3, "int8"))


def test_the_first_calls_of_a_kernel_may_come_at_once_each_with_another_batch():
    threads = 6
    together, rng = Barrier(threads), np.random.default_rng(0)
    codes, values = (rng.integers(-1, 2, (threads, *shape), np.int8) for shape in ((2, 13), (13, 7)))

    def call(count):
        together.wait()
        return matadd(codes[:count], values[:count], implementation="tvm")

    with ThreadPoolExecutor(threads) as pool:
        for count, y in enumerate(pool.map(call, range(1, threads + 1)), 1):
            np.testing.assert_array_equal(y, codes[:count].astype(int) @ values[:count])


@TVM
@WITHOUT_KERNEL
def test_what_has_no_kernel_is_an_error_that_says_why_and_what_to_choose(reason, call, tvm):
    with pytest.raises(ValueError, match=rf"can't run on TVM here: .*{reason}.*; use implementation='xla'"):
        call(implementation=tvm)


@WITHOUT_KERNEL
@pytest.mark.parametrize("chosen", [None, "xla"])
def test_what_has_no_kernel_runs_on_xla(reason, call, chosen):
    assert jnp.all(jnp.isfinite(call(implementation=chosen)))


@TVM
@ALL
def test_without_tvm_its_kernels_are_an_error_that_says_what_to_install(without_tvm, name, call, tvm):
    with pytest.raises(
        ValueError, match=rf"{name} can't run on TVM here: .*pip install 'shiftaddvit-jax\[tvm"
    ):
        call(implementation=tvm)


@pytest.mark.usefixtures("without_tvm")
@ALL
def test_without_tvm_none_runs_xla(name, call):
    np.testing.assert_array_equal(call(implementation=None), call(implementation="xla"))


@pytest.mark.usefixtures("on_an_unknown_cpu")
def test_a_cpu_without_kernels_runs_xla_and_says_so_where_tvm_is_asked_for():
    np.testing.assert_array_equal(packed_product(SQUARE, FIVE_BITS, 3), 3)
    with pytest.raises(ValueError, match="this CPU is not among the kernels' targets; use"):
        packed_product(SQUARE, FIVE_BITS, 3, implementation="tvm")


@pytest.mark.usefixtures("on_a_tpu")
def test_another_backend_runs_xla_and_says_so_where_tvm_is_asked_for():
    np.testing.assert_array_equal(packed_product(SQUARE, FIVE_BITS, 3), 3)
    with pytest.raises(ValueError, match="TVM kernels run on CPU and GPU, and JAX runs on 'tpu'; use"):
        packed_product(SQUARE, FIVE_BITS, 3, implementation="tvm")


@pytest.mark.parametrize("prefer", [False, True])
def test_uses_tvm_prefers_it_for_none_alone(prefer):
    assert uses_tvm("op", None, prefer=prefer) is prefer
    assert uses_tvm("op", "tvm", prefer=prefer)
    assert uses_tvm("op", "tvm_shift", prefer=prefer)
    assert not uses_tvm("op", "xla", prefer=prefer)


def test_none_is_xla_where_there_is_no_kernel():
    assert not uses_tvm("op", None, "it has no kernel", prefer=True)


@ALL
def test_an_unknown_implementation_names_the_nearest(name, call):
    with pytest.raises(ValueError, match="unknown implementation 'tvn'; did you mean 'tvm'"):
        call(implementation="tvn")


def test_an_unknown_implementation_of_dispatch_names_the_nearest():
    with pytest.raises(ValueError, match="unknown implementation 'tvn'; did you mean 'tvm'"):
        dispatch_square(implementation="tvn")


def test_a_layer_hands_its_implementation_to_its_ops():
    primitives = Primitives(implementation="tvm", threshold="tensor")
    layer = make_attention("hamming_linear", num_heads=1, primitives=primitives)
    with pytest.raises(ValueError, match=WHOLE_BATCH):
        layer.init(jax.random.key(0), jnp.ones((1, 4, 4)), (2, 2))


@pytest.mark.parametrize(("dispatch_is_async", "waits"), [(True, None), (False, "2000")])
def test_threads_of_one_caller_stay_awake_until_its_next_call(monkeypatch, dispatch_is_async, waits):
    name, flag = "TVM_THREAD_POOL_SPIN_COUNT", "jax_cpu_enable_async_dispatch"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    jax.config.update(flag, dispatch_is_async)
    try:
        custom_call._choose_waiting()
    finally:
        jax.config.update(flag, True)
    assert os.environ.get(name) == waits


def missing(x):
    raise RuntimeError("no compiler")


def test_where_a_kernel_cannot_be_compiled_xla_computes_with_a_warning():
    with pytest.warns(UserWarning, match="XLA computes what TVM has a kernel for: no compiler"):
        assert (with_gradient(None, missing, jnp.negative)(SQUARE) == -SQUARE).all()


def test_a_kernel_that_is_asked_for_and_cannot_be_compiled_is_an_error():
    with pytest.raises(RuntimeError, match="no compiler"):
        with_gradient("tvm", missing, jnp.negative)(SQUARE)
