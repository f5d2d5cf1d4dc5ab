"""What a model costs, and pictures of what it does."""

from shiftaddvit_jax.analysis.cost import Operations, count_operations, packed_weight_bytes
from shiftaddvit_jax.analysis.pictures import plot_confusions, plot_history

__all__ = ["Operations", "count_operations", "packed_weight_bytes", "plot_confusions", "plot_history"]
