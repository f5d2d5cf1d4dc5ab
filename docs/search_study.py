"""Runs every configuration of ten branches of a model once, and says how far from the best searches end.

python docs/search_study.py runs/digits/model --images digits

For each budget a search answers with the least loss that it measured within it. Its regret is what the best
configuration within the budget has less, in percent of the losses' range; means over five budgets, 20 seeds.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

from shiftaddvit_jax.checkpoints.source import open_source
from shiftaddvit_jax.cli.convert import open_examples, read_evenly
from shiftaddvit_jax.models.inspect import outputs_of
from shiftaddvit_jax.models.variables import linear_layers
from shiftaddvit_jax.search import energy_costs, group_layers, make_design, make_loss, make_run
from shiftaddvit_jax.search.baselines import run_at_random, run_greedily
from shiftaddvit_jax.search.effects import Effects, estimate_effects
from shiftaddvit_jax.search.knapsack import cheapest_within
from shiftaddvit_jax.search.run import BATCH

FACTORS, CHOICES, SEEDS = 10, ("dense", "shift"), 20
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)  # of the way from the cheapest to the dearest configuration: the budgets


def run_all(arguments):
    """The costs of ten branches by choice, and the logits of all configurations, dense ones and labels."""
    source = open_source(arguments.checkpoint)
    model, variables = source.model, source.variables
    groups = group_layers(linear_layers(model), "branch")
    groups = dict(list(groups.items())[:FACTORS])
    examples = open_examples(arguments.images, arguments.path)
    images, labels = read_evenly(examples, 2 * arguments.count, source.preprocessing)
    costs = energy_costs(model, variables, linear_layers(model))
    run = make_run(model, variables, groups, CHOICES, costs, images[::2], images[1::2])
    every = [run(levels_of(number)) for number in range(2**FACTORS)]
    return {
        "costs": costs.of(groups, CHOICES),
        "logits": np.stack(every),
        "dense": outputs_of(model, variables, images[1::2], BATCH),
        "labels": labels[1::2],
    }


def levels_of(number):
    """The configuration of a number: a factor's level is a bit."""
    return number >> np.arange(FACTORS) & 1


def number_of(levels):
    """The number of a configuration."""
    return int((np.asarray(levels) << np.arange(FACTORS)).sum())


def from_losses(design, losses):
    """Main effects of the losses alone, without logits and pairs."""
    signs = 1 - 2 * design.levels
    mains = signs.T @ losses / len(losses)
    nothing = np.zeros((FACTORS, 2, FACTORS, 2))
    return Effects(float(losses.mean()), mains[:, None] * np.array([1.0, -1.0]), nothing)


def study(found, loss, runs):
    """The mean regret of each search in percent, each with as many runs."""
    losses = np.array([float(loss(logits)) for logits in found["logits"]])
    costs, places = found["costs"], np.arange(FACTORS)
    price = np.array([costs[places, levels_of(number)].sum() for number in range(len(losses))])
    low, high = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    budgets = [low + share * (high - low) for share in SHARES]
    best = np.array([losses[price <= budget + 1e-9].min() for budget in budgets])

    def regret(numbers):
        tried = np.array(sorted(set(numbers)))
        least = [losses[tried[price[tried] <= budget + 1e-9]].min(initial=losses.max()) for budget in budgets]
        return 100 * float(np.mean(least - best)) / np.ptp(losses)

    def measure(levels):
        return float(losses[number_of(levels)])

    regrets = {name: [] for name in ("net", "net, from losses alone", "random", "greedy")}
    for seed in range(SEEDS):
        design = make_design(FACTORS, 2, runs, seed)
        ran = [number_of(levels) for levels in design.levels]
        for name, effects in (
            ("net", estimate_effects(design, found["logits"][ran], loss)),
            ("net, from losses alone", from_losses(design, losses[ran])),
        ):
            chosen = [number_of(cheapest_within(effects, costs, budget)) for budget in budgets]
            regrets[name].append(regret(ran + chosen))
        count = runs + len(budgets)
        drawn = run_at_random(measure, costs, count, seed)
        regrets["random"].append(regret([number_of(levels) for levels, _ in drawn]))
    way = run_greedily(measure, costs, count)
    regrets["greedy"].append(regret([number_of(levels) for levels, _ in way]))
    return {name: float(np.mean(values)) for name, values in regrets.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="of a model with dense layers and ten branches or more")
    parser.add_argument("--images", default="digits", help="a data source (default: digits)")
    parser.add_argument("--path", default="", help="where its images lie")
    parser.add_argument("--count", type=int, default=128, help="images to fit on, and as many to measure on")
    parser.add_argument("--keep", type=Path, help="a file .npz for all logits, which another call reads")
    chosen = parser.parse_args()
    if chosen.keep and chosen.keep.exists():
        all_runs = dict(np.load(chosen.keep))
    else:
        all_runs = run_all(chosen)
        if chosen.keep:
            np.savez(chosen.keep, **all_runs)
    print("| loss | runs | " + " | ".join(("net", "net, from losses alone", "random", "greedy")) + " |")
    for kind, labels in (("error", None), ("cross-entropy", all_runs["labels"])):
        for number in (32, 64):
            row = study(all_runs, jax.jit(make_loss(all_runs["dense"], labels)), number)
            print(f"| {kind} | {number} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
