"""Counts the evaluations until each rule stops, and how far the means are from many points'.

python docs/robustness_study.py MODEL OTHER
"""

import argparse

import numpy as np

from shiftaddvit_jax import from_pretrained, qmc
from shiftaddvit_jax.data import load_dataset
from shiftaddvit_jax.progress import track
from shiftaddvit_jax.robustness import Design, Scorer, mean_scores

PERTURBATIONS = {  # six parameters
    "rotation": "uniform:-20:20",
    "scale": "lognormal:0:0.1",
    "shift": "uniform:-0.1:0.1",
    "contrast": "uniform:0.5:1.5",
    "blur": "uniform:0:1.5",
}


def reference(scorer, design, count):
    """Accuracies of both models and their difference by many points, and standard deviations of scores."""
    texts = [
        ":".join(map(str, (each.distribution.kind, *each.distribution.parameters)))
        for each in design.parameters
    ]
    points = np.asarray(qmc.sample(texts, count, "digital_net", seed=12345), np.float64)
    scores = np.stack([scorer(point)[:, 0] for point in track(points, "reference", count)])
    return accuracies(*scores.mean(axis=0)), scores.std(axis=0)


def accuracies(first, second):
    """Percent: both, and their difference."""
    return 100 * np.array([first, second, first - second])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs=2)
    parser.add_argument("--data", nargs="+", default=["digits"], help="a source, and where it lies")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--iid-seeds", type=int, default=2)
    parser.add_argument("--tolerance", type=float, default=0.5)
    parser.add_argument("--reference", type=int, default=2**14)
    arguments = parser.parse_args()
    design = Design(PERTURBATIONS, arguments.tolerance)
    examples = load_dataset(*arguments.data).test.evenly(arguments.images)
    models = [from_pretrained(model) for model in arguments.models]
    scorer = Scorer(models, examples, [each.name for each in design.parameters])
    truth, spread = reference(scorer, design, arguments.reference)
    print(
        f"{scorer.images} images; truth {truth.round(3)} %; deviations {(100 * spread).round(1)} points",
        flush=True,
    )
    for points, rule in (
        ("digital_net", "cone"),
        ("lattice", "cone"),
        ("iid", "clt"),
        ("halton", "student"),
    ):
        counts, errors, bounds = [], [], []
        for seed in range(arguments.iid_seeds if points == "iid" else arguments.seeds):
            found = mean_scores(
                scorer, Design(PERTURBATIONS, arguments.tolerance, points, rule, seed=seed, most=2**15)
            )
            means = [*found.models, found.difference]
            counts.append(len(found.values))
            errors.append(abs(100 * np.array([each.accuracy.mean for each in means]) - truth))
            bounds.append(100 * np.array([each.accuracy.half_width for each in means]))
        met = sum((error <= arguments.tolerance).all() for error in errors)
        held = sum((error <= bound).all() for error, bound in zip(errors, bounds, strict=True))
        print(
            f"{points} {rule}: {np.mean(counts):.0f} evaluations ({min(counts)} to {max(counts)}), errors "
            f"{np.max(errors):.3f} points, within tolerance {met} of {len(counts)}, within bounds {held}",
            flush=True,
        )
