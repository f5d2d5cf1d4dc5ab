import jax.numpy as jnp
import pytest

from shiftaddvit_jax.nn import Primitives, make_attention
from shiftaddvit_jax.ops import (
    binarize,
    depthwise_conv_1d,
    depthwise_conv_2d,
    dispatch,
    matadd,
    matshift,
    shift_product,
)

SQUARE, CODES = jnp.ones((3, 3)), jnp.ones((3, 3), jnp.int8)
# The name that the error gives, and a valid call of the op.
OPS = {
    "binarize": ("binarize", lambda **chosen: binarize(SQUARE, **chosen)),
    "depthwise_conv_1d": ("depthwise_conv_1d", lambda **chosen: depthwise_conv_1d(SQUARE, SQUARE, **chosen)),
    "depthwise_conv_2d": (
        "depthwise_conv_2d",
        lambda **chosen: depthwise_conv_2d(SQUARE[..., None], SQUARE[..., None], **chosen),
    ),
    "dispatch": (
        "dispatch",
        lambda **chosen: dispatch(SQUARE, jnp.zeros(3, int), [lambda rows: rows], **chosen),
    ),
    "matadd": ("matadd", lambda **chosen: matadd(SQUARE, SQUARE, **chosen)),
    "matshift": ("matshift", lambda **chosen: matshift(SQUARE, CODES, CODES, **chosen)),
    "shift_product": ("matshift", lambda **chosen: shift_product(SQUARE, SQUARE, **chosen)),
}
ALL = pytest.mark.parametrize(("name", "call"), OPS.values(), ids=OPS)


@ALL
def test_an_implementation_runs(implementation, name, call):
    assert call(implementation=implementation).dtype == jnp.float32


@ALL
def test_tvm_without_a_kernel_says_what_to_choose_instead(name, call):
    with pytest.raises(ValueError, match=f"{name} has no TVM kernel .* use implementation='xla' or None"):
        call(implementation="tvm")


@ALL
def test_an_unknown_implementation_names_the_nearest(name, call):
    with pytest.raises(ValueError, match="unknown implementation 'tvn'; did you mean 'tvm'"):
        call(implementation="tvn")


def test_a_layer_hands_its_implementation_to_its_ops():
    layer = make_attention("hamming_linear", num_heads=1, primitives=Primitives(implementation="tvm"))
    with pytest.raises(ValueError, match="has no TVM kernel"):
        layer.init({"params": jnp.zeros(2, jnp.uint32)}, jnp.ones((1, 4, 4)), (2, 2))
