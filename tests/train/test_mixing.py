"""Boxes, shares and labels are compared with those of timm.data.mixup, timm 1.0.31, and with closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.train.mixing import Mixing, cutmix_box, draw_shares, mix

mix_jitted = jax.jit(mix, static_argnums=(0, 4))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return rng.standard_normal((6, 16, 12, 3)).astype(np.float32), np.array([0, 1, 2, 3, 4, 2])


def smoothed(labels, classes, smoothing):
    return np.eye(classes)[labels] * (1 - smoothing) + smoothing / classes


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_mixup_is_a_mean_of_images_and_labels(batch, mode):
    images, labels = batch
    mixing = Mixing(cutmix_alpha=0.0, mode=mode)
    mixed, targets = mix_jitted(mixing, jax.random.key(1), images, labels, 5)
    # The shares, read back from the images.
    difference = images - images[::-1]
    shares = ((mixed - images[::-1]) * difference).sum((1, 2, 3)) / (difference**2).sum((1, 2, 3))
    assert len(np.unique(np.round(shares, 4))) == (1 if mode == "batch" else 6)
    part = shares[:, None, None, None]
    np.testing.assert_allclose(mixed, part * images + (1 - part) * images[::-1], atol=1e-5)
    plain = smoothed(labels, 5, 0.1)
    np.testing.assert_allclose(
        targets, shares[:, None] * plain + (1 - shares[:, None]) * plain[::-1], atol=1e-5
    )
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_cutmix_pastes_a_box_and_weighs_labels_by_area(batch, mode):
    images, labels = batch
    mixing = Mixing(mixup_alpha=0.0, mode=mode, label_smoothing=0.0)
    areas = []
    for seed in range(5):
        mixed, targets = mix_jitted(mixing, jax.random.key(seed), images, labels, 5)
        pasted = np.all(np.asarray(mixed) == images[::-1], -1)
        assert (pasted | np.all(np.asarray(mixed) == images, -1)).all()
        for inside in pasted:
            rows, columns = inside.any(1), inside.any(0)
            np.testing.assert_array_equal(inside, rows[:, None] & columns)
            for side in (rows, columns):
                assert np.abs(np.diff(np.pad(side.astype(int), 1))).sum() in (0, 2)
        share = 1 - pasted.mean((1, 2))[:, None]
        plain = smoothed(labels, 5, 0)
        np.testing.assert_allclose(targets, share * plain + (1 - share) * plain[::-1], atol=1e-6)
        areas.append(share)
    assert len(np.unique(areas)) > (1 if mode == "batch" else 5)


@pytest.mark.parametrize(
    ("share", "row", "column", "height", "width", "box", "kept"),
    [  # what cutmix_bbox_and_lam returns for such a lambda and centre: top, bottom, left and right; lambda
        (0.75, 16, 10, 32, 24, (8, 24, 4, 16), 0.75),
        (0.25, 0, 23, 32, 24, (0, 14, 13, 24), 0.7994791666666666),
        (0.5, 31, 0, 32, 24, (20, 32, 0, 8), 0.875),
        (0.0, 8, 8, 16, 16, (0, 16, 0, 16), 0.0),
        (1.0, 3, 3, 16, 16, (3, 3, 3, 3), 1.0),
        (0.19, 5, 9, 17, 13, (0, 13, 4, 13), 0.47058823529411764),
    ],
)
def test_boxes_are_timms(share, row, column, height, width, box, kept):
    inside, found = cutmix_box(jnp.array([share]), jnp.array([row]), jnp.array([column]), height, width)
    top, bottom, left, right = box
    expected = np.zeros((height, width), bool)
    expected[top:bottom, left:right] = True
    np.testing.assert_array_equal(inside[0], expected)
    np.testing.assert_allclose(found[0], kept, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_are_of_a_beta_distribution(alpha):
    shares, cut = draw_shares(Mixing(alpha, 0.0), jax.random.key(0), 1000)
    deviation = math.sqrt(1 / (4 * (2 * alpha + 1)))
    assert not cut.any()
    assert abs(shares.mean() - 0.5) < 4 * deviation / math.sqrt(1000)
    assert float(shares.std()) == pytest.approx(deviation, rel=0.1)
    assert 0 <= shares.min() < 0.02
    assert 0.98 < shares.max() <= 1


def test_kept_areas_have_timms_moments():
    # Mean and deviation of 100,000 corrected lambdas of timm, alpha 1, 32 x 32 pixels.
    images, labels = np.zeros((1000, 32, 32, 3), np.float32), np.repeat([0, 1], 500)
    _, targets = mix_jitted(
        Mixing(0.0, 1.0, mode="elem", label_smoothing=0.0), jax.random.key(0), images, labels, 2
    )
    kept = np.asarray(targets)[np.arange(1000), labels]
    assert abs(kept.mean() - 0.68947) < 4 * 0.18649 / math.sqrt(1000)
    assert kept.std() == pytest.approx(0.18649, rel=0.1)


def test_probabilities_are_kept():
    shares, cut = draw_shares(Mixing(probability=0.6, switch_probability=0.25), jax.random.key(0), 2000)
    assert abs(float((shares == 1).mean()) - 0.4) < 0.05
    assert abs(float(cut.mean()) - 0.25) < 0.05


def test_switched_off_only_labels_are_smoothed_and_nothing_is_compiled_again(batch):
    images, labels = batch
    traced = jax.jit(lambda *given: mix(*given), static_argnums=(0, 4))  # with a cache of its own
    mixed, _ = traced(Mixing(), jax.random.key(0), images, labels, 5, jnp.array(True))
    assert not np.array_equal(mixed, images)
    mixed, targets = traced(Mixing(), jax.random.key(0), images, labels, 5, jnp.array(False))
    assert traced._cache_size() == 1
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_allclose(targets, smoothed(labels, 5, 0.1), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "element"}, "did you mean 'elem'"),
        ({"mixup_alpha": -1.0}, "mixup_alpha must be at least 0"),
        ({"switch_probability": 2.0}, "switch_probability must be from 0 to 1"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Mixing(**change)
