"""Pictures of what training did, of what a model costs, and of what happens inside it.

Each function draws one figure and writes it to ``path``, a PNG or SVG by its ending, or nowhere where that is
None; it returns the figure.
"""

from shiftaddvit_jax.analysis.pictures.costs import (
    ENERGY_TITLES,
    plot_bench,
    plot_energy,
    plot_expert_latency,
    plot_latency,
    plot_pareto,
)
from shiftaddvit_jax.analysis.pictures.inside import plot_attention, plot_routing, plot_weights
from shiftaddvit_jax.analysis.pictures.style import check_picture, render_figure, save_figure
from shiftaddvit_jax.analysis.pictures.training import plot_confusions, plot_history, plot_routing_history

__all__ = [
    "ENERGY_TITLES",
    "check_picture",
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
    "render_figure",
    "save_figure",
]
