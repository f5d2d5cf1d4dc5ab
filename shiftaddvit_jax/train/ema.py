"""An exponential moving average of parameters, which often scores better than the parameters themselves."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


def ema_decay(
    updates: int | Int[Array, ""], decay: float = 0.9999, *, warmup: bool = False, power: float = 2 / 3
) -> Float[Array, ""]:
    """What the average keeps of itself at the optimizer's update number ``updates``, counted from 1.

    The formula is that of ``timm.utils.ModelEmaV3`` (timm 1.0.31): 0 at the first update, which copies the
    parameters; then ``decay``, or with ``warmup`` min(``decay``, 1 - n ** -``power``) at update n.
    """
    kept = jnp.minimum(decay, 1 - jnp.maximum(updates, 1.0) ** -power) if warmup else jnp.float32(decay)
    return jnp.where(updates <= 1, 0.0, kept)


def update_ema(average: PyTree, params: PyTree, decay: float | Float[Array, ""]) -> PyTree:
    """``decay`` of ``average`` and the rest of ``params``, leaf by leaf."""
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, params)
