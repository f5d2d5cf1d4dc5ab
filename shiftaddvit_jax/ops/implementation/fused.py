"""Several ops in one TVM kernel: a linear layer, a head, an MLP, a patch embedding or an attention.

Each function takes the kernel's description, the arrays that the description names, and the input ``x``. The
result equals what the same modules compute op by op.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_tvm.descriptions import (
    LANES,
    AttentionDescription,
    BinarySoftmaxDescription,
    HammingLinearDescription,
    HeadDescription,
    LinearDescription,
    MlpDescription,
    PatchEmbedDescription,
    SoftmaxAttentionDescription,
    joined,
    round_up,
)
from kernels_tvm.store import Kernel
from shiftaddvit_jax.ops.implementation.custom_call import call_kernel, on_gpu

Arrays = Mapping[str, Array]
_ATTENTIONS: dict[type[AttentionDescription], str] = {
    SoftmaxAttentionDescription: "softmax_attention",
    HammingLinearDescription: "hamming_linear",
    BinarySoftmaxDescription: "binary_softmax",
}


def fused_linear(
    linear: LinearDescription, arrays: Arrays, x: Float[Array, "*batch inputs"]
) -> Float[Array, "*batch outputs"]:
    """``x`` through a linear layer of any kind, float32."""
    rows = x.reshape(-1, linear.inputs)
    output = jax.ShapeDtypeStruct((rows.shape[0], linear.outputs), jnp.float32)
    (y,) = call_kernel(Kernel("linear", linear), [output], rows, *_in_order(linear, arrays))
    return y.reshape(*x.shape[:-1], linear.outputs)


def fused_head(
    head: HeadDescription, arrays: Arrays, x: Float[Array, "batch tokens channels"]
) -> Float[Array, "batch outputs"]:
    """The mean of the normalized tokens through a linear layer, float32."""
    output = jax.ShapeDtypeStruct((x.shape[0], head.projection.outputs), jnp.float32)
    (y,) = call_kernel(Kernel("head", head), [output], x, *_in_order(head, arrays))
    return y


def fused_mlp(
    mlp: MlpDescription, arrays: Arrays, x: Float[Array, "batch tokens channels"]
) -> Float[Array, "batch tokens channels"]:
    """Return x + mlp(norm(x)), float32."""
    output = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (y,) = call_kernel(Kernel("mlp", mlp), [output], x, *_in_order(mlp, arrays))
    return y


def fused_patch_embed(
    embed: PatchEmbedDescription, arrays: Arrays, x: Float[Array, "batch height width channels"]
) -> Float[Array, "batch rows columns features"]:
    """The tokens of a patch embedding, float32."""
    rows, columns = embed.grid
    output = jax.ShapeDtypeStruct((x.shape[0], rows * columns, embed.projection.outputs), jnp.float32)
    images = x.reshape(x.shape[0], -1)
    (y,) = call_kernel(Kernel("patch_embed", embed), [output], images, *_in_order(embed, arrays))
    return y.reshape(x.shape[0], rows, columns, -1)


def fused_attention(
    attention: AttentionDescription,
    arrays: Arrays,
    x: Float[Array, "batch tokens channels"],
) -> Float[Array, "batch tokens channels"]:
    """Return x + attention(norm(x)), float32."""
    output = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (y,) = call_kernel(
        Kernel(_ATTENTIONS[type(attention)], attention), [output], x, *_in_order(attention, arrays)
    )
    return y


def _in_order(description, arrays):
    """The arrays in the kernel's order, padded with zeros to the kernel's sizes."""
    ordered = {
        name: _padded(arrays[name], shape).astype(dtype) for name, shape, dtype in description.arguments()
    }
    if on_gpu():
        return list(ordered.values())
    numbers = [ordered.pop(name).astype(jnp.float32).ravel() for name in joined(description)[0]]
    together = [_padded(part, (round_up(part.size, LANES),)) for part in numbers]
    return [*ordered.values(), jnp.concatenate(together)]


def _padded(array, shape):
    missing = [(0, size - have) for size, have in zip(shape, array.shape, strict=True)]
    return jnp.pad(array, missing) if array.shape != shape else array
