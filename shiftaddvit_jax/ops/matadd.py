"""MatAdd: a product with binary codes, which needs additions alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from shiftaddvit_jax.ops.implementation import Implementation, uses_tvm


def matadd(
    codes: Float[Array, "*batch rows inner"],
    values: Float[Array, "*batch inner columns"],
    implementation: Implementation = None,
) -> Float[Array, "*batch rows columns"]:
    """``codes @ values`` where the codes are 0, 1 or -1: each output is a sum of values, some negated.

    Leading axes broadcast as in `numpy.matmul`. Gradients reach both operands.

    Raises:
      ValueError: fewer than two axes, or inner sizes that differ.
    """
    uses_tvm("matadd", implementation, unsupported="it has no kernel yet")
    if codes.ndim < 2 or values.ndim < 2 or codes.shape[-1] != values.shape[-2]:
        raise ValueError(
            f"matadd expects [..., rows, inner] and [..., inner, columns], got {codes.shape} "
            f"and {values.shape}"
        )
    return _matadd(codes, values)


# A jit of its own names the product in the traced model, where operations are counted by primitive.
@jax.jit
def _matadd(codes, values):
    return jnp.matmul(codes.astype(values.dtype), values)
