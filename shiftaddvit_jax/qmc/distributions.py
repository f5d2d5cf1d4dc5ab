"""Distributions as a person writes them, and samples of several at once, for sweeps and studies."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float32

from shiftaddvit_jax.qmc.kernels import check_power_of_two
from shiftaddvit_jax.qmc.points import BELOW_ONE, halton, lattice, sobol
from shiftaddvit_jax.validation import check_choice


def _uniform(u, low, high):
    return low + (high - low) * u


def _normal(u, mean, deviation):
    return mean + deviation * ndtri(jnp.clip(u, 2**-25, BELOW_ONE))  # finite at 0, the first of plain points


class _Kind(NamedTuple):
    quantile: Callable
    example: str
    fits: Callable[[float, float], bool]
    wanted: str


_KINDS = {
    "uniform": _Kind(_uniform, "uniform:-20:20", lambda low, high: low < high, "a low and a higher end"),
    "loguniform": _Kind(
        lambda u, low, high: jnp.exp(_uniform(u, math.log(low), math.log(high))),
        "loguniform:1e-4:1e-2",
        lambda low, high: 0 < low < high,
        "a positive low and a higher end",
    ),
    "normal": _Kind(
        _normal,
        "normal:0:1",
        lambda mean, deviation: deviation > 0,
        "a mean and a positive standard deviation",
    ),
    "lognormal": _Kind(
        lambda u, mean, deviation: jnp.exp(_normal(u, mean, deviation)),
        "lognormal:0:0.1",
        lambda mean, deviation: deviation > 0,
        "the logarithm's mean and positive standard deviation",
    ),
}


class Distribution(NamedTuple):
    """A distribution of one number.

    Attributes:
      kind: "uniform" or "loguniform", between two ends; "normal", by mean and standard deviation, or
        "lognormal", by those of the logarithm.
      parameters: two numbers.
    """

    kind: str
    parameters: tuple[float, float]

    @classmethod
    def parse(cls, text: str) -> "Distribution":
        """A distribution from its text, such as ``uniform:-20:20`` or ``lognormal:0:0.1``.

        Raises:
          ValueError: for what is none, with an example.
        """
        kind, *numbers = text.split(":")
        if kind not in _KINDS or len(numbers) != 2:
            examples = ", ".join(known.example for known in _KINDS.values())
            raise ValueError(f"{text!r} is no distribution; write one as in {examples}")
        try:
            first, second = map(float, numbers)
        except ValueError:
            first = second = math.nan
        known = _KINDS[kind]
        if not (math.isfinite(first) and math.isfinite(second) and known.fits(first, second)):
            raise ValueError(f"{text!r} is no distribution; {kind} takes {known.wanted}: {known.example}")
        return cls(kind, (first, second))

    def quantile(self, u: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """The inverse of the distribution function, which makes uniform points in ``[0, 1)`` its own."""
        return _KINDS[self.kind].quantile(u, *self.parameters)


POINTS = {"digital_net": sobol, "lattice": lattice, "halton": halton}


def sample(
    distributions: Sequence[str], count: int, points: str = "halton", seed: int = 0
) -> Float32[Array, "{count} dimensions"]:
    """Points that are spread evenly over independent distributions, one for each column.

    Args:
      distributions: as in ``["uniform:-20:20", "loguniform:1e-4:1e-2"]``, at most 64.
      count: how many points: any number of Halton or iid points, a power of two of the others.
      points: "digital_net", "lattice", "halton", or "iid" for independent random points.
      seed: of the randomization; the same seed gives the same points.

    Raises:
      ValueError: for a distribution, a number or a kind of points that there is not.
    """
    check_choice("points", points, (*POINTS, "iid"))
    columns = [Distribution.parse(text) for text in distributions]
    key = jax.random.key(seed)
    if points == "iid":
        unit = jax.random.uniform(key, (count, len(columns)), jnp.float32)
    else:
        if points != "halton":
            check_power_of_two(count)
        unit = POINTS[points](len(columns)).randomize(key).points(count)
    return jnp.stack([column.quantile(unit[:, i]) for i, column in enumerate(columns)], axis=-1)
