"""What a search is held against: the same number of runs, spent at random or one step at a time."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

Levels = Int[np.ndarray, "factors"]


def run_at_random(
    measure: Callable[[Levels], float], costs: Float[np.ndarray, "factors choices"], runs: int, seed: int = 0
) -> list[tuple[Levels, float]]:
    """Configurations drawn uniformly, with their losses."""
    factors, choices = costs.shape
    drawn = np.random.default_rng(seed).integers(choices, size=(runs, factors))
    return [(levels, measure(levels)) for levels in drawn]


def run_greedily(
    measure: Callable[[Levels], float], costs: Float[np.ndarray, "factors choices"], runs: int
) -> list[tuple[Levels, float]]:
    """Configurations on the way from the most expensive one to cheaper ones, with their losses.

    Each step tries the next cheaper level of every factor, and takes the one that loses least for what it
    saves. Where the runs that are left would not reach the cheapest configuration so, a step takes the factor
    that lost least for its savings when it was last tried.
    """
    levels = np.argmax(costs, axis=1)
    found = [(levels, measure(levels))]
    prices = np.zeros(len(costs))  # lost for what was saved, when last tried

    def cheaper(factor):
        """The level one step below, and what it saves; None at the cheapest."""
        cost, now = costs[factor], costs[factor, levels[factor]]
        below = np.flatnonzero(cost < now)
        return (level := below[np.argmax(cost[below])], now - cost[level]) if len(below) else None

    while steps := {factor: step for factor in range(len(costs)) if (step := cheaper(factor))}:
        still = sum(
            int(np.count_nonzero(cost < cost[level])) for cost, level in zip(costs, levels, strict=True)
        )
        if len(found) + len(steps) + still - 1 > runs:
            steps = {factor: steps[factor] for factor in [min(steps, key=lambda factor: prices[factor])]}
        if len(found) + len(steps) > runs:
            break
        current, tried = _loss_of(found, levels), {}
        for factor, (level, saved) in steps.items():
            changed = levels.copy()
            changed[factor] = level
            found.append((changed, measure(changed)))
            prices[factor] = (found[-1][1] - current) / saved
            tried[factor] = changed
        levels = tried[min(tried, key=lambda factor: prices[factor])]
    return found


def _loss_of(found, levels):
    return next(loss for known, loss in found if np.array_equal(known, levels))
