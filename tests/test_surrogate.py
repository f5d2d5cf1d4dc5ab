"""What a Gaussian process says of a function whose Sobol' indices are known."""

import math

import jax
import numpy as np
import pytest

from shiftaddvit_jax import qmc
from shiftaddvit_jax.robustness import Design, Robustness, fit_surrogate
from shiftaddvit_jax.robustness.study import as_scipy

PERTURBATIONS = {"rotation": "uniform:-180:180", "scale": "lognormal:0:0.1", "blur": "uniform:0:1"}
# Of u0 + (2 u1 - 1) (2 u2 - 1) / 2, uniform: the first alone has 1/12, the others together 1/36.
ALONE, TOGETHER = 0.75, 0.25
TRUE_FIRST, TRUE_TOTAL = (ALONE, 0, 0), (ALONE, TOGETHER, TOGETHER)


def score(units):
    return units[:, 0] + (2 * units[:, 1] - 1) * (2 * units[:, 2] - 1) / 2


def study(points, count, perturbations=PERTURBATIONS):
    """A study of so many points, and where in their distributions they lie."""
    design = Design(perturbations, points=points)
    made = {"digital_net": qmc.sobol, "lattice": qmc.lattice, "halton": qmc.halton}[points]
    sequence = made(len(design.parameters)).randomize(jax.random.key(0))
    units = np.asarray(sequence.points(count), np.float64)
    if points == "lattice":
        units = 1 - 2 * np.abs(units - 0.5)  # the baker's transform
    distributions = [as_scipy(parameter.distribution) for parameter in design.parameters]
    values = np.stack([each.ppf(unit) for each, unit in zip(distributions, units.T, strict=True)], axis=-1)
    kept = None if points == "halton" else sequence
    return Robustness(design, 1, (), None, np.zeros((1, 2)), values, np.zeros((count, 1, 2)), kept), units


@pytest.mark.parametrize(
    ("points", "count", "kernel"),
    [("halton", 128, "Matern"), ("digital_net", 2048, "DSI"), ("lattice", 512, "SI")],
)
def test_indices_and_curves_are_the_functions(points, count, kernel):
    found, units = study(points, count)
    surrogate = fit_surrogate(found, score(units))
    assert surrogate.kernel == kernel
    assert surrogate.evaluations == count
    assert surrogate.predicted > 0.99
    np.testing.assert_allclose(surrogate.first_order, TRUE_FIRST, atol=0.02)
    np.testing.assert_allclose(surrogate.total, TRUE_TOTAL, atol=0.02)
    along = (surrogate.positions[0] + 180) / 360
    middle = slice(8, -8)  # a periodic or piecewise constant kernel is worst at the ends
    np.testing.assert_allclose(surrogate.mean[0][middle], along[middle], atol=0.02)
    np.testing.assert_allclose(surrogate.mean[1][middle], 0.5, atol=0.03)
    assert surrogate.deviation.max() < 0.05


def test_positions_are_in_the_units_of_parameters():
    found, units = study("halton", 128)
    positions = fit_surrogate(found, score(units)).positions
    assert positions[0, 32] == pytest.approx(0)  # the middle of a turn
    assert positions[1, 32] == pytest.approx(1)  # the median of the scale
    assert (np.diff(positions) > 0).all()


def test_noise_is_not_predicted():
    found, units = study("halton", 128)
    noise = np.random.default_rng(0).standard_normal(len(units))
    assert fit_surrogate(found, noise).predicted < 0.2


def test_what_never_changes_has_no_indices():
    found, units = study("halton", 128)
    surrogate = fit_surrogate(found, np.full(len(units), 0.9))
    assert math.isnan(surrogate.predicted)
    assert np.isnan(surrogate.total).all()
    np.testing.assert_allclose(surrogate.mean, 0.9)
    assert (surrogate.deviation == 0).all()


@pytest.mark.parametrize(
    ("points", "count", "rotation"),
    [("lattice", 256, "uniform:-20:20"), ("digital_net", 1024, "uniform:-180:180")],
)
def test_other_points_have_materns_kernel(points, count, rotation):
    found, _ = study(points, count, {"rotation": rotation})
    assert fit_surrogate(found, np.zeros(count)).kernel == "Matern"
