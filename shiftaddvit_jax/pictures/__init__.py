"""Pictures of what training did, of what a model costs, what happens inside it, and how two differ.

Each function ``plot_...`` draws one figure and returns it. With a ``path``, a PNG or SVG by its ending, it
also writes the figure there.
"""

from shiftaddvit_jax.optional import require

require("plot", "drawing")

from shiftaddvit_jax.pictures.capture import attention_maps, routed_tokens, shift_weights
from shiftaddvit_jax.pictures.comparison import plot_worst
from shiftaddvit_jax.pictures.costs import (
    plot_bench,
    plot_energy,
    plot_expert_latency,
    plot_front,
    plot_latency,
    plot_pareto,
)
from shiftaddvit_jax.pictures.inside import plot_attention, plot_routing, plot_weights
from shiftaddvit_jax.pictures.training import plot_confusions, plot_history, plot_routing_history

__all__ = [
    "attention_maps",
    "plot_attention",
    "plot_bench",
    "plot_confusions",
    "plot_energy",
    "plot_expert_latency",
    "plot_front",
    "plot_history",
    "plot_latency",
    "plot_pareto",
    "plot_routing",
    "plot_routing_history",
    "plot_weights",
    "plot_worst",
    "routed_tokens",
    "shift_weights",
]
