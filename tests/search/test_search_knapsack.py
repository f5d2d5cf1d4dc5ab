import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftaddvit_jax.search.baselines import run_at_random, run_greedily
from shiftaddvit_jax.search.effects import Effects
from shiftaddvit_jax.search.knapsack import cheapest_within


def problem(seed, factors, choices, coupling):
    rng = np.random.default_rng(seed)
    pairs = coupling * rng.standard_normal((factors, choices, factors, choices))
    pairs *= np.triu(np.ones((factors, factors)), 1)[:, None, :, None]
    return Effects(1.0, rng.standard_normal((factors, choices)), pairs), rng.uniform(
        0.1, 1, (factors, choices)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 2), (4, 2), (8, 2), (3, 4), (5, 4)]),
    st.sampled_from([0.0, 0.2, 2.0]),
    st.floats(0, 1),
)
def test_no_configuration_within_the_budget_is_predicted_to_be_better(seed, size, coupling, share):
    effects, costs = problem(seed, *size, coupling)
    factors, choices = size
    low, high = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    budget = low + share * (high - low)
    found = cheapest_within(effects, costs, budget)
    places = np.arange(factors)
    every = [np.array(levels) for levels in itertools.product(range(choices), repeat=factors)]
    best = min(effects.predict(levels) for levels in every if costs[places, levels].sum() <= budget + 1e-9)
    assert costs[places, found].sum() <= budget + 1e-6
    assert effects.predict(found) == pytest.approx(best, abs=1e-9)


def test_a_budget_that_is_exactly_a_configurations_cost_is_met():
    costs = np.array([[0.1, 0.3]] * 10)
    effects = Effects(0.0, np.array([[1.0, 0.0]] * 10), np.zeros((10, 2, 10, 2)))
    found = cheapest_within(effects, costs, 3 * 0.3 + 7 * 0.1)
    assert found.sum() == 3


def test_nothing_fits_below_the_cheapest():
    effects, costs = problem(0, 4, 2, 0.0)
    assert cheapest_within(effects, costs, 0.99 * costs.min(axis=1).sum()) is None


def test_thirty_factors_are_solved_like_a_dynamic_program():
    rng = np.random.default_rng(0)
    weights, mains = rng.integers(1, 40, (30, 4)), rng.standard_normal((30, 4))
    budget = int(weights.min(axis=1).sum() + 150)
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    for factor in range(30):
        after = np.full(budget + 1, np.inf)
        for weight, gain in zip(weights[factor], mains[factor], strict=True):
            after[weight:] = np.minimum(after[weight:], best[: budget + 1 - weight] + gain)
        best = after
    effects = Effects(0.0, mains, np.zeros((30, 4, 30, 4)))
    found = cheapest_within(effects, weights.astype(float), budget)
    assert effects.predict(found) == pytest.approx(best.min())


@pytest.mark.parametrize("runs", [12, 16, 60])
def test_greedy_goes_from_the_dearest_to_the_cheapest_within_its_runs(runs):
    losses = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    costs = np.array([[1.0, 0.0]] * 10)
    found = run_greedily(lambda levels: float(levels @ losses), costs, runs)
    assert len(found) <= runs
    assert not found[0][0].any()
    assert found[-1][0].all() or runs < 20
    if runs == 60:  # it tries all, so every step takes the least loss
        cheapest_of_three = min(loss for levels, loss in found if levels.sum() == 3)
        assert cheapest_of_three == 6.0


def test_random_runs_are_uniform_and_repeatable():
    costs = np.ones((3, 4))
    first, again = (run_at_random(lambda levels: 0.0, costs, 400, seed=1) for _ in range(2))
    levels = np.array([levels for levels, _ in first])
    np.testing.assert_array_equal(levels, [levels for levels, _ in again])
    assert np.bincount(levels[:, 0], minlength=4).min() > 60
