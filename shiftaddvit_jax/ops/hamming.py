"""Products of binary codes: XOR and popcount for codes packed as bits."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from kernels_tvm.descriptions import HammingProductDescription
from kernels_tvm.store import Kernel
from shiftaddvit_jax.ops.binarize import Threshold, binarize, pack_codes
from shiftaddvit_jax.ops.implementation import Implementation, float32_only, run_op
from shiftaddvit_jax.ops.implementation.custom_call import call_kernel


def hamming_product(
    queries: UInt32[Array, "*batch rows words"],
    keys: UInt32[Array, "*batch others words"],
    length: int,
    implementation: Implementation = None,
) -> Int32[Array, "*batch rows others"]:
    """Inner products of codes of -1 and 1 that `pack_codes` packed: length - 2 * their Hamming distance.

    Raises:
      ValueError: shapes that do not fit each other or the length of a code.
    """
    words = -(-length // 32)
    if queries.shape[:-2] != keys.shape[:-2] or queries.shape[-1] != words or keys.shape[-1] != words:
        raise ValueError(
            f"hamming_product of codes of length {length} expects [..., rows, {words}] and [..., others, "
            f"{words}], got {queries.shape} and {keys.shape}"
        )

    def reference(queries, keys):
        differ = queries[..., :, None, :] ^ keys[..., None, :, :]
        return length - 2 * jnp.sum(jax.lax.population_count(differ), axis=-1, dtype=jnp.int32)

    def kernel(queries, keys):
        *batch, rows, _ = queries.shape
        others, count = keys.shape[-2], math.prod(batch)
        queries, keys = queries.reshape(count, rows, words), keys.reshape(count, others, words)
        output = jax.ShapeDtypeStruct((count, rows, others), jnp.int32)
        product = Kernel("hamming_product", HammingProductDescription(length))
        # The kernel compares a query with many keys at once.
        (y,) = call_kernel(product, [output], queries, keys.swapaxes(1, 2), batched=2)
        return y.reshape(*batch, rows, others)

    return run_op("hamming_product", implementation, kernel, reference, queries, keys)


def code_similarity(
    queries: Float[Array, "*batch rows head_dim"],
    keys: Float[Array, "*batch others head_dim"],
    threshold: Threshold = "sample",
    implementation: Implementation = None,
) -> Float[Array, "*batch rows others"]:
    """Inner products of the codes -1 and 1 of queries and keys, with `binarize`'s gradient to both.

    XLA multiplies the codes as numbers; the kernels pack them as bits and count where they differ.

    Raises:
      ValueError: as `binarize`.
    """

    def reference(queries, keys):
        queries, keys = (binarize(x, threshold, (-1, 1), "xla") for x in (queries, keys))
        return _code_product(queries, keys)

    def kernel(queries, keys):
        queries_, keys_ = (pack_codes(x, threshold, implementation) for x in (queries, keys))
        return hamming_product(queries_, keys_, queries.shape[-1], implementation).astype(queries.dtype)

    reason = "a threshold of the whole batch has no kernel" if threshold == "tensor" else None
    unsupported = reason or float32_only(queries, keys)
    return run_op(
        "code_similarity", implementation, kernel, reference, queries, keys, unsupported=unsupported
    )


# The jit names this product in the traced model: operations are counted by that name.
@jax.jit
def _code_product(queries, keys):
    return jnp.matmul(queries, keys.swapaxes(-1, -2))
