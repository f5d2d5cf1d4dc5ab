"""What a study of robustness is of: perturbations, their distributions, points, and when they are enough."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from shiftaddvit_jax.names import PERTURBATIONS
from shiftaddvit_jax.qmc import Distribution
from shiftaddvit_jax.qmc.kernels import check_power_of_two
from shiftaddvit_jax.validation import check_choice

SIGNED = ("rotation", "shift", "hue")  # perturbations by numbers of either sign
FEWEST = 256  # evaluations, with which every rule starts
UNITS = {
    "rotation": "degrees",
    "scale": "factor",
    "shift": "share of the side",
    "blur": "pixels",
    "brightness": "factor",
    "contrast": "factor",
    "hue": "degrees",
    "noise": "standard deviation",
}
# By points: the rules that say when there are enough, and the randomizations; the default first.
RULES = {
    "digital_net": ("cone", "student"),
    "lattice": ("cone", "student"),
    "halton": ("student",),
    "iid": ("clt",),
}
RANDOMIZATIONS = {
    "digital_net": ("lms_shift", "shift", "nested"),
    "lattice": ("shift",),
    "halton": ("lms_permutation", "permutation", "lms_shift", "shift", "nested"),
    "iid": (),
}


class Parameter(NamedTuple):
    """One number of a perturbation.

    Attributes:
      name: a perturbation's, or for both coordinates of a shift "shift_x" and "shift_y".
      unit: what it is measured in.
      distribution: what it is drawn from.
    """

    name: str
    unit: str
    distribution: Distribution

    @property
    def is_periodic(self) -> bool:
        """Whether its distribution is uniform over whole turns."""
        low, high = self.distribution.parameters
        turns = self.unit == "degrees" and self.distribution.kind == "uniform"
        return turns and math.remainder(high - low, 360) == 0


@dataclass(frozen=True)
class Design:
    """Which perturbations, by which points, until when.

    Attributes:
      perturbations: names of `UNITS` with distributions, as in ``{"rotation": "uniform:-20:20"}``.
        Of a shift, both coordinates have the distribution, each by itself.
      tolerance: half-width of the bound at which mean accuracies and their difference are known well enough,
        in points (percent of the images).
      points: "digital_net", "lattice", "halton" or "iid".
      rule: when points are enough: "cone", "student" or "clt"; by default the first that the points have in
        `RULES`.
      randomization: of the points; by default the first that they have in `RANDOMIZATIONS`.
      alpha: order of digits' interlacing in a digital net or Halton points: above 1, of higher order.
      most: evaluations at most, a power of two.
      seed: of the points' randomization.

    Raises:
      ValueError: for what there is not, or does not fit.
    """

    perturbations: Mapping[str, str]
    tolerance: float = 0.5
    points: str = "digital_net"
    rule: str | None = None
    randomization: str | None = None
    alpha: int = 1
    most: int = 2**14
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field, and fill in what the points decide."""
        check_choice("points", self.points, RULES)
        for name, table in (("rule", RULES), ("randomization", RANDOMIZATIONS)):
            choices = table[self.points]
            if getattr(self, name) is None:
                object.__setattr__(self, name, choices[0] if choices else None)
            elif getattr(self, name) not in choices:
                raise ValueError(
                    f"{self.points} points have no {name} {getattr(self, name)!r}; "
                    f"theirs: {', '.join(choices) or 'none'}"
                )
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"tolerance must be a number of points above 0, got {self.tolerance}")
        if self.alpha < 1 or (self.alpha > 1 and self.points not in ("digital_net", "halton")):
            raise ValueError(
                f"alpha must be 1, or more with digital_net or halton, got {self.alpha} with {self.points}"
            )
        check_power_of_two(self.most)
        if self.most < FEWEST:
            raise ValueError(f"most must be at least the {FEWEST} evaluations of a start, got {self.most}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if not self.perturbations:
            raise ValueError(
                f"there is nothing to perturb by; give one or more of {', '.join(PERTURBATIONS)}"
            )
        for name, text in self.perturbations.items():
            check_choice("perturbation", name, PERTURBATIONS)
            reached = float(Distribution.parse(text).quantile(jnp.zeros(())))
            if (name == "scale" and reached <= 0) or (name not in SIGNED and reached < 0):
                wanted = "above 0" if name == "scale" else "from 0"
                raise ValueError(
                    f"{name} must be {wanted}, but {text} reaches {reached:.3g}; try {PERTURBATIONS[name][1]}"
                )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every number that is drawn, in the order of `UNITS`."""
        return tuple(
            Parameter(each, unit, Distribution.parse(self.perturbations[name]))
            for name, unit in UNITS.items()
            if name in self.perturbations
            for each in (("shift_x", "shift_y") if name == "shift" else (name,))
        )
