"""The paper's second task: a model that renders novel views becomes a ShiftAddViT, stage by stage."""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.command import print_table, program, table_console
from shiftaddvit_jax.costs import cost_report
from shiftaddvit_jax.data.scenes import Scene, load_scene
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.models import create_model
from shiftaddvit_jax.novel_views import (
    fit_plane,
    mean_of_views,
    render_held_out,
    score_view,
    warp_by_depth,
    warp_by_plane,
)
from shiftaddvit_jax.pictures.views import write_views_page
from shiftaddvit_jax.train import train_and_evaluate
from shiftaddvit_jax.train.views import scene_config

if TYPE_CHECKING:
    import ml_collections

logger = logging.getLogger(__name__)

FINETUNE_STEPS, FINETUNE_WARMUP = 300, 20
# Each stage's name, the stage that its model starts from, and its changes to the config's model.
STAGES = (
    ("dense", None, {}),
    ("add_attention", "dense", {"attention": "hamming_linear"}),
    ("shift", "add_attention", {"attention": "hamming_linear", "mlp": "shift", "projections": "shift"}),
    ("moe", "add_attention", {"attention": "hamming_linear", "mlp": "moe", "projections": "shift"}),
)
COLUMNS = ("view by", "PSNR", "SSIM", "FLIP", "multiplications", "energy", "tokens on shift")


def stage_config(
    workdir: Path,
    stage: str,
    *,
    scene: str = "analytic",
    longest_side: int | None = None,
    near: float | None = None,
    far: float | None = None,
    seed: int = 0,
    steps_scale: float = 1.0,
) -> "ml_collections.ConfigDict":
    """The config of one of the demo's stages; ``steps_scale`` shortens or lengthens its training."""
    teacher, kinds = next((teacher, kinds) for name, teacher, kinds in STAGES if name == stage)
    config = scene_config(scene)
    config.seed = seed
    config.model.update(kinds)
    config.data.image_size = longest_side
    config.data.near, config.data.far = near or 0.0, far or 0.0
    if teacher is not None:
        config.init_from = str(workdir / teacher / "model")
        config.train.steps, config.train.warmup_steps = FINETUNE_STEPS, FINETUNE_WARMUP
    if "moe" in kinds.values():
        # Routers begin undecided, and in a few hundred steps must learn to be sure.
        config.train.rates = (("*/router/*", 10.0),)
    config.train.steps = max(1, round(config.train.steps * steps_scale))
    config.train.evaluate_every = config.train.steps
    config.train.checkpoint_every = 100
    return config


def run_views_demo(
    workdir: str | Path,
    *,
    scene: str = "analytic",
    longest_side: int | None = None,
    near: float | None = None,
    far: float | None = None,
    seed: int = 0,
    steps_scale: float = 1.0,
) -> dict[str, Any]:
    """Train GNT-nano on a scene, reparameterize it, and compare on held-out views; all files in ``workdir``.

    The files: one folder a stage (see `train_and_evaluate`), ``report.json`` and ``views.html``. A run that
    was stopped resumes.

    Returns:
      The report: ``rows``, each with ``name``, ``psnr`` (dB), ``ssim`` and ``flip``, means over the held-out
      views, and of models ``macs``, ``shifts``, ``adds`` and ``energy_mj`` (by energy model), of one ray
      without the photographs' features, and ``shift_share``; ``seed``, ``scene`` and
      ``seconds``.
    """
    workdir = Path(workdir).absolute()
    start = time.perf_counter()
    taken = {"longest_side": longest_side, "near": near, "far": far}
    data = load_scene(scene, **taken)
    rendered: dict[str, dict[int, Any]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for number, (name, teacher, _) in enumerate(STAGES, 1):
        origin = f", from {teacher}" if teacher else ""
        logger.info("[%d/%d] %s%s", number, len(STAGES), name, origin)
        settings = {"scene": scene, **taken, "seed": seed, "steps_scale": steps_scale}
        metrics = train_and_evaluate(stage_config(workdir, name, **settings), workdir / name)
        logger.info("      PSNR %.2f dB on the held-out views", metrics["psnr"])
        model, variables, _ = load_model(workdir / name / "model")
        rendered[name] = dict(render_held_out(model, variables, data, count_tokens=True))
        costs[name] = _costs(model, variables, metrics["shift_share"])
    rows = [*_without_a_model(data)]
    for name, found in rendered.items():
        scores = _scores(data, {index: view.colours for index, view in found.items()})
        rows.append({"name": name, **scores, **costs[name]})
    report = {"seed": seed, "scene": scene, "rows": rows, "seconds": time.perf_counter() - start}
    write_json(workdir / "report.json", report)
    views = {
        data.names[index]: {
            "true": data.images[index] / 255,
            "rendered": {name: found[index] for name, found in rendered.items()},
            "bounds": (data.near, data.far),
            "depth": None if data.depths is None else data.depths[index],
        }
        for index in data.held_out
    }
    about = (
        f"GNT-nano on the scene {scene}: {len(data.training)} photographs for training, "
        f"{len(data.held_out)} held out. Multiplications and energy are those of one ray."
    )
    table = [_cells(row) for row in rows]
    write_views_page(workdir / "views.html", "Novel views, in shifts and adds", about, COLUMNS, table, views)
    return report


def _costs(model, variables, shift_share):
    costs = cost_report(model, variables, shift_share=shift_share)
    names = ("macs", "shifts", "adds", "energy_mj")
    share = shift_share.values()
    return {name: costs[name] for name in names} | {
        "shift_share": float(np.mean(list(share))) if share else None
    }


def _without_a_model(scene: Scene):
    """The rows of the floors, and of the ceiling where depths are known."""
    views, plane = create_model("gnt_nano").views, fit_plane(scene)
    made = {
        "mean of photographs": lambda index: mean_of_views(scene, index, views),
        "nearest, warped by a plane": lambda index: warp_by_plane(scene, index, plane),
    }
    if scene.depths is not None:
        made["warped by true depth"] = lambda index: warp_by_depth(scene, index, views)
    for name, make in made.items():
        yield {"name": name, **_scores(scene, {index: make(index) for index in scene.held_out})}


def _scores(scene, views):
    """Means over views of what `score_view` returns."""
    scores = [score_view(view, scene.images[index] / 255) for index, view in views.items()]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _cells(row):
    macs, share = row.get("macs"), row.get("shift_share")
    return [
        row["name"],
        f"{row['psnr']:.2f} dB",
        f"{row['ssim']:.3f}",
        f"{row['flip']:.3f}",
        "-" if macs is None else f"{macs / 1e6:.2f} M",
        "-" if macs is None else f"{1e3 * row['energy_mj']['accelerator']:.2f} µJ",
        "-" if share is None else f"{share:.1%}",
    ]


def print_report(report: dict[str, Any], workdir: Path) -> None:
    """The report as a table, and what to run next."""
    table = Table(title="Held-out views; costs of one ray")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left")
    for row in report["rows"]:
        table.add_row(*_cells(row))
    print_table(table)
    table_console().print(
        f"Took {report['seconds']:.0f} s. Page with the views: {workdir / 'views.html'}\n"
        f"Next: {program()} nvs render {workdir}/moe/model --scene {report['scene']} --output view.gif",
        highlight=False,
        soft_wrap=True,
    )
