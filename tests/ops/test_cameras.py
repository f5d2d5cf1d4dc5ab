"""Rays and projections against each other, closed forms and a scene with exact depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.data.scenes import analytic_scene
from shiftaddvit_jax.ops.cameras import (
    Rays,
    direction_differences,
    inside,
    pixel_directions,
    project,
    ray_depths,
)


@pytest.fixture(scope="module")
def scene():
    return analytic_scene(views=4, side=24)


def test_the_first_pixel_s_ray_goes_through_its_centre():
    intrinsics = jnp.array([[2.0, 0, 3], [0, 4, 5], [0, 0, 1]])
    found = pixel_directions(jnp.array([[0.0, 0.0], [3.0, 5.0]]), intrinsics, jnp.eye(4))
    np.testing.assert_allclose(found, [[-1.5, -1.25, 1], [0, 0, 1]])


def test_true_depths_lie_where_the_other_view_sees_them(scene):
    """Reprojection of exact depths: a surface that both see has the same place and, there, the same depth."""
    side = scene.images.shape[1]
    pixels = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2).astype(np.float32)
    with jax.enable_x64(True):
        origins = np.broadcast_to(scene.poses[0, :3, 3], (side * side, 3))
        directions = pixel_directions(pixels.astype(float), scene.intrinsics[0], scene.poses[0])
        points = Rays(origins, directions, scene.depths[0].reshape(-1, 1)).points[:, 0]
        back, depths = project(points, scene.intrinsics[0], scene.poses[0])
    np.testing.assert_allclose(back, pixels, atol=1e-4)
    np.testing.assert_allclose(depths, scene.depths[0].ravel(), rtol=1e-9)


def test_projection_is_what_the_renderer_sees(scene):
    """A point of view 0 that view 1 sees, too, has view 1's depth at its pixel."""
    from shiftaddvit_jax.data.analytic_scenes import _look, demo_surfaces

    side = scene.images.shape[1]
    pixels = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2).astype(float)
    with jax.enable_x64(True):
        directions = pixel_directions(pixels, scene.intrinsics[0], scene.poses[0])
        points = scene.poses[0, :3, 3] + scene.depths[0].reshape(-1, 1) * directions
        places, depths = (np.asarray(it) for it in project(points, scene.intrinsics[1], scene.poses[1]))
    _, there = _look(demo_surfaces(), places, scene.intrinsics[1], scene.poses[1])
    seen = depths < there * 1.001
    assert seen.mean() > 0.5
    np.testing.assert_allclose(depths[seen], there[seen], rtol=1e-6)
    assert np.all(depths[~seen] > there[~seen])


def test_float32_is_good_to_a_ten_thousandth_of_a_pixel(scene):
    pixels = jnp.array([[3.0, 7.0], [20.0, 11.0]])
    intrinsics, pose = (jnp.asarray(it[0], jnp.float32) for it in (scene.intrinsics, scene.poses))
    points = pose[:3, 3] + 3.7 * pixel_directions(pixels, intrinsics, pose)
    np.testing.assert_allclose(project(points, intrinsics, pose)[0], pixels, atol=1e-4)


def test_points_behind_the_camera_have_negative_depths():
    pixels, depths = project(jnp.array([[0.0, 0, -2], [0, 0, 2]]), jnp.eye(3), jnp.eye(4))
    np.testing.assert_allclose(depths, [-2, 2])
    assert np.isfinite(pixels).all()


def test_inside_has_the_borders_pixels():
    points = jnp.array([[0.0, 0], [6, 4], [6.01, 4], [-0.01, 0], [0, 4.01]])
    np.testing.assert_array_equal(inside(points, height=5, width=7), [True, True, False, False, False])


def test_depths_are_uniform_in_inverse_depth():
    depths = ray_depths(2.0, 6.0, rays=3, points=5)
    np.testing.assert_allclose(depths, 1 / np.linspace([1 / 2] * 3, [1 / 6] * 3, 5).T, rtol=1e-6)


def test_drawn_depths_stay_in_their_intervals():
    middle = np.asarray(ray_depths(2.0, 6.0, 1, 5))[0]
    drawn = np.asarray(ray_depths(2.0, 6.0, 500, 5, jax.random.key(0)))
    ends = np.concatenate([middle[:1], (middle[1:] + middle[:-1]) / 2, middle[-1:]])
    assert np.all((drawn >= ends[:-1] - 1e-6) & (drawn <= ends[1:] + 1e-6))
    np.testing.assert_allclose(drawn.mean(axis=0), (ends[1:] + ends[:-1]) / 2, rtol=0.02)


def test_difference_to_the_ray_s_own_camera_has_a_finite_gradient():
    origins, points = jnp.zeros((1, 3)), jnp.array([[[0.0, 0, 2]]])

    def value(sources):
        return jnp.sum(direction_differences(points, origins, sources))

    found = direction_differences(points, origins, jnp.zeros((1, 3)))
    np.testing.assert_allclose(found, [[[[0, 0, 0, 1]]]], atol=1e-5)
    assert np.isfinite(jax.grad(value)(jnp.zeros((1, 3)))).all()
