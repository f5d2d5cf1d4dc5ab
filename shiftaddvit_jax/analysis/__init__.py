"""What a model costs, how fast it is, and pictures of what it does."""

from shiftaddvit_jax.analysis.bench import bench_kernels, bench_model
from shiftaddvit_jax.analysis.counting import (
    Operations,
    Product,
    count_operations,
    count_products,
    sum_operations,
    trace_products,
    weight_bytes,
)
from shiftaddvit_jax.analysis.energy import Cost, accelerator_cost, compute_energy
from shiftaddvit_jax.analysis.pictures import plot_bench, plot_confusions, plot_history
from shiftaddvit_jax.analysis.report import cost_report, energy_savings, group_modules, sum_costs

__all__ = [
    "Cost",
    "Operations",
    "Product",
    "accelerator_cost",
    "bench_kernels",
    "bench_model",
    "compute_energy",
    "cost_report",
    "count_operations",
    "count_products",
    "energy_savings",
    "group_modules",
    "plot_bench",
    "plot_confusions",
    "plot_history",
    "sum_costs",
    "sum_operations",
    "trace_products",
    "weight_bytes",
]
