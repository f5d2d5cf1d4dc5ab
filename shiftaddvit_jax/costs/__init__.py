"""What a model costs: operations, energy and bytes, counted and not measured."""

from shiftaddvit_jax.costs.counting import (
    Operations,
    Product,
    count_operations,
    count_products,
    sum_operations,
    trace_products,
    weight_bytes,
)
from shiftaddvit_jax.costs.energy import Cost, accelerator_cost, compute_energy
from shiftaddvit_jax.costs.report import cost_report, energy_savings, group_modules, sum_costs

__all__ = [
    "Cost",
    "Operations",
    "Product",
    "accelerator_cost",
    "compute_energy",
    "cost_report",
    "count_operations",
    "count_products",
    "energy_savings",
    "group_modules",
    "sum_costs",
    "sum_operations",
    "trace_products",
    "weight_bytes",
]
