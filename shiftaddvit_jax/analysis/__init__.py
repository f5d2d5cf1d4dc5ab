"""What a model costs, how fast it is, and pictures of what it does."""

from shiftaddvit_jax.analysis.bench import bench_kernels, bench_model
from shiftaddvit_jax.analysis.capture import attention_maps, routed_tokens, shift_weights
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
from shiftaddvit_jax.analysis.latency import Latency, measure_latency, profile_latency
from shiftaddvit_jax.analysis.pictures import (
    plot_attention,
    plot_bench,
    plot_confusions,
    plot_energy,
    plot_expert_latency,
    plot_history,
    plot_latency,
    plot_pareto,
    plot_routing,
    plot_routing_history,
    plot_weights,
)
from shiftaddvit_jax.analysis.report import cost_report, energy_savings, group_modules, sum_costs

__all__ = [
    "Cost",
    "Latency",
    "Operations",
    "Product",
    "accelerator_cost",
    "attention_maps",
    "bench_kernels",
    "bench_model",
    "compute_energy",
    "cost_report",
    "count_operations",
    "count_products",
    "energy_savings",
    "group_modules",
    "measure_latency",
    "plot_attention",
    "plot_bench",
    "plot_confusions",
    "plot_energy",
    "plot_expert_latency",
    "plot_history",
    "plot_latency",
    "plot_pareto",
    "plot_routing",
    "plot_routing_history",
    "plot_weights",
    "profile_latency",
    "routed_tokens",
    "shift_weights",
    "sum_costs",
    "sum_operations",
    "trace_products",
    "weight_bytes",
]
