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
from shiftaddvit_jax.analysis.pictures import plot_bench, plot_confusions, plot_history

__all__ = [
    "Operations",
    "Product",
    "bench_kernels",
    "bench_model",
    "count_operations",
    "count_products",
    "plot_bench",
    "plot_confusions",
    "plot_history",
    "sum_operations",
    "trace_products",
    "weight_bytes",
]
