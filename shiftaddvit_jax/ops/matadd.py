"""MatAdd: a product with binary codes, which needs additions alone."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int8, Int32, Real

from kernels_tvm.descriptions import MatAddDescription
from kernels_tvm.store import Kernel
from shiftaddvit_jax.ops.implementation import Implementation, run_op
from shiftaddvit_jax.ops.implementation.custom_call import call_kernel


def matadd(
    codes: Real[Array, "... rows inner"] | Bool[Array, "... rows inner"],
    values: Float[Array, "... inner columns"] | Int8[Array, "... inner columns"],
    implementation: Implementation = None,
) -> Float[Array, "... rows columns"] | Int32[Array, "... rows columns"]:
    """``codes @ values`` where the codes are 0, 1 or -1: each output is a sum of values, some negated.

    Leading axes broadcast as in `numpy.matmul`. Gradients reach both operands. Sums of int8 values are int32.

    Raises:
      ValueError: fewer than two axes, or inner sizes that differ.
    """
    if codes.ndim < 2 or values.ndim < 2 or codes.shape[-1] != values.shape[-2]:
        raise ValueError(
            f"matadd expects [..., rows, inner] and [..., inner, columns], got {codes.shape} "
            f"and {values.shape}"
        )
    description = MatAddDescription(codes.shape[-1], values.shape[-1], values.dtype.name)
    kernel, unsupported = partial(_kernel, description), description.why_not()
    return run_op("matadd", implementation, kernel, _matadd, codes, values, unsupported=unsupported)


def _kernel(description, codes, values):
    batch = jnp.broadcast_shapes(codes.shape[:-2], values.shape[:-2])
    (rows, inner), columns = codes.shape[-2:], values.shape[-1]
    count = math.prod(batch)
    codes = jnp.broadcast_to(codes.astype(values.dtype), (*batch, rows, inner)).reshape(count, rows, inner)
    values = jnp.broadcast_to(values, (*batch, inner, columns)).reshape(count, inner, columns)
    dtype = _sum_dtype(values)
    output = jax.ShapeDtypeStruct((codes.shape[0], rows, columns), dtype)
    return call_kernel(Kernel("matadd", description), [output], codes, values, batched=2)[0].reshape(
        *batch, rows, columns
    )


def _sum_dtype(values):
    return jnp.int32 if values.dtype == jnp.int8 else values.dtype


# The jit names this product in the traced model: operations are counted by that name.
@jax.jit
def _matadd(codes, values):
    return jnp.matmul(codes.astype(values.dtype), values, preferred_element_type=_sum_dtype(values))
