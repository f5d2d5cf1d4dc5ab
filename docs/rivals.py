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
from studies.pages import markdown

FORMATS = {
    "shift": ("--mlp", "shift", "--projections", "shift"),
    "shift_mlp": ("--mlp", "shift", "--projections", "dense"),
    "moe": ("--mlp", "moe", "--projections", "shift"),
}
LIMITS = ("SHIFTADDVIT_TARGET", "ONEDNN_MAX_CPU_ISA")
COMMON = ("--activations", "int8", "--precision", "int8", "--implementation", "tvm")


def measure(model, form, asked):
    """One run: the machine, the versions, our milliseconds, the best rivals, and all ratios to ours."""
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
        "best_rivals": found["best_rivals"],
        "ratios": {row["name"]: row["ratio"] for row in rivals if "ratio" in row},
    }


def table(runs):
    """Medians over the runs of each model, size, batch and format, as Markdown."""
    cells = {}
    for run in runs:
        key = run["model"], run["image_size"] or 224, run["batch"], run["format"]
        cells.setdefault(key, []).append(run)
    head = ("model", "pixels", "batch", "format", "runs", "ms", "best rival, `sra`", "best rival, `msa`")
    rows = []
    for key, found in sorted(cells.items()):
        best = [_best([run["best_rivals"].get(kind) for run in found], kind) for kind in ("sra", "msa")]
        milliseconds = f"{statistics.median(run['ms'] for run in found):.2f}"
        rows.append([str(cell) for cell in (*key, len(found), milliseconds, *best)])
    return markdown(head, rows)


def _best(rivals, attention):
    """The median ratio of each run's best rival, and who they were; "-" where there were none."""
    if None in rivals:
        return "-"
    names = sorted({rival["name"].replace(f" {attention}", "") for rival in rivals})
    return f"{statistics.median(rival['ratio'] for rival in rivals):.2f} ({'; '.join(names)})"


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
    print(table(runs))


if __name__ == "__main__":
    main()
