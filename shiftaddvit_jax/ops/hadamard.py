"""The fast Walsh-Hadamard transform: a rotation made of additions."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from kernels_tvm.descriptions import HadamardDescription
from kernels_tvm.hadamard import conference_matrix
from kernels_tvm.store import Kernel
from shiftaddvit_jax.ops.implementation import Implementation, float32_only, run_op
from shiftaddvit_jax.ops.implementation.custom_call import call_kernel
from shiftaddvit_jax.ops.matadd import matadd


def hadamard(
    x: Float[Array, "*batch size"], implementation: Implementation = None
) -> Float[Array, "*batch size"]:
    """``x`` times an orthonormal Hadamard matrix along its last axis, in n log2(n) additions for n numbers.

    The matrix is Sylvester's, as `scipy.linalg.hadamard`'s, over sqrt(n). For sizes 12, 20 and 28 times a
    power of two it is the Kronecker product of Paley's of that order with Sylvester's. All are symmetric: the
    transform is its own inverse, and the gradient is the transform of the cotangent.

    The one multiplication of a number is by 1 / sqrt(n), at the end, where XLA joins it with what follows; it
    is exact where n is a power of four. Sums are float32 at least, and the result has the dtype of ``x``.

    Raises:
      ValueError: a size without such a matrix, with the nearest ones that have one.
      TypeError: numbers that are not floating-point ones.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"hadamard expects floating-point numbers, got {x.dtype}; convert them with astype")
    if x.ndim < 1:
        raise ValueError("hadamard expects [..., size], got a single number")
    description = HadamardDescription(x.shape[-1])

    def kernel(x):
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        output = jax.ShapeDtypeStruct(rows.shape, x.dtype)
        return call_kernel(Kernel("hadamard", description), [output], rows)[0].reshape(x.shape)

    unsupported = float32_only(x) or description.why_not()
    sums = run_op("hadamard", implementation, kernel, _hadamard, x, unsupported=unsupported)
    return (sums * x.shape[-1] ** -0.5).astype(x.dtype)


def rotate(
    x: Float[Array, "*batch size"],
    signs: Int8[Array, "rotations 2 size"],
    implementation: Implementation = None,
) -> Float[Array, "*batch rotations*size"]:
    """``x`` under random rotations of its last axis, side by side.

    A rotation is twice a change of signs and then `hadamard`: additions, which spread an outlier over all
    numbers of a row. Rows' lengths and inner products stay the same in each.

    Args:
      x: rows to rotate.
      signs: -1 and 1, for each rotation two rows.
      implementation: see `shiftaddvit_jax.ops`.

    Raises:
      ValueError: as `hadamard`.
    """
    rotated = x[..., None, :]
    for negative in (signs[:, 0] < 0, signs[:, 1] < 0):
        rotated = hadamard(jnp.where(negative, -rotated, rotated), implementation)
    return rotated.reshape(*x.shape[:-1], signs.shape[0] * signs.shape[2])


# The jit names these sums in a traced model: operations are counted by that name, and exported by it.
@jax.jit
def _hadamard(x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    """``x`` times the matrix of -1 and 1."""
    description = HadamardDescription(x.shape[-1])
    parts = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    parts = parts.reshape(*x.shape[:-1], description.order, description.power)
    return _outer_order(_sylvester(parts)).reshape(x.shape)


def _sylvester(x: Float[Array, "... power"]) -> Float[Array, "... power"]:
    """``x`` times Sylvester's matrix of -1 and 1, in log2(power) equal rounds of sums and differences.

    A round transforms the lowest bit of a number's place and makes it the highest, so that after the last
    round all bits are transformed and back (Pease). Equal rounds are one small program for any size.
    """

    def one_round(_, x):
        even, odd = x[..., ::2], x[..., 1::2]
        return jnp.concatenate([even + odd, even - odd], axis=-1)

    rounds = x.shape[-1].bit_length() - 1
    return jax.lax.fori_loop(0, rounds, one_round, x) if rounds else x


def _outer_order(x: Float[Array, "... order power"]) -> Float[Array, "... order power"]:
    """``x`` times Paley's matrix of -1 and 1 along its last axis but one, see `conference_matrix`."""
    order = x.shape[-2]
    if order == 1:
        return x
    codes = jnp.asarray(conference_matrix(order))
    upper, lower = jnp.split(x, 2, axis=-2)
    sums, differences = upper + lower, upper - lower
    outputs = [matadd(codes, sums, "xla") + differences, matadd(codes, differences, "xla") - sums]
    return jnp.concatenate(outputs, axis=-2)
