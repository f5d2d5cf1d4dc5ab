"""Erasing on the device is compared with `random_erasing` on the host, which has the numbers of timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.data.augmentation import random_erasing
from shiftaddvit_jax.train.erasing import Erasing, draw_rectangles, erase

erase_jitted = jax.jit(erase, static_argnums=0)
DRAWS, HEIGHT, WIDTH = 2000, 24, 20


def sides(mask):
    """The height and width of each image's rectangle, [images] each; 0 without one."""
    return mask.any(-1).sum(-1), mask.any(-2).sum(-1)


@pytest.fixture(scope="module")
def rectangles():
    """Masks of one rectangle an image, as the host and as the device draw them."""
    rng, image = np.random.default_rng(0), np.ones((HEIGHT, WIDTH, 3), np.float32)
    host = [random_erasing(image, rng, probability=1.0)[..., 0] == 0 for _ in range(DRAWS)]
    device = erase_jitted(Erasing(1.0, "const"), jax.random.key(0), np.ones((DRAWS, HEIGHT, WIDTH, 3), "f4"))
    return np.stack(host), np.asarray(device)[..., 0] == 0


def test_what_is_erased_is_one_rectangle(rectangles):
    tall, wide = sides(rectangles[1])
    np.testing.assert_array_equal(rectangles[1].sum((1, 2)), tall * wide)


@pytest.mark.parametrize("measure", ["area", "height", "width", "top", "left"])
def test_rectangles_are_distributed_as_on_the_host(rectangles, measure):
    values = []
    for mask in rectangles:
        tall, wide = sides(mask)
        found = {
            "area": tall * wide,
            "height": tall,
            "width": wide,
            "top": mask.any(-1).argmax(-1),
            "left": mask.any(-2).argmax(-1),
        }[measure]
        values.append(found.astype(float))
    host, device = values
    error = host.std() * np.sqrt(2 / DRAWS)
    assert abs(host.mean() - device.mean()) < 4 * error
    assert device.std() == pytest.approx(host.std(), rel=0.1)
    for extreme in (np.min, np.max):
        assert abs(extreme(host) - extreme(device)) <= 0.1 * np.ptp(host)
    # Kolmogorov and Smirnov's distance of two samples of this size: above it by chance once in 10,000.
    levels = np.union1d(host, device)
    distance = max(abs((host <= level).mean() - (device <= level).mean()) for level in levels)
    assert distance < 2.23 * np.sqrt(2 / DRAWS)


def test_so_many_images_are_erased_and_so_many_rectangles_drawn():
    inside = draw_rectangles(Erasing(0.3, count=3), jax.random.key(1), DRAWS, HEIGHT, WIDTH)
    counts = np.asarray(inside.any((-2, -1)).sum(-1))
    shares = np.bincount(counts, minlength=4) / DRAWS
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.1, 0.1], atol=4 * np.sqrt(0.21 / DRAWS))


def test_several_rectangles_share_the_area():
    inside = np.asarray(draw_rectangles(Erasing(1.0, count=4), jax.random.key(2), 500, 64, 64))
    drawn = inside.any((-2, -1)).sum(-1)
    for count in (1, 4):
        area = inside[drawn == count].sum((-2, -1)).max(-1)
        assert 0.9 < area.max() / (64 * 64 / 3 / count) < 1.05


def test_an_image_that_no_rectangle_fits_stays():
    # On a row of pixels, no rectangle is lower than the image: ten attempts fail.
    images = np.ones((50, 1, 9, 3), np.float32)
    np.testing.assert_array_equal(erase_jitted(Erasing(1.0), jax.random.key(0), images), images)


@pytest.mark.parametrize(("mode", "values"), [("const", 1), ("rand", 3), ("pixel", None)])
def test_what_comes_instead(mode, values):
    images = np.full((200, HEIGHT, WIDTH, 3), 7, np.float32)
    erased = np.asarray(erase_jitted(Erasing(1.0, mode), jax.random.key(3), images))
    inside = (erased != 7).any(-1)
    for image, mask in zip(erased, inside, strict=True):
        assert len(np.unique(image[mask])) == (values or 3 * mask.sum())
    noise = erased[inside]
    if mode == "const":
        assert not noise.any()
        return
    # Each rectangle's colour counts once.
    noise = np.stack([image[mask][0] for image, mask in zip(erased, inside, strict=True)])
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(1, rel=0.1)


def test_of_overlapping_rectangles_the_last_ones_colour_stays():
    erasing, key = Erasing(1.0, "rand", count=3), jax.random.key(4)
    erased = np.asarray(erase_jitted(erasing, key, np.full((50, HEIGHT, WIDTH, 3), 7, np.float32)))
    inside = np.asarray(draw_rectangles(erasing, jax.random.split(key)[0], 50, HEIGHT, WIDTH))
    for image, masks in zip(erased, inside, strict=True):
        last = np.where(masks.any(0), len(masks) - masks[::-1].argmax(0), 0)
        for number in np.unique(last):
            assert len(np.unique(image[last == number], axis=0)) == 1


def test_the_dtype_stays():
    images = jnp.ones((2, 8, 8, 3), jnp.bfloat16)
    assert erase_jitted(Erasing(1.0, "pixel"), jax.random.key(0), images).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 1.5}, "probability must be from 0 to 1, got 1.5"),
        ({"mode": "pixels"}, "did you mean 'pixel'"),
        ({"count": 0}, "count must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Erasing(**change)
