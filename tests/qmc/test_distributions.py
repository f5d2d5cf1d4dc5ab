"""Distributions against SciPy's, and samples of several."""

import numpy as np
import pytest
import scipy.stats

from shiftaddvit_jax import qmc

THEIRS = {
    "uniform:-20:20": scipy.stats.uniform(-20, 40),
    "loguniform:1e-4:1e-2": scipy.stats.loguniform(1e-4, 1e-2),
    "normal:1:2": scipy.stats.norm(1, 2),
    "lognormal:0:0.1": scipy.stats.lognorm(0.1),
}


@pytest.mark.parametrize("text", THEIRS)
def test_quantiles_are_scipys(text):
    u = np.array([0.001, 0.25, 0.5, 0.9, 0.999], np.float32)
    quantiles = qmc.Distribution.parse(text).quantile(u)
    np.testing.assert_allclose(quantiles, THEIRS[text].ppf(u), rtol=1e-5, atol=1e-5)


def test_the_origin_of_plain_points_has_a_finite_quantile():
    assert np.isfinite(qmc.Distribution.parse("normal:0:1").quantile(np.zeros(1, np.float32))).all()


@pytest.mark.parametrize("points", ["digital_net", "lattice", "halton"])
def test_samples_are_spread_over_each_distribution(points):
    sample = np.asarray(qmc.sample(list(THEIRS), 256, points))
    for column, theirs in zip(sample.T, THEIRS.values(), strict=True):
        assert scipy.stats.kstest(column, theirs.cdf).statistic < 0.02  # random points: 0.05


def test_a_seed_is_a_sample():
    first, again, other = (qmc.sample(["uniform:0:1"] * 2, 24, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_independent_points_have_the_mean_and_deviation():
    sample = np.asarray(qmc.sample(["normal:1:2"], 4096, "iid"))
    np.testing.assert_allclose([sample.mean(), sample.std()], [1, 2], atol=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gamma:1:2", "'gamma:1:2' is no distribution; write one as in uniform:-20:20, loguniform"),
        ("uniform:3", "'uniform:3' is no distribution; write one as in"),
        ("uniform:a:b", "uniform takes a low and a higher end: uniform:-20:20"),
        ("uniform:2:1", "uniform takes a low and a higher end"),
        ("loguniform:0:1", "loguniform takes a positive low and a higher end: loguniform:1e-4:1e-2"),
        ("lognormal:0:-1", "lognormal takes the logarithm's mean and positive standard deviation"),
        ("normal:0:nan", "normal takes a mean and a positive standard deviation: normal:0:1"),
    ],
)
def test_what_is_no_distribution_is_refused_with_an_example(text, message):
    with pytest.raises(ValueError, match=message):
        qmc.Distribution.parse(text)


def test_points_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="unknown points 'sobol'; known: digital_net, lattice, halton, iid"):
        qmc.sample(["uniform:0:1"], 8, "sobol")
    with pytest.raises(ValueError, match="must be a power of two, got 24; take 16 or 32"):
        qmc.sample(["uniform:0:1"], 24, "digital_net")
