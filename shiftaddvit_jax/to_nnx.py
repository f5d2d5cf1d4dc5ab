"""Models as modules of Flax NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.bridge.variables import linen_vars_to_nnx_attrs
from jaxtyping import PyTree


def to_nnx(model: nn.Module, variables: PyTree, rngs: nnx.Rngs | None = None) -> nnx.bridge.ToNNX:
    """A module of Flax NNX that computes what ``model`` does, and holds ``variables``.

    Called with images, and ``train`` if need be, it returns the logits of ``model.apply``; its ``features``
    are the model's. Parameters are ``nnx.Param`` under the model's own names, and other collections are
    variables of types of their own, such as ``hash``, which ``nnx.grad`` leaves alone.

    Example::

      >>> import jax.numpy as jnp
      >>> import shiftaddvit_jax as sav
      >>> from flax import nnx
      >>> model = sav.create_model("pvt_v2_nano", num_classes=10, drop_path=0.1)
      >>> module = sav.to_nnx(model, sav.init_variables(model, nnx.Rngs(0)()), nnx.Rngs(dropout=1))
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> @nnx.jit
      ... def logits_and_gradient(module, images):
      ...     gradient = nnx.grad(lambda module: module(images, train=True).sum())(module)
      ...     return module(images), gradient
      >>> logits, gradient = logits_and_gradient(module, images)
      >>> logits.shape, gradient["head"]["kernel"].shape
      ((2, 10), (96, 10))

    Args:
      model: from `create_model` or `reparameterize`.
      variables: its variables; packed ones are for inference alone.
      rngs: the streams ``dropout`` and ``router``, for calls with ``train=True``; a call may bring its own
        as ``rngs``.
    """
    module = nnx.bridge.ToNNX(model, rngs)
    for name, value in linen_vars_to_nnx_attrs(jax.tree.map(jnp.asarray, variables)).items():
        setattr(module, name, nnx.data(value))
    return module
