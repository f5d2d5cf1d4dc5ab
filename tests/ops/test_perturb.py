"""Perturbations of images against SciPy, closed forms and finite differences."""

from functools import partial

import jax
import numpy as np
import pytest
import scipy.ndimage

from shiftaddvit_jax.ops.perturb import (
    add_noise,
    adjust_brightness,
    adjust_contrast,
    gaussian_blur,
    rotate_hue,
    warp,
)

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.random((2, 12, 17, 3), np.float32)
NOISE = RANDOM.standard_normal(IMAGES.shape, np.float32)


@pytest.mark.parametrize(
    "nothing",
    [
        warp,
        partial(warp, rotation=360.0),
        partial(warp, rotation=-720.0),
        partial(gaussian_blur, deviation=0.0),
        partial(adjust_brightness, factor=1.0),
        partial(adjust_contrast, factor=1.0),
        partial(rotate_hue, rotation=0.0),
        partial(rotate_hue, rotation=360.0),
        partial(add_noise, noise=NOISE, deviation=0.0),
    ],
)
def test_nothing_leaves_every_bit(nothing):
    np.testing.assert_array_equal(jax.jit(nothing)(IMAGES), IMAGES)


def test_a_warp_is_scipys():
    rotation, scale, shift_x, shift_y = 25.0, 1.3, 0.1, -0.2
    cosine, sine = np.cos(np.radians(rotation)), np.sin(np.radians(rotation))
    # Counter-clockwise as seen, where rows go down: of (row, column), from the output to the input.
    matrix = np.array([[cosine, sine], [-sine, cosine]]) / scale
    centre = (np.array(IMAGES.shape[1:3]) - 1) / 2
    shift = np.array([shift_y * 12, shift_x * 17])
    offset = centre - matrix @ (centre + shift)
    for image, ours in zip(IMAGES, warp(IMAGES, rotation, scale, shift_x, shift_y), strict=True):
        for channel in range(3):
            theirs = scipy.ndimage.affine_transform(
                image[..., channel], matrix, offset, order=1, mode="nearest"
            )
            np.testing.assert_allclose(ours[..., channel], theirs, atol=1e-5)


def test_a_quarter_turn_is_counter_clockwise():
    square = IMAGES[:, :, :12]
    np.testing.assert_allclose(warp(square, rotation=90.0), np.rot90(square, axes=(1, 2)), atol=1e-5)


def test_a_positive_shift_is_to_the_right_and_down():
    moved = np.asarray(warp(IMAGES, shift_x=1 / 17, shift_y=2 / 12))
    np.testing.assert_allclose(moved[:, 2:, 1:], IMAGES[:, :-2, :-1], atol=1e-5)


@pytest.mark.parametrize("deviation", [0.3, 1.0, 4.0])
def test_blur_is_scipys_within_the_image(deviation):
    settings = {"sigma": deviation, "mode": "constant", "truncate": 10.0, "axes": (1, 2)}
    weight = scipy.ndimage.gaussian_filter(np.ones_like(IMAGES), **settings)
    theirs = scipy.ndimage.gaussian_filter(IMAGES, **settings) / weight
    np.testing.assert_allclose(gaussian_blur(IMAGES, deviation), theirs, atol=1e-5)


def test_brightness_and_contrast_are_their_formulas():
    np.testing.assert_allclose(adjust_brightness(IMAGES, 1.7), np.minimum(IMAGES * 1.7, 1), atol=1e-6)
    mean = IMAGES.mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(
        adjust_contrast(IMAGES, 1.7), np.clip(mean + 1.7 * (IMAGES - mean), 0, 1), atol=1e-6
    )


def test_a_third_of_a_turn_makes_red_green_and_green_blue():
    colors = np.eye(3, dtype=np.float32)[None, None]
    np.testing.assert_allclose(rotate_hue(colors, 120.0), np.roll(colors, 1, axis=-1), atol=1e-6)


def test_grays_have_no_hue():
    grays = np.repeat(IMAGES[..., :1], 3, axis=-1)
    np.testing.assert_allclose(rotate_hue(grays, 77.0), grays, atol=1e-6)


def test_noise_is_added_and_cut():
    np.testing.assert_allclose(add_noise(IMAGES, NOISE, 0.5), np.clip(IMAGES + 0.5 * NOISE, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("operation", "at"),
    [
        (lambda images, x: warp(images, rotation=x), 13.0),
        (lambda images, x: warp(images, scale=x), 1.23),
        (lambda images, x: warp(images, shift_x=x), 0.043),
        (lambda images, x: warp(images, shift_y=x), -0.061),
        (gaussian_blur, 0.9),
        (adjust_brightness, 0.8),
        (adjust_contrast, 0.6),
        (rotate_hue, 8.0),
        (lambda images, x: add_noise(images, NOISE.astype(images.dtype), x), 0.01),
    ],
)
def test_gradients_are_finite_differences(operation, at):
    with jax.enable_x64(True):
        images = 0.3 + 0.4 * IMAGES.astype(np.float64)  # far from the cuts at 0 and 1
        weights = np.cos(np.arange(images.size)).reshape(images.shape)

        def of(x):
            return (operation(images, x) * weights).sum()

        step = 1e-7
        expected = (of(at + step) - of(at - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(of)(at), expected, rtol=1e-4, atol=1e-5)
