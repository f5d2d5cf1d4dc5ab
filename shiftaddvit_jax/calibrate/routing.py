"""The router of a mixture, fitted so that the tokens that lose most go to the dense expert."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from shiftaddvit_jax.calibrate.fit import Layer, add_moments, fit_dense

# A router's probability scales what the expert puts out: all but so many tokens have one of at least 0.999.
UNSURE, SURE = 0.001, 7.0
FLOOR = 1e-12  # of a token's loss, below which a logarithm tells nothing

Pairs = Iterable[tuple[Float[Array, "tokens inputs"], Float[Array, "tokens outputs"]]]


def fit_mixture(
    pairs: Callable[[], Pairs], dense: Layer, shift: Layer, share: float
) -> tuple[dict[str, Layer], Float[np.ndarray, "outputs"]]:
    """A mixture of two fitted experts, and the mean square of what is missing from each of its outputs.

    The parameters are by the names of the mixture's modules. The router sends a ``share`` of the tokens to
    the shift expert: those that lose least there. It is the least-squares estimate, from a token, of the
    logarithm of what the shift expert loses of it more than the dense expert; its bias is the estimate's
    quantile.

    Args:
      pairs: returns what goes into the layer and what should come out, batch by batch; it is called thrice.
      dense: the dense expert's ``kernel`` and ``bias``.
      shift: the shift expert's.
      share: of the tokens, between 0 and 1.
    """
    losses = add_moments((x, jnp.log(_losses(x, wanted, dense, shift))[:, None]) for x, wanted in pairs())
    estimate = fit_dense(losses, np.zeros((len(losses.inputs), 1)))
    scores = np.concatenate([np.asarray(_apply(estimate, x))[:, 0] for x, _ in pairs()])
    ordered = np.sort(scores)
    place = round(share * (len(ordered) - 1))
    border = np.mean(ordered[place : place + 2])  # between two tokens, so that none is undecided
    sharpness = SURE / max(np.quantile(np.abs(scores - border), UNSURE), FLOOR)
    kernel, bias = estimate["kernel"] * sharpness, (estimate["bias"] - border) * sharpness
    router: Layer = {"kernel": np.pad(kernel, ((0, 0), (0, 1))), "bias": np.pad(bias, (0, 1))}
    router = {name: value.astype(np.float32) for name, value in router.items()}
    sums: Any = 0.0
    count = 0
    for x, wanted in pairs():
        sums = sums + np.asarray(_mixture_noise(x, wanted, dense, shift, router), np.float64)
        count += len(x)
    return {"router": router, "dense": dense, "shift": shift}, sums / count


@jax.jit
def _apply(layer, x):
    return jnp.matmul(x, layer["kernel"], precision="highest") + layer["bias"]


@jax.jit
def _losses(x, wanted, dense, shift):
    by_dense, by_shift = (jnp.mean(jnp.square(wanted - _apply(layer, x)), axis=1) for layer in (dense, shift))
    return jnp.maximum(by_shift - by_dense, FLOOR)


@jax.jit
def _mixture_noise(x, wanted, dense, shift, router):
    probabilities = jax.nn.softmax(_apply(router, x))
    by_dense = probabilities[:, :1] >= 0.5
    found = jnp.where(by_dense, _apply(dense, x), _apply(shift, x)) * jnp.max(
        probabilities, axis=1, keepdims=True
    )
    return jnp.sum(jnp.square(wanted - found), axis=0)
