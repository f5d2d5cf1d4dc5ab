import numpy as np
import pytest

from shiftaddvit_jax.data import (
    evaluation_batches,
    load_dataset,
    load_image,
    normalize,
    preprocess,
    train_iterator,
)
from shiftaddvit_jax.data.sources import Examples
from shiftaddvit_jax.models import Preprocessing

PIXELS = Preprocessing(size=32, resize_to=32)
SETTINGS = {"preprocessing": PIXELS, "batch_size": 16, "augmentation": "affine", "seed": 3}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("first_batch", [1, 76])
def test_a_batch_depends_on_its_number_alone(digits, first_batch):
    # 1,198 images make 74.9 batches, so batch 76 is in the second epoch.
    ahead = take(train_iterator(digits.train, **SETTINGS), first_batch + 2)[first_batch:]
    resumed = take(train_iterator(digits.train, **SETTINGS, first_batch=first_batch), 2)
    for one, other in zip(ahead, resumed, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_an_epoch_shows_every_image_once_and_the_next_another_order():
    examples = Examples(np.arange(10), np.arange(10), lambda index: np.full((4, 4, 3), index, np.uint8))
    iterator = train_iterator(
        examples, preprocessing=PIXELS.at_size(4), batch_size=5, augmentation="none", seed=0
    )
    epochs = [np.concatenate([batch["label"] for batch in take(iterator, 2)]) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize("augmentation", ["none", "affine", "crop_flip"])
def test_training_batches_have_the_promised_shape_and_labels(digits, augmentation):
    batch = next(train_iterator(digits.train, **{**SETTINGS, "augmentation": augmentation}))
    assert batch["image"].shape == (16, 32, 32, 3)
    assert batch["image"].dtype == np.float32
    assert set(batch["label"]) <= set(range(10))


@pytest.mark.parametrize("augmentation", ["affine", "crop_flip"])
def test_augmentation_changes_images_from_epoch_to_epoch(augmentation):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    examples = Examples([pixels], [0], lambda image: image)
    first, second = take(
        train_iterator(
            examples, preprocessing=PIXELS.at_size(8), batch_size=1, augmentation=augmentation, seed=0
        ),
        2,
    )
    assert not np.array_equal(first["image"], second["image"])


def test_batches_have_the_pixels_that_the_model_expects():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    examples = Examples([pixels], [0], lambda image: image)
    halves = Preprocessing(size=8, resize_to=8, mean=(0.5,) * 3, deviation=(0.25,) * 3, channels="bgr")
    expected = preprocess(pixels, halves)
    ((evaluated, _),) = evaluation_batches(examples, preprocessing=halves, batch_size=1)
    np.testing.assert_array_equal(evaluated["image"][0], expected)
    settings = {"preprocessing": halves, "batch_size": 1, "augmentation": "none", "seed": 0}
    np.testing.assert_array_equal(next(train_iterator(examples, **settings))["image"][0], expected)


def test_normalization_is_imagenets():
    image = np.array([[[0, 128, 255]]], np.uint8)
    expected = (np.array([0, 128 / 255, 1]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(image)[0, 0], expected, rtol=1e-5)


def test_test_examples_show_every_image_once_in_order_and_say_what_is_padding(digits):
    batches = list(evaluation_batches(digits.test, preprocessing=PIXELS, batch_size=100))
    assert [real for _, real in batches] == [100] * 5 + [99]
    labels = np.concatenate([batch["label"][:real] for batch, real in batches])
    np.testing.assert_array_equal(labels, digits.test.labels)
    assert all(batch["image"].shape == (100, 32, 32, 3) for batch, _ in batches)
    assert not batches[-1][0]["image"][-1].any()


def test_a_wide_image_is_cut_to_its_centre():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    ((batch, _),) = evaluation_batches(
        Examples([wide], [0], lambda image: image), preprocessing=PIXELS.at_size(4), batch_size=1
    )
    np.testing.assert_allclose(batch["image"][0], normalize(np.full((4, 4, 3), 255, np.uint8)), atol=1e-6)


@pytest.mark.parametrize("content", [None, b"no image"])
def test_an_unreadable_image_is_refused_by_name(tmp_path, content):
    path = tmp_path / "picture.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"picture\.png"):
        load_image(path, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augmentation": "afine"}, "did you mean 'affine'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(digits, change, message):
    with pytest.raises(ValueError, match=message):
        train_iterator(digits.train, **{**SETTINGS, **change})
