"""What the pyramids, PVT and PVTv2, have in common."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

STAGES = 4
SIDES = (4, 8, 16, 32)  # side of a token in pixels, stage by stage
SR_RATIOS = (8, 4, 2, 1)


def stage_arguments(model: nn.Module, sides: Sequence[int], **block: Any) -> list[dict[str, Any]]:
    """For each stage of ``model``: its ``features``, its blocks' ``drop_path``, and their other arguments.

    Stochastic depth rises linearly from 0 at the first block to ``model.drop_path`` at the last. ``sides``
    are those of each stage's grid for images of the model's own size.
    """
    rates = np.split(np.linspace(0, model.drop_path, sum(model.depths)), np.cumsum(model.depths)[:-1])
    return [
        {
            "features": model.embed_dims[stage],
            "drop_path": tuple(float(rate) for rate in rates[stage]),
            "block": {
                "num_heads": model.num_heads[stage],
                "attention": model.attention[stage],
                "mlp": model.mlp[stage],
                "projections": model.projections[stage],
                "mlp_ratio": model.mlp_ratios[stage],
                "sr_ratio": model.sr_ratios[stage],
                "dropout": model.dropout,
                "layer_norm_eps": model.layer_norm_eps,
                "trained_grid": (sides[stage],) * 2,
                "primitives": model.primitives.inside(f"stage{stage + 1}"),
                **block,
            },
        }
        for stage in range(STAGES)
    ]


def check_size(model: nn.Module, shape: tuple[Any, ...], smallest: tuple[int, ...]) -> None:
    """Raise a ``ValueError`` for images smaller than a stage needs, in pixels a side.

    The batch in ``shape`` may be a symbol, as in a program that `jax.export` makes.
    """
    for kind, needed in zip(model.attention, smallest, strict=True):
        if min(shape[1:3]) < needed:
            raise ValueError(
                f"{model.variant} with attention {kind!r} needs images of at least {needed} x {needed} "
                f"pixels, got {shape[1]} x {shape[2]}"
            )


def reductions(model: nn.Module) -> tuple[int, ...]:
    """By how much each stage reduces the sides of its grid for keys and values."""
    return tuple(
        ratio if kind == "sra" else 1 for kind, ratio in zip(model.attention, model.sr_ratios, strict=True)
    )
