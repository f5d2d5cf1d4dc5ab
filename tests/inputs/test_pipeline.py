import itertools

import numpy as np
import pytest
from PIL import Image

from shiftaddvit_jax.data import (
    AUGMENTATIONS,
    Examples,
    affine,
    evaluation_batches,
    load_dataset,
    load_image,
    no_augmentation,
    normalize,
    preprocess,
    train_iterator,
)
from shiftaddvit_jax.data.images import open_image
from shiftaddvit_jax.models import Preprocessing

PIXELS = Preprocessing(size=32, resize_to=32)
SETTINGS = {"preprocessing": PIXELS, "batch_size": 16, "augment": affine, "seed": 3}


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


def numbered(count):
    """Examples whose pixels say their number."""
    return Examples(np.arange(count), np.arange(count), lambda index: np.full((4, 4, 3), index, np.uint8))


def labels_of(examples, batches, first_batch=0, **settings):
    """Labels of that many batches, one row a batch."""
    small = {"preprocessing": PIXELS.at_size(4), "augment": no_augmentation, "seed": 0, **settings}
    iterator = train_iterator(examples, first_batch=first_batch, **small)
    return np.stack([batch["label"] for batch in take(iterator, batches)])


def test_an_epoch_shows_every_image_once_and_the_next_another_order():
    epochs = labels_of(numbered(10), 4, batch_size=5).reshape(2, 10)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert not np.array_equal(*epochs)


def test_a_batch_that_is_made_in_parts_is_whole():
    large, small = (labels_of(numbered(300), 300 // size, batch_size=size) for size in (150, 50))
    np.testing.assert_array_equal(large.reshape(-1), small.reshape(-1))


def test_two_epochs_on_two_hosts_that_stop_and_go_on_with_three_show_every_image_twice():
    # 18 images in batches of 6: six batches, the first two on two hosts, the others on three.
    settings = {"batch_size": 6, "seed": 4}
    before = np.hstack([labels_of(numbered(18), 2, host=host, hosts=2, **settings) for host in range(2)])
    after = np.hstack([labels_of(numbered(18), 4, 2, host=host, hosts=3, **settings) for host in range(3)])
    together = np.vstack([before, after])
    np.testing.assert_array_equal(together, labels_of(numbered(18), 6, **settings))
    first, second = together.reshape(2, 18)
    assert sorted(first) == sorted(second) == list(range(18))


def test_what_is_drawn_for_an_image_depends_on_its_place_alone(digits):
    whole = take(train_iterator(digits.train, **SETTINGS), 2)[1]["image"]
    rows = [
        take(train_iterator(digits.train, **SETTINGS, first_batch=1, host=host, hosts=4), 1)[0]["image"]
        for host in range(4)
    ]
    np.testing.assert_array_equal(np.concatenate(rows), whole)


def test_worker_processes_make_the_batches_that_threads_make(digits):
    iterator = train_iterator(digits.train, **SETTINGS, first_batch=3, workers=2)
    made = take(iterator, 3)
    iterator.close()
    for one, other in zip(
        made, take(train_iterator(digits.train, **SETTINGS, first_batch=3), 3), strict=True
    ):
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_a_repeated_image_comes_so_often_in_a_row_with_draws_of_its_own():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    examples = Examples(pixels, np.arange(6), lambda image: image)
    settings = {"preprocessing": PIXELS.at_size(8), "augment": affine, "seed": 0}
    first, second = take(train_iterator(examples, **settings, batch_size=9, repeats=3), 2)
    labels = np.concatenate([first["label"], second["label"]])
    assert sorted(labels[::3]) == list(range(6))
    np.testing.assert_array_equal(labels, np.repeat(labels[::3], 3))
    assert len({image.tobytes() for image in first["image"]}) == 9


@pytest.fixture
def with_bad_ones(tmp_path):
    """Twelve pictures, the files 3, 4 and 11 of which are damaged."""
    paths = []
    for number in range(12):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(paths[-1])
    for number in (3, 4, 11):
        paths[number].write_bytes(paths[number].read_bytes()[:50])
    return Examples(paths, np.arange(12), open_image)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_once_and_replaced_by_the_next(with_bad_ones, caplog, workers):
    iterator = train_iterator(
        with_bad_ones,
        preprocessing=PIXELS.at_size(4),
        batch_size=12,
        augment=no_augmentation,
        seed=0,
        workers=workers,
    )
    epochs = take(iterator, 2)
    iterator.close()
    expected = [0, 0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10]  # 3 and 4 become 5, and 11 becomes 0
    for batch in epochs:
        assert sorted(batch["label"]) == expected
        shown = [normalize(np.full(3, label, np.uint8)) for label in batch["label"]]
        np.testing.assert_allclose(batch["image"][:, 0, 0], shown, atol=1e-6)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3
    for number in (3, 4, 11):
        assert sum(f"/{number}.png cannot be read" in message for message in messages) == 1
    assert "(3 of 12 images so far)" in messages[-1]


def test_a_set_of_which_nothing_can_be_read_is_refused(tmp_path):
    examples = Examples([tmp_path / "none.png"] * 3, [0] * 3, open_image)
    with pytest.raises(
        ValueError, match=r"none of 3 images in a row can be read; the last: no image file at"
    ):
        labels_of(examples, 1, batch_size=2)


def test_an_augmentations_own_error_is_no_bad_image():
    def fail(image, preprocessing, rng):
        raise ValueError("a fault in the recipe")

    with pytest.raises(ValueError, match="a fault in the recipe"):
        labels_of(numbered(4), 1, batch_size=2, augment=fail)


def test_an_image_that_cannot_be_read_is_not_evaluated_and_named(with_bad_ones, caplog):
    batches = list(evaluation_batches(with_bad_ones, preprocessing=PIXELS.at_size(4), batch_size=8))
    real = np.concatenate([batch["real"] for batch in batches])
    assert np.flatnonzero(~real).tolist() == [3, 4, 11, 12, 13, 14, 15]
    assert [record.message.split("/")[-1][:20] for record in caplog.records] == [
        f"{number}.png cannot be read"[:20] for number in (3, 4, 11)
    ]


def test_hosts_evaluate_every_image_once_in_as_many_batches():
    parts = [
        list(
            evaluation_batches(numbered(9), preprocessing=PIXELS.at_size(4), batch_size=4, host=host, hosts=2)
        )
        for host in range(2)
    ]
    assert [len(part) for part in parts] == [3, 3]
    found = [batch["label"][batch["real"]].tolist() for part in zip(*parts, strict=True) for batch in part]
    assert list(itertools.chain.from_iterable(found)) == list(range(9))


@pytest.mark.parametrize("augmentation", ["none", "affine", "crop_flip"])
def test_training_batches_have_the_promised_shape_and_labels(digits, augmentation):
    batch = next(train_iterator(digits.train, **{**SETTINGS, "augment": AUGMENTATIONS[augmentation]}))
    assert batch["image"].shape == (16, 32, 32, 3)
    assert batch["image"].dtype == np.float32
    assert set(batch["label"]) <= set(range(10))


@pytest.mark.parametrize("augmentation", ["affine", "crop_flip"])
def test_augmentation_changes_images_from_epoch_to_epoch(augmentation):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    examples = Examples([pixels], [0], lambda image: image)
    first, second = take(
        train_iterator(
            examples,
            preprocessing=PIXELS.at_size(8),
            batch_size=1,
            augment=AUGMENTATIONS[augmentation],
            seed=0,
        ),
        2,
    )
    assert not np.array_equal(first["image"], second["image"])


def test_batches_have_the_pixels_that_the_model_expects():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    examples = Examples([pixels], [0], lambda image: image)
    halves = Preprocessing(size=8, resize_to=8, mean=(0.5,) * 3, deviation=(0.25,) * 3, channels="bgr")
    expected = preprocess(pixels, halves)
    (evaluated,) = evaluation_batches(examples, preprocessing=halves, batch_size=1)
    np.testing.assert_array_equal(evaluated["image"][0], expected)
    settings = {"preprocessing": halves, "batch_size": 1, "augment": no_augmentation, "seed": 0}
    np.testing.assert_array_equal(next(train_iterator(examples, **settings))["image"][0], expected)


def test_normalization_is_imagenets():
    image = np.array([[[0, 128, 255]]], np.uint8)
    expected = (np.array([0, 128 / 255, 1]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(image)[0, 0], expected, rtol=1e-5)


def test_test_examples_show_every_image_once_in_order_and_say_what_is_padding(digits):
    batches = list(evaluation_batches(digits.test, preprocessing=PIXELS, batch_size=100))
    real = np.concatenate([batch["real"] for batch in batches])
    assert real.tolist() == [True] * 599 + [False]
    labels = np.concatenate([batch["label"] for batch in batches])[real]
    np.testing.assert_array_equal(labels, digits.test.labels)
    assert all(batch["image"].shape == (100, 32, 32, 3) for batch in batches)
    assert not batches[-1]["image"][-1].any()


def test_a_wide_image_is_cut_to_its_centre():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255
    (batch,) = evaluation_batches(
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
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"hosts": 3}, "batch_size 16 must be a multiple of the number of hosts, 3; such as 18"),
        ({"host": 2, "hosts": 2}, "host must be from 0 to hosts - 1, got host 2 of 2"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
    ],
)
def test_wrong_settings_are_refused(digits, change, message):
    with pytest.raises(ValueError, match=message):
        train_iterator(digits.train, **{**SETTINGS, **change})
