"""Writes what is known of one model of the study: scores on the test images, shares, costs, its command."""

import argparse
import math
from pathlib import Path

import jax
import numpy as np

from shiftaddvit_jax import __version__
from shiftaddvit_jax.bench.rounds import available_threads, describe_machine
from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.costs import cost_report
from shiftaddvit_jax.data import load_dataset
from shiftaddvit_jax.files import read_latencies, read_object, write_json
from shiftaddvit_jax.models import Preprocessing
from shiftaddvit_jax.nn.moe import aimed_shift_share
from shiftaddvit_jax.train import evaluate
from studies.fashion_mnist.rows import BY_NAME, HELD_OUT, LATENCIES, WORKDIR, shown
from studies.fashion_mnist.run import record_file


def make_record(name: str, seed: int, workdir: Path, data: Path) -> dict:
    """The record of the row of that name and seed, whose command has run."""
    row = BY_NAME[name]
    folder = row.folder(workdir, seed)
    model, variables, about = load_model(folder / "model")
    dataset = load_dataset("idx", str(data))
    scores = evaluate(
        model, variables, dataset.test, preprocessing=Preprocessing.from_dict(about["preprocessing"])
    )
    shares = scores["shift_share"]
    shown_in, shown_data = WORKDIR, data
    if data.parent == workdir:  # images held out
        shown_in = WORKDIR / HELD_OUT
        shown_data = shown_in / data.name
    costs = cost_report(model, variables, shift_share=shares or 0.0)
    summary = read_object(folder / "summary.json") if row.command == "train" else {}
    return {
        "row": name,
        "label": row.label,
        "group": row.group,
        "seed": seed,
        "command": shown(row.line(shown_in, shown_data, seed)),
        "images": int(scores["confusion"].sum()),
        "top1": scores["top1"],
        "loss": scores["loss"],
        "confusion": scores["confusion"].tolist(),
        "shift_share": shares,
        "aimed_share": _aims(row, workdir, shares),
        "packed_bytes": math.ceil(costs["weight_bytes"]),
        "energy_mj": costs["energy_mj"],
        "macs": costs["macs"],
        "adds": costs["adds"],
        "shifts": costs["shifts"],
        "training_seconds": summary.get("seconds", 0.0),
        "training_images": summary.get("images", 0),
        "machine": describe_machine(available_threads()),
        "versions": {"shiftaddvit_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }


def _aims(row, workdir, shares):
    """The share of tokens that the row's command wants on shift experts, if it does."""
    settings = row.settings or {}
    if not shares or row.command == "pack" or settings.get("train.balance_weight") == 0:
        return {}
    latencies = settings.get("train.latencies", "(6.0,4.0)")
    if latencies.endswith(LATENCIES) or any(option.endswith(LATENCIES) for option in row.options):
        measured = read_latencies(workdir / LATENCIES)
        return {name: aimed_shift_share(measured[name]) for name in shares}
    dense, shift = map(float, latencies.strip("()").split(","))
    return dict.fromkeys(shares, aimed_shift_share((dense, shift)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("seed", type=int)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("data", type=Path)
    asked = parser.parse_args()
    found = make_record(**vars(asked))
    write_json(record_file(asked.workdir, BY_NAME[asked.name], asked.seed), found)
