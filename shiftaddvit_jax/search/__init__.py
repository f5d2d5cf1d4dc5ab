"""Which layer gets which primitive: a model's choices, searched within a budget of time or energy.

`design` says which configurations are run, `supernet` runs them all in one program, `effects` makes of their
logits what each choice adds, `knapsack` takes the best within a budget, and `run` does all of it.
"""

from shiftaddvit_jax.search.costs import Costs, energy_costs, parse_budget, read_costs
from shiftaddvit_jax.search.design import fewest_runs, make_design
from shiftaddvit_jax.search.effects import Effects
from shiftaddvit_jax.search.groups import group_layers
from shiftaddvit_jax.search.run import Found, make_loss, make_run, search

__all__ = [
    "Costs",
    "Effects",
    "Found",
    "energy_costs",
    "fewest_runs",
    "group_layers",
    "make_design",
    "make_loss",
    "make_run",
    "parse_budget",
    "read_costs",
    "search",
]
