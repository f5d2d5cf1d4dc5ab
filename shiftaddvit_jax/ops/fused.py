"""Several ops in one TVM kernel: a linear layer, an MLP, an attention, each with all that it reads once.

Each takes the kernel's description, the arrays that the description asks for by name, and returns what the
same modules compute op by op.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


from kernels_tvm.library import Kernel, host_target, thread_count

from kernels_tvm.descriptions import HammingLinear, Linear, Mlp
from shiftaddvit_jax.ops.custom_call import call_kernel

Arrays = Mapping[str, Array]


def fused_linear(linear: Linear, arrays: Arrays, x: Float[Array, "*batch inputs"]) -> Array:
    """``x`` through a linear layer of any kind, float32."""
    rows = x.reshape(-1, linear.inputs)
    output = jax.ShapeDtypeStruct((rows.shape[0], linear.outputs), jnp.float32)
    (y,) = call_kernel(Kernel("linear", linear), [output], rows, *_in_order(linear, arrays))
    return y.reshape(*x.shape[:-1], linear.outputs)


def fused_mlp(mlp: Mlp, arrays: Arrays, x: Float[Array, "batch tokens channels"]) -> Array:
    """x + mlp(norm(x)), float32."""
    output = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (y,) = call_kernel(Kernel("mlp", mlp), [output], x, *_in_order(mlp, arrays))
    return y


def fused_hamming_linear(
    attention: HammingLinear, arrays: Arrays, x: Float[Array, "batch tokens channels"]
) -> Array:
    """x + attention(norm(x)), float32."""
    between = attention.scratch(host_target(), thread_count())
    outputs = [jax.ShapeDtypeStruct((x.shape[0], *shape), jnp.float32) for _, shape in between]
    outputs.append(jax.ShapeDtypeStruct(x.shape, jnp.float32))
    *_, y = call_kernel(Kernel("hamming_linear", attention), outputs, x, *_in_order(attention, arrays))
    return y


def _in_order(description, arrays):
    """The arrays as the kernel takes them, padded with zeros to the sizes that it asks for."""
    ordered = []
    for name, shape, dtype in description.arguments():
        array = arrays[name]
        missing = [(0, size - have) for size, have in zip(shape, array.shape, strict=True)]
        ordered.append(jnp.pad(array, missing).astype(dtype) if array.shape != shape else array.astype(dtype))
    return ordered
