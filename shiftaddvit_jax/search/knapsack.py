"""The configuration with the least predicted loss within a budget, exactly: by branch and bound."""

import itertools
import logging

import numpy as np
from jaxtyping import Float, Int

from shiftaddvit_jax.search.effects import Effects

logger = logging.getLogger(__name__)

MOST_STATES = 2**20  # beginnings of configurations at a time
MULTIPLIERS = np.concatenate([[0.0], np.geomspace(1e-4, 1e4, 65)])  # of costs, as shares of losses over costs
SLACK = 1e-9  # of a budget, which sums of costs in another order may exceed


def cheapest_within(
    effects: Effects, costs: Float[np.ndarray, "factors choices"], budget: float
) -> Int[np.ndarray, "factors"] | None:
    """The levels with the least predicted loss among those whose costs add up to ``budget`` at most.

    Factors are decided one after the other, those with the largest effects first. A beginning is given up
    where the rest can't stay within the budget, or where a lower bound of its loss is not below the loss of a
    whole configuration that is known. The bounds are Lagrange's: each undecided factor takes the level that
    is best at a price of the cost. Pairs are first reduced to main effects and a rest that is nowhere
    negative.

    Args:
      effects: from `estimate_effects`.
      costs: of each factor's levels, additive.
      budget: of their sum.

    Returns:
      The levels; None where the cheapest ones are above the budget.
    """
    budget = budget + SLACK * float(np.abs(costs).sum())
    if costs.min(axis=1).sum() > budget:
        return None
    order = np.argsort(-np.ptp(effects.mains, axis=1), kind="stable")
    base, mains, rests = _reduced(effects, order)
    costs = costs[order]
    factors, choices = mains.shape
    prices = MULTIPLIERS * np.ptp(mains, axis=1).sum() / max(np.ptp(costs, axis=1).sum(), 1e-300)
    # The price at which the bound of the whole is best, and its neighbours, which are better for some parts.
    whole = np.array([np.min(mains + price * costs, axis=1).sum() - price * budget for price in prices])
    best_price = int(np.argmax(whole))
    prices = prices[max(best_price - 2, 0) : best_price + 3]
    least_cost = np.append(np.cumsum(costs.min(axis=1)[::-1])[::-1], 0.0)

    best, best_loss = _greedy(base, mains, rests, costs, budget)
    states = np.zeros((1, 0), int)
    spent, lost = np.zeros(1), np.full(1, base)
    pending = np.zeros((1, factors, choices))  # what the decided factors add to the undecided ones' levels
    for factor in range(factors):
        parent = np.repeat(np.arange(len(states)), choices)
        level = np.tile(np.arange(choices), len(states))
        spent = spent[parent] + costs[factor, level]
        lost = lost[parent] + mains[factor, level] + pending[parent, factor, level]
        kept = spent + least_cost[factor + 1] <= budget
        states = np.column_stack([states[parent], level])[kept]
        spent, lost, level = spent[kept], lost[kept], level[kept]
        pending = pending[parent[kept]] + rests[factor, level]
        left = mains[factor + 1 :] + pending[:, factor + 1 :]
        bound = lost - np.inf
        for price in prices:
            rest = np.min(left + price * costs[factor + 1 :], axis=2).sum(axis=1) - price * (budget - spent)
            bound = np.maximum(bound, lost + rest)
        kept = bound < best_loss - 1e-12 * abs(best_loss)
        if np.count_nonzero(kept) > MOST_STATES:
            logger.warning(
                "more than %d beginnings may lead to the best configuration; the most promising are followed",
                MOST_STATES,
            )
            kept &= bound <= np.partition(bound[kept], MOST_STATES)[MOST_STATES]
        states, spent, lost, pending = states[kept], spent[kept], lost[kept], pending[kept]
    if len(states):
        best = states[np.argmin(lost)]
    levels = np.empty(factors, int)
    levels[order] = best
    return levels


def _reduced(effects, order):
    """The same predictions with factors in ``order``: a base, mains, and pairs of at least 0."""
    mains = effects.mains[order].copy()
    factors, choices = mains.shape
    rests = np.zeros((factors, choices, factors, choices))
    for i, j in itertools.combinations(range(factors), 2):
        table = effects.pairs[order[i], :, order[j]] + effects.pairs[order[j], :, order[i]].T
        rows = table.min(axis=1)
        columns = (table - rows[:, None]).min(axis=0)
        mains[i] += rows
        mains[j] += columns
        rests[i, :, j, :] = table - rows[:, None] - columns
    return float(effects.base), mains, rests


def _greedy(base, mains, rests, costs, budget):
    """A good configuration to begin with: from the cheapest, the step that gains most for its cost, again."""
    factors, choices = mains.shape
    levels = np.argmin(costs, axis=1)
    places = np.arange(factors)

    def loss(levels):
        pairs = rests[places[:, None], levels[:, None], places, levels]
        return base + mains[places, levels].sum() + pairs.sum()

    current = loss(levels)
    while True:
        steps = []
        for factor in range(factors):
            for level in range(choices):
                changed = levels.copy()
                changed[factor] = level
                gain = current - loss(changed)
                if costs[places, changed].sum() <= budget and gain > 0:
                    steps.append(
                        (
                            gain / max(costs[factor, level] - costs[factor, levels[factor]], 1e-30),
                            factor,
                            level,
                        )
                    )
        if not steps:
            return levels, current
        _, factor, level = max(steps)
        levels[factor] = level
        current = loss(levels)
