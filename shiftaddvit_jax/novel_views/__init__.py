"""Novel views of a scene: rendering, scores, and what they are compared with."""

from shiftaddvit_jax.novel_views.baselines import fit_plane, mean_of_views, warp_by_depth, warp_by_plane
from shiftaddvit_jax.novel_views.metrics import score_view
from shiftaddvit_jax.novel_views.paths import circle_path, read_path, spiral_path
from shiftaddvit_jax.novel_views.perceptual import Lpips, load_lpips
from shiftaddvit_jax.novel_views.render import Rendered, render_held_out, render_view, sample_rays

__all__ = [
    "Lpips",
    "Rendered",
    "circle_path",
    "fit_plane",
    "load_lpips",
    "mean_of_views",
    "read_path",
    "render_held_out",
    "render_view",
    "sample_rays",
    "score_view",
    "spiral_path",
    "warp_by_depth",
    "warp_by_plane",
]
