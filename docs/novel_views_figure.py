"""The picture of a held-out view on the page about novel views, from a finished `shiftaddvit nvs demo`.

python docs/novel_views_figure.py runs/views docs/images/novel_views.png
"""

import sys
from pathlib import Path

from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.data.scenes import load_scene
from shiftaddvit_jax.novel_views import render_view
from shiftaddvit_jax.pictures.views import plot_views
from shiftaddvit_jax.views_demo import STAGES


def main(workdir, file):
    """Draw the first held-out view as each stage's model renders it."""
    scene = load_scene("analytic")
    index = scene.held_out[0]
    rendered = {}
    for name, _, _ in STAGES:
        model, variables, _ = load_model(Path(workdir) / name / "model")
        rendered[name] = render_view(model, variables, scene, scene.poses[index], count_tokens=True)
    bounds = scene.near, scene.far
    plot_views(scene.images[index] / 255, rendered, bounds, scene.depths[index], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
