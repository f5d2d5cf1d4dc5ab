"""How much worse models get when images are perturbed: means with error bounds, and what costs most."""

from shiftaddvit_jax.robustness.design import Design
from shiftaddvit_jax.robustness.study import (
    Estimate,
    Means,
    Robustness,
    Scorer,
    mean_scores,
    measure_robustness,
)
from shiftaddvit_jax.robustness.surrogate import Surrogate, fit_surrogate

__all__ = [
    "Design",
    "Estimate",
    "Means",
    "Robustness",
    "Scorer",
    "Surrogate",
    "fit_surrogate",
    "mean_scores",
    "measure_robustness",
]
