"""What each layer costs by its choice, and budgets of their sum."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from jaxtyping import Float, PyTree

from shiftaddvit_jax.calibrate.choice import energy
from shiftaddvit_jax.calibrate.convert import Latencies
from shiftaddvit_jax.costs.counting import count_products
from shiftaddvit_jax.names import LAYER_CHOICES, PAPER_LATENCIES, SHIFT_SHARE

# Units of a budget by how they are written: the unit that costs are in, and how many of it they are.
UNITS = {
    **{"us": ("ms", 1e-3), "ms": ("ms", 1.0), "s": ("ms", 1e3)},
    **{"nJ": ("uJ", 1e-3), "uJ": ("uJ", 1.0), "mJ": ("uJ", 1e3)},
}
WORDS = {"ms": "a time, such as 6ms", "uJ": "an energy, such as 120uJ"}


class Costs(NamedTuple):
    """Costs that add up over a model's layers.

    Attributes:
      unit: ``"ms"``, or ``"uJ"`` for the energy of an image's products on an accelerator in 45 nm CMOS.
      rest: of all that is not searched.
      layers: by the layer's path and choice.
    """

    unit: str
    rest: float
    layers: Mapping[str, Mapping[str, float]]

    def of(
        self, groups: Mapping[str, Sequence[str]], choices: Sequence[str]
    ) -> Float[np.ndarray, "factors choices"]:
        """The sums over the layers of each group.

        Raises:
          ValueError: a layer or a choice that there are no costs of.
        """
        for path in (path for paths in groups.values() for path in paths):
            for choice in choices:
                if choice not in self.layers.get(path, {}):
                    raise ValueError(
                        f"no latency of {path} as {choice}; measure this model: `shiftaddvit measure-latency "
                        "MODEL --choices --json FILE`"
                    )
        return np.array(
            [
                [sum(self.layers[path][choice] for path in paths) for choice in choices]
                for paths in groups.values()
            ]
        )

    def check_budget(
        self, budget: float, groups: Mapping[str, Sequence[str]], choices: Sequence[str]
    ) -> None:
        """Raise a ``ValueError`` if no configuration stays within a budget of the whole model."""
        least = self.rest + self.of(groups, choices).min(axis=1).sum()
        if not budget >= least:
            raise ValueError(
                f"a budget of {budget:.4g} {self.unit} is below the cheapest configuration's, {least:.4g}; "
                "raise it, or search other choices"
            )

    def latencies(self) -> Latencies:
        """Those of the dense and of the shift expert, by which `calibrate` lets mixtures share out tokens.

        Without a time of both for every layer, they are the paper's.
        """
        if self.unit != "ms" or not all({"dense", "shift"} <= found.keys() for found in self.layers.values()):
            return PAPER_LATENCIES
        return {path: (found["dense"], found["shift"]) for path, found in self.layers.items()}


def read_costs(file: str | Path) -> Costs:
    """The costs in a file of ``shiftaddvit measure-latency --choices --json``.

    Raises:
      ValueError: no such file, one of something else, or costs that are not positive and finite.
    """
    expected = "expected what `shiftaddvit measure-latency MODEL --choices --json FILE` writes"
    try:
        found = json.loads(Path(file).read_text())
        layers = {
            layer["name"]: {choice: float(cost) for choice, cost in layer["choices"].items()}
            for layer in found["layers"]
        }
        costs = Costs(found["unit"], float(found["rest"]), layers)
    except OSError as error:
        raise ValueError(f"no latencies in {file}: {error.strerror}; {expected}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} holds no latencies by choice; {expected}") from None
    if costs.unit not in WORDS:
        raise ValueError(f"{file} has the unit {costs.unit!r}; expected {' or '.join(WORDS)}")
    for path, choices in layers.items():
        for choice, cost in choices.items():
            if not (math.isfinite(cost) and cost > 0):
                raise ValueError(
                    f"{file}: {path} as {choice} takes {cost}; expected a positive, finite number"
                )
    if not (math.isfinite(costs.rest) and costs.rest >= 0):
        raise ValueError(f"{file}: the rest takes {costs.rest}; expected a finite number of at least 0")
    return costs


def energy_costs(model: nn.Module, variables: PyTree, paths: Sequence[str]) -> Costs:
    """Microjoules of each layer's products for one image, see `shiftaddvit_jax.calibrate.choice.energy`.

    Args:
      model: with dense linear layers.
      variables: its variables; shapes suffice.
      paths: of the layers.
    """
    products = dict.fromkeys(paths, 0.0)
    for product in count_products(model, variables):
        if product.module in products:
            products[product.module] += product.count
    layers = {
        path: {choice: energy(choice, count, model.primitives, SHIFT_SHARE) for choice in LAYER_CHOICES}
        for path, count in products.items()
    }
    return Costs("uJ", 0.0, layers)


def parse_budget(text: str, unit: str) -> float:
    """A budget such as ``6ms`` or ``120uJ``, in ``unit``.

    Raises:
      ValueError: what is no number with a unit, or a unit of something else.
    """
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([a-zA-Zµμ]+)\s*", text)
    name = re.sub("[µμ]", "u", found[2]) if found else ""
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if name not in UNITS or not (math.isfinite(number) and number > 0):
        raise ValueError(f"{text!r} is no budget; expected {WORDS[unit]}")
    measured, factor = UNITS[name]
    if measured != unit:
        why = "these costs are the accelerator's energy" if unit == "uJ" else "these costs are latencies"
        remedy = "; for a time, give --latencies FILE" if unit == "uJ" else ""
        raise ValueError(f"a budget of {text!r} is in another unit: {why}, so expected {WORDS[unit]}{remedy}")
    return number * factor
