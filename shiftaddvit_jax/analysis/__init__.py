"""What a model costs, how fast it is, and pictures of what it does."""

from shiftaddvit_jax.analysis.bench import bench_kernels, bench_model
from shiftaddvit_jax.analysis.cost import Operations, count_operations, packed_weight_bytes
from shiftaddvit_jax.analysis.pictures import plot_bench, plot_confusions, plot_history

__all__ = [
    "Operations",
    "bench_kernels",
    "bench_model",
    "count_operations",
    "packed_weight_bytes",
    "plot_bench",
    "plot_confusions",
    "plot_history",
]
