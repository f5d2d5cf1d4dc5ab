"""Division by a norm, safe at zero."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def l2_normalize(x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """``x`` over its Euclidean norm along the last axis; zeros stay zero, and so does their gradient."""
    square = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    # Below this the square of a float32 has underflowed and its root has no finite derivative.
    positive = square > 1e-30
    inverse = jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, square, 1)), 0)
    return (x * inverse).astype(x.dtype)
