"""All that one forward pass of a model offers a loss."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Outputs(NamedTuple):
    """What ``model.apply(variables, images, train, method="outputs")`` returns, for any model.

    Attributes:
      logits: as the model's call returns them.
      heads: each head's own logits, float32: those of the one head, or in distilled DeiT the class head's and
        the distillation head's, whose mean ``logits`` are.
      features: as the model's method ``features`` returns them.
    """

    logits: Float[Array, "batch classes"]
    heads: tuple[Float[Array, "batch classes"], ...]
    features: tuple[Float[Array, "batch _rows _columns _channels"], ...]
