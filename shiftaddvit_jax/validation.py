"""One-line errors for wrong input; every floor may use them."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # help does not wait for it
    from jaxtyping import Array, Float


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ``ValueError`` that names the nearest known choice unless ``value`` is one of ``choices``."""
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    raise ValueError(f"unknown {what} {value!r}; {hint}")


def check_head(model: Any) -> None:
    """Raise a ``ValueError`` unless ``model`` has a head, and so classes."""
    if not model.num_classes:
        raise ValueError(
            f"this {model.variant} has no head, and so no classes; give num_classes, or a head by "
            "shiftaddvit_jax.replace_head(model, variables, num_classes)"
        )


def check_images(images: "Float[Array, 'batch height width 3']") -> None:
    """Raise a ``ValueError`` unless ``images`` is a batch of floating-point images with three channels."""
    import jax.numpy as jnp  # a second, which help does not wait for

    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [batch, height, width, 3], got shape {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating-point numbers, got {images.dtype}; make each of them with "
            "shiftaddvit_jax.data.preprocess(image, shiftaddvit_jax.models.model_preprocessing(model))"
        )
