"""Kernel-based supervised hashing (KSH): codes whose inner products follow the attention's similarity.

Liu et al., "Supervised hashing with kernels" (CVPR 2012), as EcoFormer (arXiv 2209.09004) learns it for
attention: a Gaussian kernel against a few anchors, then one linear projection a bit, learned greedily.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from shiftaddvit_jax.ops.binarize import binarize
from shiftaddvit_jax.optional import require

LEARNING_RATE, MOMENTUM = 5e-4, 0.9  # the authors' settings
STEPS_PER_BIT = 100
SIMILAR_PAIRS = 10  # how many most similar and how many least similar tokens of a token the hash learns from


class KernelHash(NamedTuple):
    """A learned hash: all that `hash_codes` needs."""

    anchors: Float[Array, "heads anchors head_dim"]
    kernel_mean: Float[Array, "heads anchors"]
    projection: Float[Array, "heads bits anchors"]


def _kernel(x, anchors):
    # The bandwidth is each image's and head's own mean squared distance to the anchors.
    distance = _squared_distances(x, anchors)
    bandwidth = jnp.mean(distance, axis=(-2, -1), keepdims=True)
    positive = bandwidth > 0
    return jnp.exp(-distance / (2 * jnp.where(positive, bandwidth, 1)))


# The jit names these sums in the traced model: operations are counted by that name.
@jax.jit
def _squared_distances(x, anchors):
    return jnp.sum(jnp.square(x[..., :, None, :] - anchors[:, None, :, :]), axis=-1)


def _features(x, kernel_hash):
    return _kernel(x, kernel_hash.anchors) - kernel_hash.kernel_mean[:, None, :]


def hash_codes(
    x: Float[Array, "*batch heads tokens head_dim"], kernel_hash: KernelHash
) -> Float[Array, "*batch heads tokens bits"]:
    """Codes {0, 1}: the sign of the projected, centred kernel values, with `binarize`'s gradient to ``x``.

    The kernel's bandwidth is the mean squared distance between an image's tokens and the anchors, so
    codes do not depend on the other images of a batch.
    """
    projected = jnp.einsum("...hnm,hkm->...hnk", _features(x, kernel_hash), kernel_hash.projection)
    # XLA fuses the comparison with the projection; a kernel would read the projections again.
    return binarize(projected, "zero", implementation="xla")


@partial(jax.jit, static_argnames=("bits", "anchors"))
def learn_hash(
    key: PRNGKeyArray, x: Float[Array, "batch heads tokens head_dim"], bits: int = 16, anchors: int = 20
) -> KernelHash:
    """Learn a hash of tokens such as ``x``, bit after bit.

    Pairs of tokens with the largest inner products should get equal codes, pairs with the smallest opposite
    codes. Each bit's projection starts at random and is trained on what the earlier bits left unexplained, by
    a smooth surrogate of the binary loss. The trained projection replaces its start only where it lowers the
    binary loss itself.

    Args:
      key: random key for the anchors and for each projection's start.
      x: tokens, float32; the anchors are drawn from the tokens of all images.
      bits: code length.
      anchors: number of anchors.
    """
    require("train", "learning a hash", "optax")
    import optax

    batch, heads, tokens, head_dim = x.shape
    anchor_key, projection_key = jax.random.split(key)
    pool = x.transpose(0, 2, 1, 3).reshape(batch * tokens, heads, head_dim)
    chosen = jax.random.choice(anchor_key, batch * tokens, (anchors,), replace=batch * tokens < anchors)
    anchor_tokens = pool[chosen].transpose(1, 0, 2)
    kernel = _kernel(x, anchor_tokens)
    kernel_mean = jnp.mean(kernel, axis=(0, 2))
    features = kernel - kernel_mean[:, None, :]
    start = jax.random.normal(projection_key, (bits, heads, anchors), jnp.float32)
    optimizer = optax.sgd(LEARNING_RATE, momentum=MOMENTUM, nesterov=True)

    def loss(codes, residual):
        return -jnp.einsum("bhn,bhnl,bhl->", codes, residual, codes) / (batch * heads * tokens * bits)

    def project(projection):
        return jnp.einsum("bhnm,hm->bhn", features, projection)

    def surrogate(projection, residual):
        return loss(jnp.tanh(project(projection) / 2), residual)

    def signs(projection):
        return jnp.where(project(projection) > 0, 1.0, -1.0)

    def learn_bit(residual, first):
        def descend(_, carry):
            projection, state = carry
            gradient = jax.grad(surrogate)(projection, residual)
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(projection, updates), state

        last, _ = jax.lax.fori_loop(0, STEPS_PER_BIT, descend, (first, optimizer.init(first)))
        better = loss(signs(last), residual) < loss(signs(first), residual)
        projection = jnp.where(better, last, first)
        codes = signs(projection)
        return residual - codes[..., :, None] * codes[..., None, :], projection

    _, projections = jax.lax.scan(learn_bit, bits * _similarity(x), start)
    return KernelHash(anchor_tokens, kernel_mean, projections.transpose(1, 0, 2))


def _similarity(x):
    """+1 for a token's most similar tokens, -1 for its least similar, else 0."""
    tokens = x.shape[-2]
    pairs = max(1, min(SIMILAR_PAIRS, tokens // 2))
    products = jnp.einsum("...nd,...md->...nm", x, x)
    rank = jnp.argsort(jnp.argsort(products, axis=-1), axis=-1)
    return jnp.where(rank >= tokens - pairs, 1.0, 0.0) - jnp.where(rank < pairs, 1.0, 0.0)
