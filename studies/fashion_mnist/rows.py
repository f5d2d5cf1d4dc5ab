"""The rows of the study, in the order of what they tell most: each a few commands that anyone can type."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "configs/fashion_mnist.py"
WORKDIR = Path("runs/fashion_mnist")
LATENCIES = "latencies.json"  # in the workdir: what this machine's experts take
HELD_OUT = "held_out"  # in the workdir: rows that never see the test images
ONCE = {"train.evaluate_every": 10**6, "train.keep_best": 0}  # the test images are seen at the end
FINETUNE = {"train.learning_rate": 1e-3, "train.warmup_steps": 100, "train.epochs": 4.0}
IMAGES = {"convert": 512, "balance": 2048}  # that commands without training look at
ADDITIVE = {"model.attention": "hamming_linear"}  # the attention that the mixtures and shifts are built on


@dataclass(frozen=True)
class Row:
    """A model of the study.

    Attributes:
      name: its folder's, with the seed behind it.
      label: what tables and pictures call it.
      start: the row whose model of the same seed it begins with; "" for random weights.
      settings: what its training changes in the config, by dotted keys; None if it is not trained.
      options: of another command than ``train``.
      command: ``train``, ``convert``, ``balance`` or ``pack``.
      group: the table that it is in.
    """

    name: str
    label: str
    start: str = ""
    settings: Mapping[str, Any] | None = None
    options: tuple[str, ...] = ()
    command: str = "train"
    group: str = "main"

    def folder(self, workdir: Path, seed: int) -> Path:
        """Where the commands write."""
        return workdir / f"{self.name}-{seed}"

    def line(self, workdir: Path, data: Path, seed: int) -> list[str]:
        """The command, as arguments of ``shiftaddvit``."""
        folder = self.folder(workdir, seed)
        origin = str(workdir / f"{self.start}-{seed}" / "model")
        options = [option.format(workdir=workdir) for option in self.options]
        output = ["--output", str(folder / "model")]
        if self.command == "pack":
            return ["pack", "--checkpoint", origin, *options, *output]
        if self.command in IMAGES:
            images = ["--images", "idx", "--path", str(data), "--count", str(IMAGES[self.command])]
            return [self.command, origin, *images, *options, *output]
        settings: dict[str, Any] = {"seed": seed, "data.path": str(data), **ONCE}
        if self.start:
            settings |= FINETUNE | {"init_from": origin}
        settings |= self.settings or {}
        for key, value in settings.items():
            if isinstance(value, str):
                settings[key] = value.format(workdir=workdir, seed=seed)
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        return ["train", "--config", CONFIG, "--workdir", str(folder), *flags]


def shown(line: list[str]) -> str:
    """A command as it is typed."""
    return shlex.join(["shiftaddvit", *line])


def _attention(kind, label=None):
    return Row(kind, label or kind, "dense", {"model.attention": kind}, group="attention")


def _mixture(name, label, **settings):
    settings = {f"train.{key}": value for key, value in settings.items()}
    return Row(name, label, "hamming_linear", {"model.mlp": "moe", **settings}, group="mixture")


def _shift(name, label, **settings):
    settings = {f"model.{key}": value for key, value in settings.items()}
    return Row(name, label, "hamming_linear", {"model.mlp": "shift", **settings}, group="shift")


def _converted(name, label, *options):
    return Row(f"convert_{name}", label, "dense", options=options, command="convert", group="convert")


def _balanced(start, label, *options):
    return Row(f"{start}_balanced", label, start, options=options, command="balance", group="mixture")


def _packed(start, label):
    options = ("--activations", "int8")
    return Row(f"{start}_int8", label, start, options=options, command="pack", group="int8")


TEACHER = "{workdir}/dense-{seed}/model"
ROWS = (
    Row("dense", "dense, softmax attention", settings={}),
    _attention("hamming_linear"),
    _shift("shift", "shift MLPs"),
    _mixture("moe", "mixture MLPs, 6:4"),
    _mixture("moe_none", "mixture MLPs, no balancing loss", balance_weight=0.0),
    _mixture("moe_1_1", "mixture MLPs, 1:1", latencies="(1.0,1.0)"),
    _mixture("moe_1_3", "mixture MLPs, 1:3", latencies="(1.0,3.0)"),
    _mixture("moe_measured", "mixture MLPs, measured", latencies="{workdir}/" + LATENCIES),
    _balanced("moe", "mixture MLPs, 6:4, balanced"),
    _balanced("moe_measured", "mixture MLPs, measured, balanced", "--latencies", "{workdir}/" + LATENCIES),
    Row("dense_longer", "dense, trained as long as stage 1", "dense", {}, group="attention"),
    _attention("linear"),
    _attention("binary_softmax"),
    _attention("hamming_quadratic"),
    _attention("hamming_ksh"),
    _converted("shift", "shift MLPs, fitted"),
    _converted("shift_two_terms", "shift MLPs of two terms, fitted", "--weight-terms", "2"),
    _converted("moe", "mixture MLPs, fitted", "--mlp", "moe"),
    _packed("shift", "shift MLPs, int8 activations"),
    _packed("moe", "mixture MLPs, int8 activations"),
    Row(
        "one_stage",
        "mixture MLPs, both changes at once",
        "dense",
        {**ADDITIVE, "model.mlp": "moe", "train.epochs": 8.0},
        group="mixture",
    ),
    Row(
        "distilled",
        "hamming_linear, distilled",
        "dense",
        {**ADDITIVE, "distillation.teacher": TEACHER},
        group="attention",
    ),
    Row(
        "moe_distilled",
        "mixture MLPs, 6:4, distilled",
        "hamming_linear",
        {"model.mlp": "moe", "distillation.teacher": TEACHER},
        group="mixture",
    ),
    _shift("shift_two_terms", "shift MLPs of two terms", weight_terms=2),
    _shift("shift_4_bits", "shift MLPs, 4 bits", weight_bits=4),
    _shift("shift_3_bits", "shift MLPs, 3 bits", weight_bits=3),
    _shift("shift_everywhere", "shifts in attention too", projections="shift"),
    Row(
        "moe_shift",
        "mixture MLPs, shifts in attention",
        "hamming_linear",
        {"model.mlp": "moe", "model.projections": "shift"},
        group="mixture",
    ),
    # Recipes that were tried on held-out images because mixtures of 6:4 stay below shifts.
    Row(
        "additive_shift",
        "shift MLPs, fitted to the additive model",
        "hamming_linear",
        command="convert",
        group="shift",
    ),
    Row(
        "additive_moe",
        "mixture MLPs, fitted to the additive model",
        "hamming_linear",
        options=("--mlp", "moe"),
        command="convert",
        group="mixture",
    ),
    Row(
        "moe_fitted_first",
        "mixture MLPs, 6:4, fitted first",
        "additive_moe",
        {**ADDITIVE, "model.mlp": "moe"},
        group="mixture",
    ),
)
BY_NAME = {row.name: row for row in ROWS}
