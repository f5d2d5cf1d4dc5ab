"""The commands of novel view synthesis: a demo, training on a scene, scores and videos."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from shiftaddvit_jax.cli.arguments import Commands, add_command, add_json, present
from shiftaddvit_jax.cli.convert import (
    add_conversion,
    conversion_figures,
    conversion_settings,
    print_layers,
)
from shiftaddvit_jax.command import program
from shiftaddvit_jax.optional import require


def add_nvs(commands: Commands) -> None:
    """Add ``nvs`` and its own commands."""
    command = add_command(
        commands,
        "nvs",
        None,
        "Novel views of a scene from photographs: demo, train, convert, eval, render.",
        "nvs demo",
        "nvs eval runs/views/moe --scene analytic",
    )
    inner = command.add_subparsers(dest="nvs_command", required=True, metavar="COMMAND")
    shown = add_command(
        inner,
        "demo",
        demo,
        "On an analytic scene: train GNT-nano, reparameterize it, compare (minutes).",
        "nvs demo",
        "nvs demo --scene scenes/fern --longest-side 200 --workdir runs/fern",
    )
    shown.add_argument("--workdir", default="runs/views", metavar="DIR", help="default: %(default)s")
    _add_scene(shown, default="analytic")
    shown.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")

    trained = add_command(
        inner,
        "train",
        train,
        "Train a model on a scene; run again to resume, see also `shiftaddvit train`.",
        "nvs train --scene analytic --workdir runs/dense",
        "nvs train --scene analytic --workdir runs/add --init-from runs/dense --attention hamming_linear",
    )
    _add_scene(trained, required=True)
    trained.add_argument("--workdir", required=True, metavar="DIR", help="where the run goes, and goes on")
    trained.add_argument("--model", metavar="NAME", help="gnt, gnt_single or gnt_nano (the default)")
    trained.add_argument(
        "--init-from", default="", metavar="CHECKPOINT", help="what to begin with and reparameterize"
    )
    for name in ("attention", "mlp", "projections"):
        trained.add_argument(f"--{name}", default="", metavar="KIND", help="default: the checkpoint's")
    trained.add_argument("--steps", type=int, default=800, metavar="N", help="default: %(default)s")
    trained.add_argument("--rays", type=int, default=256, metavar="N", help="a step (default: %(default)s)")
    trained.add_argument("--learning-rate", type=float, metavar="X", help="default: 0.005; finetuning 0.002")
    trained.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")

    converted = add_command(
        inner,
        "convert",
        convert,
        "A dense model's layers as shift layers, fitted to rays without training.",
        "nvs convert runs/views/dense --scene analytic --projections shift --output runs/quick",
    )
    converted.add_argument("checkpoint", metavar="CHECKPOINT", help="a dense model's folder, or its run's")
    _add_scene(converted, required=True)
    converted.add_argument("--rays", type=int, default=512, metavar="N", help="default: %(default)s")
    add_conversion(converted)
    converted.add_argument("--output", required=True, metavar="DIR", help="where the new checkpoint goes")
    add_json(converted)

    scored = add_command(
        inner,
        "eval",
        evaluate,
        "PSNR, SSIM and FLIP on a scene's held-out views.",
        "nvs eval runs/views/moe --scene analytic",
        "nvs eval runs/views/moe --scene analytic --json scores.json",
    )
    _add_model(scored)
    scored.add_argument(
        "--lpips", metavar="FILE", help="score LPIPS, too, by the state_dict of lpips.LPIPS(net='alex')"
    )
    add_json(scored)

    made = add_command(
        inner,
        "render",
        render,
        "A video along a path of cameras, or its frames.",
        "nvs render runs/views/moe --scene analytic --output spiral.mp4",
        "nvs render runs/views/moe --scene analytic --path circle --frames 24 --output circle.gif",
    )
    _add_model(made)
    made.add_argument(
        "--path",
        default="spiral",
        metavar="PATH",
        help="spiral, circle, or a JSON file (default: %(default)s)",
    )
    made.add_argument("--frames", type=int, default=60, metavar="N", help="default: %(default)s")
    made.add_argument(
        "--output", required=True, metavar="FILE", help="a name in .mp4 or .gif, or a folder for PNGs"
    )


def _add_scene(command, **settings):
    command.add_argument(
        "--scene",
        metavar="DIR",
        help="a folder of LLFF, with transforms.json, or with a sparse model of COLMAP; or analytic",
        **settings,
    )
    command.add_argument(
        "--longest-side",
        type=int,
        metavar="N",
        help="reduce photographs to so many pixels",
    )
    command.add_argument("--near", type=float, metavar="X", help="least depth, where no file says it")
    command.add_argument("--far", type=float, metavar="X", help="largest depth, likewise")


def _add_model(command):
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a trained model's folder, or its run's")
    _add_scene(command, required=True)
    command.add_argument("--points", type=int, metavar="N", help="depths of a ray; default: as in training")
    command.add_argument(
        "--chunk", type=int, default=1024, metavar="N", help="rays at a time (default: %(default)s)"
    )


def demo(arguments: argparse.Namespace) -> None:
    """Train, reparameterize and compare on a scene."""
    require("train,plot,views", "the demo")
    from shiftaddvit_jax.views_demo import print_report, run_views_demo

    workdir = Path(arguments.workdir).absolute()
    settings = {name: getattr(arguments, name) for name in ("longest_side", "near", "far", "seed")}
    report = run_views_demo(workdir, scene=_scene_name(arguments.scene), **settings)
    print_report(report, workdir)


def train(arguments: argparse.Namespace) -> None:
    """Train on a scene."""
    from shiftaddvit_jax.train import train_and_evaluate
    from shiftaddvit_jax.train.views import scene_config

    config = scene_config(_scene_name(arguments.scene))
    config.seed, config.init_from = arguments.seed, arguments.init_from
    config.data.image_size, config.data.batch_size = arguments.longest_side, arguments.rays
    config.data.near, config.data.far = arguments.near or 0.0, arguments.far or 0.0
    if arguments.model or arguments.init_from:
        config.model.name = arguments.model or ""
    for name in ("attention", "mlp", "projections"):
        config.model[name] = getattr(arguments, name)
    config.train.steps, config.train.warmup_steps = arguments.steps, min(50, arguments.steps // 2)
    if arguments.learning_rate or arguments.init_from:
        config.train.learning_rate = arguments.learning_rate or 2e-3
    metrics = train_and_evaluate(config, arguments.workdir)
    print(f"PSNR {metrics['psnr']:.2f} dB on held-out views; the model is in {arguments.workdir}/model")


def convert(arguments: argparse.Namespace) -> None:
    """A shift model of a dense one, and a table of how near its layers come."""
    from shiftaddvit_jax.calibrate import calibrate_with_report
    from shiftaddvit_jax.checkpoints import save_model
    from shiftaddvit_jax.novel_views import sample_rays

    model, variables, scene = _open(arguments)
    dense, settings = conversion_settings(model, arguments)
    start = time.perf_counter()
    samples = sample_rays(dense, variables, scene, arguments.rays)
    converted, fitted, layers = calibrate_with_report(dense, variables, samples, **settings)
    save_model(arguments.output, converted, fitted, {"scene": _scene_name(arguments.scene)})
    seconds = time.perf_counter() - start
    figures = {"output": arguments.output, "rays": arguments.rays, **conversion_figures(layers, seconds)}

    def show():
        print_layers(layers, "ray")
        print(f"written to {arguments.output}: {len(layers)} layers, {arguments.rays} rays, {seconds:.0f} s")
        print(f"Next: {program()} nvs eval {arguments.output} --scene {arguments.scene}")

    present(arguments, figures, show)


def evaluate(arguments: argparse.Namespace) -> None:
    """Scores of a checkpoint on a scene's held-out views."""
    import numpy as np

    from shiftaddvit_jax.novel_views import load_lpips, render_held_out, score_view

    lpips = load_lpips(arguments.lpips) if arguments.lpips else None
    model, variables, scene = _open(arguments)
    if not scene.held_out:
        raise ValueError(f"the scene {arguments.scene} holds out no views")
    settings = {"points": arguments.points, "chunk": arguments.chunk}
    views = {
        scene.names[index]: score_view(view.colours, scene.images[index] / 255, lpips)
        for index, view in render_held_out(model, variables, scene, **settings)
    }
    names = next(iter(views.values()))
    means = {name: float(np.mean([scores[name] for scores in views.values()])) for name in names}
    present(arguments, {**means, "views": views}, lambda: _print_scores({**views, "mean": means}))


def _print_scores(rows):
    for name, scores in rows.items():
        others = [f"{score.upper()} {value:.4f}" for score, value in scores.items() if score != "psnr"]
        print(", ".join([f"{name}: PSNR {scores['psnr']:.2f} dB", *others]))


def render(arguments: argparse.Namespace) -> None:
    """Frames along a path."""
    from shiftaddvit_jax.novel_views import circle_path, read_path, render_view, spiral_path
    from shiftaddvit_jax.novel_views.video import check_output, write_frames

    output = check_output(arguments.output)
    model, variables, scene = _open(arguments)
    if arguments.path in ("spiral", "circle"):
        poses = {"spiral": spiral_path, "circle": circle_path}[arguments.path](scene, arguments.frames)
    else:
        poses = read_path(arguments.path)
    settings = {"points": arguments.points, "chunk": arguments.chunk}
    write_frames((render_view(model, variables, scene, pose, **settings).colours for pose in poses), output)
    print(f"{len(poses)} frames in {output}")


def _scene_name(name):
    """A scene's name that means the same in any folder."""
    return name if name.partition(":")[0] == "analytic" and not os.path.isdir(name) else os.path.abspath(name)


def _open(arguments) -> tuple[Any, Any, Any]:
    """A model, its variables, and the scene."""
    from shiftaddvit_jax.checkpoints import load_model
    from shiftaddvit_jax.checkpoints.source import our_folder
    from shiftaddvit_jax.data.scenes import load_scene
    from shiftaddvit_jax.models import list_models

    folder = our_folder(arguments.checkpoint)
    if folder is None:
        raise ValueError(f"{arguments.checkpoint} is no checkpoint; train one with `shiftaddvit nvs train`")
    model, variables, _ = load_model(folder)
    if model.variant not in list_models("novel_views"):
        raise ValueError(f"{arguments.checkpoint} holds a {model.variant}, which does not render views")
    scene = load_scene(
        arguments.scene, longest_side=arguments.longest_side, near=arguments.near, far=arguments.far
    )
    return model, variables, scene
