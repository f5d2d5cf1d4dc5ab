"""How a ShiftAddViT's time grows with images and pixels: sizes of one model in interleaved rounds.

    python docs/scaling.py pvt_v2_b0 deit_small --output docs/benchmarks/scaling_amx.json

All linear layers of blocks are shifts, activations int8, weights random, on the TVM kernels.
"""

import argparse
from pathlib import Path

import shiftaddvit_jax as sav
from shiftaddvit_jax.bench.models import SECONDS_A_TURN
from shiftaddvit_jax.bench.rounds import Contestant, available_threads, describe_timing, time_contestants
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.models import model_arguments

FORMAT = {"mlp": "shift", "projections": "shift", "activations": "int8", "precision": "int8"}
SIZES = {"one image": (1, 224), "8 images": (8, 224), "one image of 448 pixels": (1, 448)}  # batch, pixels
KEPT = "name", "runs", "median_ms", "p10_ms", "p90_ms", "reference", "ratio"


def contestants(name: str) -> list[Contestant]:
    """A model at each size, with ratios to the first."""
    found = []
    for size, (batch, pixels) in SIZES.items():
        model = sav.create_model(name, image_size=pixels, attention="hamming_linear", **FORMAT)
        arguments = model_arguments(model) | {"implementation": "tvm"}
        examples = {"images": (batch, pixels, pixels, 3)}
        task = {"runtime": "jax", "model": arguments, "examples": examples}
        found.append(Contestant(f"{name}, {size}", task, references=(f"{name}, {next(iter(SIZES))}",)))
    return found


def main():
    """Time the models, print their ratios and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    rows = []
    for model in asked.models:
        for row in time_contestants(contestants(model), available_threads(), asked.rounds, SECONDS_A_TURN):
            rows.append({key: row[key] for key in KEPT})
            print(f"{row['name']}: {row['median_ms']:.2f} ms, {row['ratio']:.2f} times one image's")
    write_json(asked.output, {**describe_timing(), "rounds": asked.rounds, "rows": rows})


if __name__ == "__main__":
    main()
