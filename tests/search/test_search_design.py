import itertools

import numpy as np
import pytest

from shiftaddvit_jax.search.design import fewest_runs, make_design


@pytest.mark.parametrize(("factors", "runs"), [(10, 32), (16, 64), (24, 128)])
def test_a_first_bit_takes_a_column_of_its_own(factors, runs):
    assert fewest_runs(factors, 2) == runs
    levels = 1 - 2 * make_design(factors, 2, runs).levels
    np.testing.assert_array_equal(levels.T @ levels, runs * np.eye(factors))


def test_one_bit_less_makes_two_factors_change_together():
    with pytest.raises(
        ValueError, match=r"10 groups of 2 choices take 32 runs, or a larger power of two.*got 16"
    ):
        make_design(10, 2, 16)


def test_no_main_effect_mixes_with_a_pair():
    levels = 1 - 2 * make_design(10, 2, 32).levels
    pairs = np.stack([levels[:, i] * levels[:, j] for i, j in itertools.combinations(range(10), 2)])
    np.testing.assert_array_equal(pairs @ levels, 0)


def test_any_two_factors_of_four_levels_have_all_combinations_equally_often():
    runs = fewest_runs(6, 4)
    levels = make_design(6, 4, runs).levels
    for i, j in itertools.combinations(range(6), 2):
        counts = np.bincount(4 * levels[:, i] + levels[:, j], minlength=16)
        np.testing.assert_array_equal(counts, runs // 16)


@pytest.mark.parametrize("choices", [2, 4])
def test_columns_are_the_walsh_functions_of_the_levels_bits(choices):
    design = make_design(5, choices, 64, seed=3)
    numbers = np.arange(64)
    for factor, (columns, flips) in enumerate(zip(design.columns, design.flipped, strict=True)):
        for bit, (column, flip) in enumerate(zip(columns, flips, strict=True)):
            found = design.levels[:, factor] >> (len(columns) - 1 - bit) & 1
            parity = np.array([bin(number & column).count("1") % 2 for number in numbers])
            np.testing.assert_array_equal(found, parity ^ flip)


def test_seeds_make_other_designs_and_the_same_seed_the_same():
    first, again, other = (make_design(6, 2, 32, seed).levels for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("runs", [48, 0])
def test_runs_are_a_power_of_two(runs):
    with pytest.raises(ValueError, match=f"power of two.*got {runs}"):
        make_design(4, 2, runs)


def test_three_choices_are_refused():
    with pytest.raises(ValueError, match="2 or 4 choices in a search, got 3"):
        make_design(4, 3, 64)
