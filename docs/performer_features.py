"""The errors of Performer's two kinds of random features, as a table: `python docs/performer_features.py`."""

import itertools

import jax
import jax.numpy as jnp

from shiftaddvit_jax.nn.attention import DRAW_FEATURES, softmax_features

DRAWS, TOKENS = 32, 196
SIZES = tuple(itertools.product((32, 64), (110, 266)))  # head_dim, features


def root_mean_square_error(name: str, head_dim: int, features: int) -> list[float]:
    """Errors of attention weights relative to softmax's, one for each deviation of q and k."""

    def error(key, deviation):
        q, k = deviation * jax.random.normal(jax.random.key(0), (2, 1, 1, TOKENS, head_dim))
        exact = jax.nn.softmax(q @ k.swapaxes(-1, -2) / head_dim**0.5)
        projection = DRAW_FEATURES[name](key, features, head_dim)
        q, k = softmax_features(q, projection, (-1,)), softmax_features(k, projection, (-2, -1))
        estimate = q @ k.swapaxes(-1, -2)
        estimate /= jnp.sum(estimate, axis=-1, keepdims=True)
        return jnp.sum((estimate - exact) ** 2) / jnp.sum(exact**2)

    keys = jax.random.split(jax.random.key(1), DRAWS)
    over_draws = jax.jit(lambda deviation: jax.lax.map(lambda key: error(key, deviation), keys).mean() ** 0.5)
    return [float(over_draws(deviation)) for deviation in (0.5, 1.0, 1.5)]


if __name__ == "__main__":
    print(
        "| head_dim, features | gaussian: 0.5, 1, 1.5 | hadamard: 0.5, 1, 1.5 | ratios |\n|---|---|---|---|"
    )
    for head_dim, features in SIZES:
        errors = [root_mean_square_error(name, head_dim, features) for name in DRAW_FEATURES]
        ratios = [fixed / gaussian for gaussian, fixed in zip(*errors, strict=True)]
        columns = (", ".join(f"{value:.3f}" for value in column) for column in (*errors, ratios))
        print(f"| {head_dim}, {features} | {' | '.join(columns)} |", flush=True)
