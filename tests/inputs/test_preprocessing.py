"""A model's input against what torchvision and transformers make of the same images."""

import dataclasses
import json
import math

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.pvt.image_processing_pil_pvt import PvtImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints import from_timm, from_transformers
from shiftaddvit_jax.data import normalize, preprocess
from shiftaddvit_jax.data.preprocessing import resize
from shiftaddvit_jax.models import Preprocessing, model_preprocessing

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SIZES = [(640, 427), (427, 641), (333, 500), (249, 250), (225, 224), (224, 224), (31, 17), (1, 1), (3, 20)]


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def photograph(request):
    """Of a temple or of a flower, at this width and height."""
    image = Image.fromarray(load_sample_images().images[request.param[0] % 2])
    return image.resize(request.param, Image.Resampling.LANCZOS)


def difference(found, expected, preprocessing):
    """The mean over pixels and channels, of 255 levels."""
    return np.mean(np.abs(found - expected) * preprocessing.deviation / preprocessing.rescale)


def like_torchvision(image, size, resize_to, interpolation, mean, std):
    """Of torchvision: Resize, CenterCrop, ToTensor, Normalize."""
    if isinstance(resize_to, int):
        width, height = image.size
        short, long = min(width, height), max(width, height)
        edges = resize_to, int(resize_to * long / short)
        resize_to = edges if width <= height else edges[::-1]
    image = image.resize(resize_to, interpolation)
    left, top = (int(round((edge - size) / 2.0)) for edge in image.size)  # noqa: RUF046, as there
    image = image.crop((left, top, left + size, top + size))
    return (np.asarray(image) / 255 - mean) / std


@pytest.mark.parametrize(
    ("config", "interpolation", "resize_to"),
    [
        # timm's: pvt_v2.py and deit.py; vision_transformer.py; other crops.
        ({"crop_pct": 0.9, "interpolation": "bicubic", **IMAGENET}, 3, 248),
        ({"crop_pct": 0.9, "interpolation": "bicubic", **HALF}, 3, 248),
        ({"crop_pct": 0.95, "interpolation": "bilinear", **HALF}, 2, 235),
        ({"crop_pct": 1.0, "interpolation": "lanczos", "input_size": [3, 96, 96], **HALF}, 1, 96),
        ({"crop_pct": 0.9, "crop_mode": "squash", **IMAGENET}, 3, (248, 248)),
        ({}, 3, 256),
    ],
)
def test_timms_configs_make_the_pixels_of_torchvision(photograph, config, interpolation, resize_to):
    preprocessing = from_timm(config)
    side = config.get("input_size", (3, 224, 224))[-1]
    normalization = {"mean": config.get("mean", IMAGENET["mean"]), "std": config.get("std", IMAGENET["std"])}
    expected = like_torchvision(photograph, side, resize_to, interpolation, **normalization)
    found = preprocess(np.asarray(photograph), preprocessing)
    assert (found.dtype, found.shape) == (np.float32, (side, side, 3))
    assert difference(found, expected, preprocessing) < 1e-4


@pytest.mark.parametrize(
    "processor",
    [
        PvtImageProcessorPil(),
        PvtImageProcessorPil(resample=2),
        ViTImageProcessorPil(),
        DeiTImageProcessorPil(),
        DeiTImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
        ViTImageProcessorPil(size={"shortest_edge": 235}, do_center_crop=True, crop_size=224, resample=1),
        ViTImageProcessorPil(do_normalize=False, size={"height": 96, "width": 96}, resample=0),
        ViTImageProcessorPil(do_rescale=False, size={"height": 96, "width": 96}),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_image_processors_make_the_pixels_of_transformers(photograph, processor):
    preprocessing = from_transformers(json.loads(processor.to_json_string()))
    (expected,) = processor(photograph, return_tensors="np")["pixel_values"]
    found = preprocess(np.asarray(photograph), preprocessing)
    assert difference(found, expected.transpose(1, 2, 0), preprocessing) < 1e-4


@pytest.mark.parametrize(
    ("name", "resize_to", "normalization"),
    [
        ("pvt_tiny", 256, IMAGENET),
        ("pvt_v2_b0", 256, IMAGENET),
        ("deit_tiny", 256, IMAGENET),
        ("vit_tiny", 248, HALF),
    ],
)
def test_variants_expect_the_pixels_of_their_publishers(photograph, name, resize_to, normalization):
    preprocessing = model_preprocessing(sav.create_model(name))
    expected = like_torchvision(photograph, 224, resize_to, 3, **normalization)
    assert difference(preprocess(photograph, preprocessing), expected, preprocessing) < 1e-4


def test_another_image_size_has_the_same_share_cut_out():
    preprocessing = model_preprocessing(sav.create_model("deit_tiny", image_size=384))
    assert (preprocessing.size, preprocessing.resize_to) == (384, math.floor(384 / 0.875))


def test_the_small_model_expects_the_pixels_that_it_is_trained_with():
    preprocessing = model_preprocessing(sav.create_model("pvt_v2_nano"))
    square = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    trained = normalize(resize(square, 32))
    np.testing.assert_allclose(preprocess(square, preprocessing), trained, atol=1e-6)


def test_channels_are_swapped_before_their_means_are_subtracted():
    preprocessing = Preprocessing(1, 1, channels="bgr", mean=(0, 0.5, 1), deviation=(1, 2, 4))
    found = preprocess(np.uint8([[[0, 51, 255]]]), preprocessing)
    np.testing.assert_allclose(found[0, 0], [1, -0.15, -0.25], rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 1), (4, 5001)])
def test_the_middle_of_a_thin_image_is_seen(shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    height, width = (slice(max(0, side // 2 - 8), side // 2 + 8) for side in shape)
    pixels[height, width] = 255
    found = preprocess(pixels, Preprocessing(24, 24, mean=(0, 0, 0), deviation=(1, 1, 1)))
    np.testing.assert_allclose(found, 1, atol=1e-6)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match=r"pixels must be uint8 \[height, width, 3\]"):
        preprocess(pixels, Preprocessing(8, 8))


# As data.


@pytest.mark.parametrize("name", sav.list_models())
def test_json_holds_every_variants_preprocessing(name):
    preprocessing = model_preprocessing(sav.create_model(name))
    written = json.dumps(dataclasses.asdict(preprocessing))
    assert Preprocessing.from_dict(json.loads(written)) == preprocessing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size must be a whole number from 1, got 0"),
        ({"size": 224.0}, r"size must be a whole number from 1, got 224\.0"),
        ({"size": True}, "size must be a whole number"),
        ({"resize_to": 200}, "resize_to must be a whole number from 224, got 200"),
        ({"resize": "longest"}, "unknown resize of preprocessing 'longest'"),
        (
            {"interpolation": "bicubi"},
            "unknown interpolation of preprocessing 'bicubi'; did you mean 'bicubic'",
        ),
        ({"channels": "gbr"}, "unknown channels of preprocessing"),
        ({"crop_rounding": 1}, "unknown crop_rounding of preprocessing"),
        ({"rescale": 0}, "rescale must be a number above 0"),
        ({"rescale": "1/255"}, "rescale must be a number above 0"),
        ({"mean": [0.5, 0.5]}, "mean must be three numbers"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean must be three numbers"),
        ({"mean": 0.5}, "mean must be three numbers"),
        ({"deviation": [0.5, 0, 0.5]}, "deviation must be above 0"),
        ({"std": [1, 1, 1]}, "unknown field of preprocessing 'std'"),
    ],
)
def test_wrong_fields_are_refused_by_name(change, message):
    fields = dataclasses.asdict(Preprocessing(224, 256)) | change
    with pytest.raises(ValueError, match=message) as error:
        Preprocessing.from_dict(fields)
    assert "\n" not in str(error.value)


def test_missing_fields_are_refused_by_name():
    fields = dataclasses.asdict(Preprocessing(224, 256))
    del fields["mean"], fields["deviation"]
    with pytest.raises(ValueError, match="preprocessing: mean, deviation missing"):
        Preprocessing.from_dict(fields)


OLD_VIT = {
    "feature_extractor_type": "ViTFeatureExtractor",
    "size": 224,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def test_the_first_image_processors_left_their_defaults_out():
    assert from_transformers(OLD_VIT) == from_transformers(ViTImageProcessorPil().to_dict())
    old = {**OLD_VIT, "feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224}
    assert from_transformers(old) == from_transformers(DeiTImageProcessorPil().to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize False is not supported"),
        ({"do_pad": True}, "do_pad True is not supported"),
        ({"crop_pct": 0.875}, r"crop_pct 0\.875 is not supported"),
        ({"size": {"shortest_edge": 224}}, "do_center_crop must be true"),
        ({"size": {"shortest_edge": 224, "longest_edge": 448}}, "size must have one height and width"),
        ({"size": {"height": 224, "width": 320}}, "size must have one height and width, the same"),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 9}}, "crop_size must have one height"),
        ({"do_center_crop": True, "crop_size": 256}, "resize_to must be a whole number from 256, got 224"),
        ({"do_center_crop": True}, "crop_size is missing"),
        ({"resample": 4}, "resample 4 is not supported"),
        ({"image_std": None, "do_normalize": True}, "image_std is missing"),
        ({"feature_extractor_type": "LevitFeatureExtractor", "resample": 3}, "does not say which edges"),
        ({"feature_extractor_type": "PvtImageProcessor"}, "PvtImageProcessor: resample is missing"),
    ],
)
def test_image_processors_that_do_something_else_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(OLD_VIT | change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"crop_mode": "border"}, "unknown crop_mode of timm's pretrained_cfg 'border'"),
        ({"input_size": [3, 224, 256]}, r"input_size must be \(3, side, side\)"),
        ({"input_size": [1, 224, 224]}, r"input_size must be \(3, side, side\)"),
        ({"interpolation": "random"}, "unknown interpolation"),
        ({"mean": [0.5]}, "mean must be three numbers"),
        ({"crop_pct": 1.1}, r"crop_pct must be above 0 and at most 1, got 1\.1"),
    ],
)
def test_timms_configs_that_say_something_else_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        from_timm(config)
