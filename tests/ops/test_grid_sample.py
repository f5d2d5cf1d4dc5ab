"""Bilinear reading against torch, closed forms and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from shiftaddvit_jax.ops import grid_sample


def _torch(images, points, padding_mode):
    height, width = images.shape[1:3]
    size = torch.tensor([width - 1.0, height - 1.0])
    grid = (2 * torch.tensor(points) / size - 1)[:, None]
    result = torch.nn.functional.grid_sample(
        torch.tensor(images).permute(0, 3, 1, 2), grid, padding_mode=padding_mode, align_corners=True
    )
    return result[:, :, 0].permute(0, 2, 1).numpy()


def _random(seed=0, batch=2, height=5, width=7, channels=3, count=200):
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((batch, height, width, channels)).astype(np.float32)
    points = generator.uniform([-3, -3], [width + 2, height + 2], (batch, count, 2)).astype(np.float32)
    return images, points


@pytest.mark.parametrize(("borders", "padding_mode"), [("zeros", "zeros"), ("edge", "border")])
@pytest.mark.parametrize("shape", [(5, 7), (2, 9), (16, 3)])
def test_equals_torch_inside_and_outside(borders, padding_mode, shape):
    images, points = _random(height=shape[0], width=shape[1])
    ours = jax.jit(grid_sample, static_argnums=2)(images, points, borders)
    np.testing.assert_allclose(ours, _torch(images, points, padding_mode), atol=2e-5)


def test_centres_of_pixels_are_exact():
    images, _ = _random()
    points = np.stack(np.meshgrid(np.arange(7.0), np.arange(5.0)), -1).reshape(1, -1, 2).astype(np.float32)
    ours = grid_sample(jnp.asarray(images), jnp.repeat(jnp.asarray(points), 2, 0))
    np.testing.assert_array_equal(ours, images.reshape(2, -1, 3))


@pytest.mark.parametrize("borders", ["zeros", "edge"])
def test_one_pixel_is_an_image(borders):
    image = jnp.full((1, 1, 1, 2), 3.0)
    points = jnp.array([[[0.0, 0.0], [5.0, 0.0]]])
    outside = 0.0 if borders == "zeros" else 3.0
    np.testing.assert_array_equal(grid_sample(image, points, borders), [[[3.0, 3.0], [outside, outside]]])


def test_points_far_outside_read_the_border():
    images, _ = _random()
    points = jnp.full((2, 1, 2), 1e12)
    np.testing.assert_array_equal(grid_sample(jnp.asarray(images), points), np.zeros((2, 1, 3)))
    np.testing.assert_array_equal(
        grid_sample(jnp.asarray(images), points, "edge")[:, 0], jnp.asarray(images)[:, -1, -1]
    )


@pytest.mark.parametrize("argument", [0, 1])
def test_gradient_equals_finite_differences(argument):
    images, points = _random(count=20)
    # A quarter and three quarters between centres: a step of 0.01 stays in the same cell.
    points = np.floor(points) + np.random.default_rng(1).choice([0.25, 0.75], points.shape).astype(np.float32)
    arguments = [jnp.asarray(images), jnp.asarray(points)]
    direction = np.random.default_rng(2).standard_normal(arguments[argument].shape).astype(np.float32)

    def value(step):
        moved = list(arguments)
        moved[argument] = moved[argument] + step * direction
        return jnp.sum(jnp.sin(grid_sample(*moved)))

    exact = jax.grad(value)(0.0)
    differences = (value(0.01) - value(-0.01)) / 0.02
    np.testing.assert_allclose(exact, differences, rtol=1e-2, atol=1e-2)


def test_bfloat16_images_stay_bfloat16():
    images, points = _random()
    ours = grid_sample(jnp.asarray(images, jnp.bfloat16), jnp.asarray(points))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(np.float32), grid_sample(jnp.asarray(images), points), atol=0.03)


def test_no_points_are_no_values():
    assert grid_sample(jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 0, 2))).shape == (2, 0, 3)


def test_other_borders_are_refused():
    with pytest.raises(ValueError, match="'zeros' or 'edge'"):
        grid_sample(jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 1, 2)), "reflect")
