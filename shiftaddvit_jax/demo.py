"""The main job on real images: a dense vision transformer becomes a ShiftAddViT, stage by stage."""

import logging
import math
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.table import Table

from shiftaddvit_jax.bench.rounds import describe_timing
from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.command import print_table, program, table_console
from shiftaddvit_jax.costs import count_operations, weight_bytes
from shiftaddvit_jax.data import load_dataset
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.pictures import plot_confusions, plot_history
from shiftaddvit_jax.pictures.gallery import kernel_and_xla_ms
from shiftaddvit_jax.subject import load_subject
from shiftaddvit_jax.train import default_config, train_and_evaluate

if TYPE_CHECKING:
    import ml_collections

logger = logging.getLogger(__name__)

DENSE_STEPS, FINETUNE_STEPS = 700, 250
# Each stage's name, the stage that its model starts from, and its changes to the config's model.
STAGES = (
    ("dense", None, {}),
    ("add_attention", "dense", {"attention": "hamming_linear"}),
    ("shift", "add_attention", {"attention": "hamming_linear", "mlp": "shift", "projections": "shift"}),
    ("moe", "add_attention", {"attention": "hamming_linear", "mlp": "moe", "projections": "moe"}),
)


def stage_config(
    workdir: Path, stage: str, *, seed: int = 0, steps_scale: float = 1.0
) -> "ml_collections.ConfigDict":
    """The config of one of the demo's stages; ``steps_scale`` shortens or lengthens its training."""
    teacher, kinds = next((teacher, kinds) for name, teacher, kinds in STAGES if name == stage)
    config = default_config()
    config.seed = seed
    config.model.update(kinds)
    steps = DENSE_STEPS
    if teacher is not None:
        config.init_from = str(workdir / teacher / "model")
        config.train.learning_rate = 1e-3
        config.train.warmup_steps = 30
        steps = FINETUNE_STEPS
    config.train.steps = max(1, round(steps * steps_scale))
    config.train.log_every = 25
    config.train.evaluate_every = config.train.steps
    return config


def run_demo(workdir: str | Path, *, seed: int = 0, steps_scale: float = 1.0) -> dict[str, Any]:
    """Train, reparameterize, finetune and evaluate on the digits; all files go under ``workdir``.

    The files: one folder a stage (see `train_and_evaluate`), ``report.json``, ``confusion.png``,
    ``training.png``, and ``samples/`` with held-out digits. A run that was stopped resumes.

    Returns:
      The report: ``stages``, a list with each stage's ``name``, ``top1`` (a share), ``parameters``,
      ``packed_bytes``, ``shift_share`` (the share of tokens on shift experts, over all MoE layers; null
      without any), ``macs``, ``shifts`` and ``adds`` (for one image), ``kernels_ms`` (of one image, packed,
      on the kernels; null where they do not run) and ``xla_ms`` (on XLA alone); ``seconds``, of the whole
      demo; and ``machine`` and ``versions``, see `describe_timing`.
    """
    workdir = Path(workdir).absolute()
    start = time.perf_counter()
    stages, confusions, histories = [], {}, {}
    for number, (name, teacher, _) in enumerate(STAGES, 1):
        origin = f", from {teacher}" if teacher else ""
        logger.info("[%d/%d] %s%s", number, len(STAGES), name, origin)
        config = stage_config(workdir, name, seed=seed, steps_scale=steps_scale)
        metrics = train_and_evaluate(config, workdir / name)
        logger.info("      top-1 %.2f %% on the held-out third", 100 * metrics["top1"])
        model, variables, _ = load_model(workdir / name / "model")
        operations = count_operations(model, variables, metrics["shift_share"])
        share = metrics["shift_share"].values()
        stages.append(
            {
                "name": name,
                "top1": metrics["top1"],
                "parameters": metrics["parameters"],
                "packed_bytes": math.ceil(sum(weight_bytes(model, variables).values())),
                "shift_share": float(np.mean(list(share))) if share else None,
                "macs": operations.macs,
                "shifts": operations.shifts,
                "adds": operations.adds,
            }
        )
        confusions[name], histories[name] = metrics["confusion"], metrics["history"]
    times = kernel_and_xla_ms([load_subject(workdir / stage["name"]) for stage in stages])
    for stage in stages:
        stage["kernels_ms"], stage["xla_ms"] = times[stage["name"]]
    dataset = load_dataset("digits")
    plot_confusions(confusions, dataset.class_names, workdir / "confusion.png")
    plot_history(histories, workdir / "training.png")
    samples = workdir / "samples"
    samples.mkdir(exist_ok=True)
    for index in range(10):
        example = dataset.test[index]
        Image.fromarray(example["image"]).save(samples / f"{index}-digit-{example['label']}.png")
    seconds = time.perf_counter() - start
    report = {**describe_timing(), "seed": seed, "stages": stages, "seconds": seconds}
    write_json(workdir / "report.json", report)
    return report


def print_report(report: dict[str, Any], workdir: Path) -> None:
    """The report as a table, and what to run next."""
    table = Table(title="Handwritten digits, held-out third")
    columns = (
        "model", "top-1", "parameters", "packed", "tokens on shift", "multiplications", "ms", "ms on XLA",
    )  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for stage in report["stages"]:
        share = stage["shift_share"]
        table.add_row(
            stage["name"],
            f"{stage['top1']:.2%}",
            f"{stage['parameters']:,}",
            f"{stage['packed_bytes'] / 1e3:,.0f} kB",
            "-" if share is None else f"{share:.1%}",
            f"{stage['macs'] / 1e6:.2f} M",
            "-" if stage["kernels_ms"] is None else f"{stage['kernels_ms']:.2f}",
            f"{stage['xla_ms']:.2f}",
        )
    print_table(table)
    folder = shlex.quote(str(workdir))
    table_console().print(
        f"Took {report['seconds']:.0f} s. Multiplications: multiply-accumulates an image, in matrix products "
        f"and convolutions. ms: of one image here, packed, on the kernels.\nReport and pictures: {workdir}\n"
        f"Next: {program()} predict --checkpoint {folder}/moe/model {folder}/samples/*.png",
        highlight=False,
        soft_wrap=True,
    )
