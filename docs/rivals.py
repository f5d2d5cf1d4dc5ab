"""ShiftAddViT on its kernels beside the best that other runtimes do with the dense model, in several runs.

    python docs/rivals.py deit_small --peers openvino,openvino-int8 --output docs/benchmarks/rivals_amx.json

Each run is one `shiftaddvit bench`. Runs are added to those in the file; the table has medians over them. As
on a lesser CPU: set SHIFTADDVIT_TARGET for our kernels and ONEDNN_MAX_CPU_ISA for OpenVINO.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from shiftaddvit_jax.files import read_object, write_json
from shiftaddvit_jax.validation import check_choice

FORMATS = {
    "shift": ("--mlp", "shift", "--projections", "shift"),
    "shift_mlp": ("--mlp", "shift", "--projections", "dense"),
    "moe": ("--mlp", "moe", "--projections", "shift"),
}
LIMITS = ("SHIFTADDVIT_TARGET", "ONEDNN_MAX_CPU_ISA")
COMMON = ("--activations", "int8", "--precision", "int8", "--implementation", "tvm")


def measure(model, form, asked):
    """One run: the machine, the versions, our milliseconds, and each rival's ratio to them."""
    command = ["bench", model, *FORMATS[form], *COMMON, "--batch", str(asked.batch)]
    if asked.image_size:
        command += ["--image-size", str(asked.image_size)]
    command += ["--rounds", str(asked.rounds), "--peers", asked.peers]
    program = [sys.executable, "-m", "shiftaddvit_jax", *command, "--json"]
    found = json.loads(subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout)
    ours, *rivals = found["rows"]
    return {
        "model": model,
        "format": form,
        "batch": asked.batch,
        "image_size": asked.image_size,
        "command": " ".join(["shiftaddvit", *command]),
        "environment": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "machine": found["machine"],
        "versions": found["versions"],
        "ms": ours["median_ms"],
        "ratios": {row["name"]: row["ratio"] for row in rivals if "ratio" in row},
    }


def summary(runs):
    """Rows of medians: model, image size, batch, format, runs, ms, and the best rival with each attention."""
    cells = {}
    for run in runs:
        key = run["model"], run["image_size"] or 224, run["batch"], run["format"]
        cells.setdefault(key, []).append(run)
    rows = []
    for key, found in sorted(cells.items()):
        names = {name for run in found for name in run["ratios"]}
        ratios = {
            name: statistics.median(run["ratios"][name] for run in found if name in run["ratios"])
            for name in names
        }
        best = []
        for attention in ("sra", "msa"):
            of = [name for name in ratios if f" {attention}" in name]
            name = min(of, key=ratios.__getitem__, default=None)
            best.append("-" if name is None else f"{ratios[name]:.2f} ({name.replace(f' {attention}', '')})")
        rows.append((*key, len(found), statistics.median(run["ms"] for run in found), *best))
    return rows


def main():
    """Run the benchmarks, keep them and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--formats", default="shift,moe")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--peers", default="openvino,openvino-int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    for form in asked.formats.split(","):
        check_choice("format", form, tuple(FORMATS))
    runs = read_object(asked.output)["runs"] if asked.output.exists() else []
    for _ in range(asked.runs):
        for model in asked.models:
            for form in asked.formats.split(","):
                runs.append(measure(model, form, asked))
                write_json(asked.output, {"runs": runs})
    print("| model | pixels | batch | format | runs | ms | best rival, `sra` | best rival, `msa` |")
    print("|---|---|---|---|---|---|---|---|")
    for *cell, milliseconds, sra, msa in summary(runs):
        print(f"| {' | '.join(map(str, cell))} | {milliseconds:.2f} | {sra} | {msa} |")


if __name__ == "__main__":
    main()
