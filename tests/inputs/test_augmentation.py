"""Pixels and moments are compared with those of timm 1.0.31, by Pillow 13.0 and torchvision 0.28."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from shiftaddvit_jax.data.augmentation import (
    INCREASING_OPERATIONS,
    OPERATIONS,
    Augmentation,
    Policy,
    apply_operation,
    color_jitter,
    mean_color,
    parse_policy,
    rand_augment,
    random_crop_box,
    random_erasing,
    random_flip,
    random_resized_crop,
    three_augment,
)
from shiftaddvit_jax.data.images import Jpeg, open_image, whole
from shiftaddvit_jax.models import Preprocessing

PIXELS = Preprocessing(size=16, resize_to=16)
# timm's AugmentOp at probability 1, filled with ImageNet's mean: OPERATION/MAGNITUDE/SIGN/INTERPOLATION. What
# no sign or interpolation changes is there once.
with np.load(Path(__file__).parents[1] / "data" / "timm_randaugment.npz") as arrays:
    TIMM = dict(arrays)
IMAGE = TIMM.pop("image")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_operations_are_timms():
    assert {key.split("/")[0] for key in TIMM} == {*OPERATIONS, *INCREASING_OPERATIONS}
    assert len(OPERATIONS) == len(INCREASING_OPERATIONS) == 15


@pytest.mark.parametrize("name", dict.fromkeys(OPERATIONS + INCREASING_OPERATIONS))
def test_an_operation_gives_timms_pixels(name):
    fill = mean_color(PIXELS)
    for key in (key for key in TIMM if key.startswith(f"{name}/")):
        _, magnitude, sign, interpolation = key.split("/")
        found = apply_operation(
            IMAGE, name, float(magnitude), sign=int(sign), fill=fill, interpolation=interpolation
        )
        np.testing.assert_array_equal(found, TIMM[key], err_msg=key)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="did you mean 'Rotate'"):
        apply_operation(IMAGE, "Rotat", 5)


def test_weak_magnitudes_keep_all_bits():
    np.testing.assert_array_equal(apply_operation(IMAGE, "Posterize", 25), IMAGE)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("rand", Policy()),
        ("rand-m9-mstd0.5-inc1", Policy(magnitude=9, deviation=0.5, increasing=True)),
        ("rand-n3-m7-p1-mmax15", Policy(magnitude=7, layers=3, probability=1.0, maximum=15)),
        ("rand-mstd101", Policy(deviation=math.inf)),
    ],
)
def test_policies_are_read_as_timm_writes_them(text, policy):
    assert parse_policy(text) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("augmix-m3", "unknown policy 'augmix-m3'"),
        ("rand-w0", "unknown part 'w0'"),
        ("rand-m", "unknown part 'm'"),
        ("rand-m9.5", "'m9.5' in the policy 'rand-m9.5' must be a whole number"),
    ],
)
def test_other_policies_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


def test_randaugment_applies_drawn_operations_half_the_time(rng):
    # One of 15 operations is drawn; half the time it is not applied, and never changes anything.
    policy = parse_policy("rand-n1-m9-mstd0.5-inc1")
    fill = mean_color(PIXELS)
    unchanged = sum(
        np.array_equal(rand_augment(IMAGE, policy, rng, fill=fill, interpolation="bicubic"), IMAGE)
        for _ in range(1000)
    )
    assert 0.44 < unchanged / 1000 < 0.57


@pytest.mark.parametrize("deviation", [0.0, math.inf])
def test_randaugment_draws_magnitudes_signs_and_interpolations(rng, deviation):
    policy = Policy(magnitude=9, layers=1, deviation=deviation, probability=1.0)
    seen = {rand_augment(IMAGE, policy, rng, fill=mean_color(PIXELS)).tobytes() for _ in range(400)}
    exact = {
        pixels.tobytes()
        for key, pixels in TIMM.items()
        if key.split("/")[1] == "9" and key.split("/")[0] in OPERATIONS
    }
    if deviation:
        assert len(seen) > len(exact)
    else:
        assert seen == exact


def test_magnitudes_are_clipped_to_the_maximum(rng):
    policy = Policy(magnitude=9, layers=1, deviation=50.0, probability=1.0, increasing=True)
    strongest = apply_operation(IMAGE, "SolarizeAdd", 10)
    seen = [rand_augment(IMAGE, policy, rng).tobytes() for _ in range(300)]
    assert strongest.tobytes() in seen


def test_crops_have_timms_moments(rng):
    # Means and deviations of 200,000 draws of RandomResizedCropAndInterpolation.get_params.
    boxes = np.array([random_crop_box(240, 320, rng) for _ in range(1000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    draws = {
        (0.433, 0.2167): width * height / (320 * 240),
        (0.0305, 0.1644): np.log(width / height),
        (0.1401, 0.1359): boxes[:, 1] / 240,
        (0.2187, 0.1617): boxes[:, 0] / 320,
    }
    for (mean, deviation), drawn in draws.items():
        assert abs(drawn.mean() - mean) < 4 * deviation / math.sqrt(1000)
        assert drawn.std() == pytest.approx(deviation, rel=0.1)
    area, aspect = width * height / (320 * 240), width / height
    assert 0.078 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.73 < aspect.min() < 0.78
    assert 1.28 < aspect.max() < 1.37
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 320).all()
    assert (boxes[:, 3] <= 240).all()


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(20, 400, (186, 0, 213, 20)), (401, 20, (0, 187, 20, 214)), (20, 20, (0, 0, 20, 20))],
)
def test_a_crop_that_fits_nowhere_is_the_centres(rng, height, width, box):
    # The first two are what get_params returns for such images.
    scale = (0.9, 1.0) if height != width else (1.5, 1.5)
    assert random_crop_box(height, width, rng, scale) == box


def test_a_crop_is_cut_before_it_is_resized():
    box = random_crop_box(20, 24, np.random.default_rng(3))
    found = random_resized_crop(IMAGE, 16, np.random.default_rng(3), interpolation="bilinear")
    expected = Image.fromarray(IMAGE).crop(box).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found, expected)


def test_random_interpolation_is_bilinear_or_bicubic(rng):
    whole = {"scale": (1.0, 1.0), "ratio": (1.2, 1.2)}
    seen = {random_resized_crop(IMAGE, 16, rng, **whole).tobytes() for _ in range(20)}
    assert seen == {
        random_resized_crop(IMAGE, 16, rng, **whole, interpolation=name).tobytes()
        for name in ("bilinear", "bicubic")
    }


def test_half_the_images_are_mirrored(rng):
    flipped = [random_flip(IMAGE, rng) for _ in range(1000)]
    mirrored = sum(np.array_equal(image, IMAGE[:, ::-1]) for image in flipped)
    assert 440 < mirrored < 560
    assert mirrored + sum(np.array_equal(image, IMAGE) for image in flipped) == 1000


@pytest.mark.parametrize(
    ("strength", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_colour_jitter_multiplies_by_factors_in_its_range(strength, enhancer):
    found = [color_jitter(IMAGE, np.random.default_rng(seed), **{strength: 0.4}) for seed in range(20)]
    factors = np.linspace(0.6, 1.4, 801)
    steps = np.stack([np.asarray(enhancer(Image.fromarray(IMAGE)).enhance(factor)) for factor in factors])
    nearest = []
    for image in found:
        distances = np.abs(steps.astype(int) - image).max(axis=(1, 2, 3))
        assert distances.min() <= 1
        nearest.append(factors[distances.argmin()])
    assert min(nearest) < 0.8
    assert max(nearest) > 1.2


def test_hue_turns_as_torchvision_turns_it():
    # torchvision's adjust_hue: HSV's hue of 8 bits, turned by int(255 * turn), wrapping around.
    class Lowest(np.random.Generator):
        def uniform(self, low, high):
            return low

    hsv = np.array(Image.fromarray(IMAGE).convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(int) - 76) % 256
    found = color_jitter(IMAGE, Lowest(np.random.PCG64(0)), hue=0.3)
    np.testing.assert_array_equal(found, Image.fromarray(hsv, "HSV").convert("RGB"))


def test_no_strength_changes_no_colour(rng):
    np.testing.assert_array_equal(color_jitter(IMAGE, rng), IMAGE)


def test_three_augment_is_grey_solarized_or_blurred(rng):
    picture = Image.fromarray(IMAGE)
    grey = np.asarray(picture.convert("L").convert("RGB"))
    solarized = np.asarray(ImageOps.solarize(picture, 128))
    least = np.asarray(picture.filter(ImageFilter.GaussianBlur(2.0))).std()
    counts = {"grey": 0, "solarized": 0, "blurred": 0}
    for _ in range(600):
        image = three_augment(IMAGE, rng)
        if np.array_equal(image, grey):
            counts["grey"] += 1
        elif np.array_equal(image, solarized):
            counts["solarized"] += 1
        else:
            counts["blurred"] += 1
            assert least - 0.01 <= image.std() <= IMAGE.std() + 0.01
    assert all(150 < count < 250 for count in counts.values())


@pytest.mark.parametrize(
    ("count", "share", "mean", "deviation"), [(1, 0.25, 0.1722, 0.0889), (3, 0.25, 0.1676, 0.0668)]
)
def test_erased_areas_have_timms_moments(rng, count, share, mean, deviation):
    # Mean and deviation of 5,000 erased areas of RandomErasing(probability=0.25, max_count=count).
    image = np.ones((48, 64, 3), np.float32)
    erased = [1 - random_erasing(image, rng, probability=share, max_count=count).mean() for _ in range(1000)]
    areas = np.array([area for area in erased if area > 0])
    assert abs(len(areas) / 1000 - share) < 0.06
    assert abs(areas.mean() - mean) < 4 * deviation / math.sqrt(len(areas))
    assert areas.std() == pytest.approx(deviation, rel=0.2)
    assert areas.min() > 0.018
    assert areas.max() < 0.345
    assert image.all()


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erased_pixels_are_the_modes(rng, mode):
    image = np.full((40, 40, 3), 9, np.float32)
    values, colours = [], []
    for _ in range(200):
        erased = random_erasing(image, rng, probability=1.0, mode=mode)
        changed = erased[(erased != 9).all(-1)]
        values.append(changed.mean())
        colours.append(len(np.unique(changed, axis=0)))
    if mode == "const":
        assert not np.any(values)
    else:
        assert abs(np.mean(values)) < 0.2
    assert (max(colours) == 1) == (mode != "pixel")


def test_an_unknown_mode_is_refused(rng):
    with pytest.raises(ValueError, match="did you mean 'pixel'"):
        random_erasing(np.ones((8, 8, 3), np.float32), rng, probability=1.0, mode="pixels")


@pytest.mark.parametrize("policy", ["", "3a", "rand-m9-mstd0.5-inc1"])
def test_an_augmented_image_is_what_the_model_takes(policy):
    augmentation = Augmentation(policy=policy, erase=0.25, erase_mode="pixel")
    images = [augmentation(IMAGE, PIXELS, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert images[0].shape == (16, 16, 3)
    assert images[0].dtype == np.float32
    np.testing.assert_array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_without_changes_an_image_is_resized_and_normalized(rng):
    still = Augmentation((1.0, 1.0), (1.2, 1.2), "bicubic", flip=0.0, color_jitter=(0.0, 0.0, 0.0, 0.0))
    resized = np.asarray(Image.fromarray(IMAGE).resize((16, 16), Image.Resampling.BICUBIC))
    expected = (resized / 255 - PIXELS.mean) / PIXELS.deviation
    np.testing.assert_allclose(still(IMAGE, PIXELS, rng), expected, rtol=1e-4, atol=1e-5)


def test_the_mean_colour_is_the_models():
    assert mean_color(PIXELS) == (124, 116, 104)
    caffe = Preprocessing(
        size=8, resize_to=8, rescale=1.0, mean=(103.5, 116.3, 123.7), deviation=(1.0,) * 3, channels="bgr"
    )
    assert mean_color(caffe) == (124, 116, 104)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scale", (0.5, 0.1), "scale must be two rising numbers"),
        ("ratio", (0.0, 1.0), "ratio must be two rising numbers"),
        ("flip", 1.5, "flip must be a probability"),
        ("erase", -0.1, "erase must be a probability"),
        ("interpolation", "cubic", "did you mean 'bicubic'"),
        ("erase_mode", "constant", "did you mean 'const'"),
        ("erase_count", 0, "erase_count must be at least 1"),
        ("color_jitter", (0.4, 0.4), "one, three or four strengths"),
        ("policy", "rand-x1", "unknown part 'x1'"),
    ],
)
def test_wrong_settings_are_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**{field: value})


@pytest.mark.parametrize(("side", "shrink"), [(40, 1), (64, 2), (130, 4), (300, 8)])
def test_a_jpeg_is_decoded_as_small_as_the_crop_allows(monkeypatch, side, shrink):
    asked = []
    monkeypatch.setattr(Jpeg, "decode", lambda self, by=1: asked.append(by) or large[::by, ::by])
    large = np.zeros((side, side, 3), np.uint8)
    large[:, side // 2 :] = 255
    image = Jpeg(b"", "a.jpg", (side, side), None)
    whole = {"scale": (1, 1), "ratio": (1, 1), "interpolation": "bilinear"}
    cut = random_resized_crop(image, 32, np.random.default_rng(0), **whole)
    assert asked == [shrink]
    np.testing.assert_array_equal(cut[:, [0, 10, 21, 31], 0], [[0, 0, 255, 255]] * 32)


def test_a_crop_of_a_shrunk_jpeg_is_that_of_the_whole_picture(tmp_path):
    rows, columns = np.mgrid[:400, :500]
    waves = np.stack([np.sin(rows / 40), np.cos(columns / 50), rows / 400], -1)
    Image.fromarray((127 + 100 * waves).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    image = open_image(tmp_path / "a.jpg")
    for seed in range(10):
        small, large = (
            random_resized_crop(each, 40, np.random.default_rng(seed)) for each in (image, whole(image))
        )
        assert abs(small.astype(int) - large.astype(int)).mean() < 2
