import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.search.design import fewest_runs, make_design
from shiftaddvit_jax.search.effects import estimate_effects, logit_effects
from shiftaddvit_jax.search.run import make_loss

FACTORS = 5


@pytest.fixture(params=[2, 4])
def additive(request):
    """A design, and logits to which each factor's level adds something, in closed form."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((7, 3)).astype(np.float32)
    changes = 0.1 * rng.standard_normal((FACTORS, request.param, 7, 3)).astype(np.float32)
    changes[:, 0] = 0

    def logits(levels):
        return dense + sum(changes[factor, level] for factor, level in enumerate(levels))

    design = make_design(FACTORS, request.param, fewest_runs(FACTORS, request.param), seed=1)
    return design, dense, changes, logits


def test_effects_on_logits_are_found_exactly(additive):
    design, _, changes, logits = additive
    mean, found = logit_effects(design, np.stack([logits(levels) for levels in design.levels]))
    centred = changes - changes.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found, centred, atol=1e-6)
    np.testing.assert_allclose(mean, logits([]) + changes.mean(axis=1).sum(axis=0), atol=1e-6)


def test_a_squared_error_of_any_configuration_is_predicted(additive):
    design, dense, changes, logits = additive
    loss = make_loss(dense)
    effects = estimate_effects(design, np.stack([logits(levels) for levels in design.levels]), loss)
    for levels in itertools.product(range(changes.shape[1]), repeat=FACTORS):
        expected = 100 * np.mean((logits(levels) - dense) ** 2) / np.var(dense)
        assert effects.predict(np.array(levels)) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_cross_entropy_is_predicted_to_the_second_order(additive):
    design, dense, changes, logits = additive
    labels = np.arange(7) % 3
    loss = make_loss(dense, labels)
    effects = estimate_effects(design, np.stack([logits(levels) for levels in design.levels]), loss)
    every = list(itertools.product(range(changes.shape[1]), repeat=FACTORS))
    shifted = np.stack([logits(levels) for levels in every]).astype(np.float64)
    sums = np.log(np.exp(shifted).sum(axis=-1))
    expected = np.mean(sums - np.take_along_axis(shifted, labels[None, :, None], 2)[..., 0], axis=1)
    found = [effects.predict(np.array(levels)) for levels in every]
    assert np.max(np.abs(found - expected)) < 0.1 * np.ptp(expected)
    assert float(loss(jnp.asarray(dense))) == pytest.approx(expected[0], rel=1e-5)
