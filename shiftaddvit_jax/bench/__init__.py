"""How fast models and kernels are on this machine."""

from shiftaddvit_jax.bench.latency import Latency, measure_choices, measure_latency, profile_latency
from shiftaddvit_jax.bench.models import bench_kernels, bench_model

__all__ = [
    "Latency",
    "bench_kernels",
    "bench_model",
    "measure_choices",
    "measure_latency",
    "profile_latency",
]
