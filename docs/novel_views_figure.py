"""The pictures of novel views in README and docs, from a finished `shiftaddvit nvs demo`.

python docs/novel_views_figure.py runs/views docs/images
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.data.scenes import load_scene
from shiftaddvit_jax.novel_views import circle_path, render_view
from shiftaddvit_jax.novel_views.video import write_frames
from shiftaddvit_jax.pictures.style import save_figure
from shiftaddvit_jax.pictures.views import plot_views
from shiftaddvit_jax.views_demo import STAGES

TITLES = {"dense": "dense", "add_attention": "additive attention", "shift": "shifts", "moe": "mixtures"}
FRAMES, FRAMES_PER_SECOND = 20, 8


def main(workdir, folder):
    """The first held-out view by each stage's model, in full and in a row; the mixture along a circle."""
    scene, folder = load_scene("analytic"), Path(folder)
    index = scene.held_out[0]
    models = {name: load_model(Path(workdir) / name / "model")[:2] for name, _, _ in STAGES}
    rendered = {
        name: render_view(*pair, scene, scene.poses[index], count_tokens=True)
        for name, pair in models.items()
    }
    bounds = scene.near, scene.far
    true = scene.images[index] / 255
    plot_views(true, rendered, bounds, scene.depths[index], folder / "novel_views.png")
    row = {"photograph": true} | {TITLES[name]: view.colours for name, view in rendered.items()}
    figure = Figure(figsize=(9, 2.1), layout="constrained")
    for panel, (title, view) in zip(figure.subplots(1, len(row)), row.items(), strict=True):
        panel.imshow(view)
        panel.set_title(title, fontsize=10)
        panel.set_axis_off()
    save_figure(figure, folder / "novel_views_row.png")
    frames = (render_view(*models["moe"], scene, pose).colours for pose in circle_path(scene, FRAMES))
    write_frames(frames, folder / "novel_views_circle.gif", FRAMES_PER_SECOND)


if __name__ == "__main__":
    main(*sys.argv[1:])
