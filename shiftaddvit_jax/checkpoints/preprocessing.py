"""How transformers and timm write down the pixels that a model expects."""

import math
import re
from collections.abc import Mapping
from typing import Any

from shiftaddvit_jax.models.preprocessing import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    Interpolation,
    Preprocessing,
)
from shiftaddvit_jax.validation import check_choice

# The numbers of Pillow's filters (`PIL.Image.Resampling`); its box and Hamming filters are no model's.
_FILTERS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# What the first image processors left out when they were saved (transformers, image_processing_vit.py and
# image_processing_deit.py). PVT's has a default that changed between versions, and always wrote it down.
_DEFAULTS = {
    "ViT": {"resample": 2},
    "DeiT": {"resample": 3, "do_center_crop": True},
    "Pvt": {},
}


def from_transformers(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing in a ``preprocessor_config.json`` of transformers.

    Raises:
      ValueError: a field that is missing, or that asks for what `Preprocessing` can't say, by its name.
    """
    processor = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    family = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", processor)
    config = {
        **_DEFAULTS.get(family, {}),
        **{name: value for name, value in config.items() if value is not None},
    }

    def needed(name):
        if name not in config:
            raise ValueError(f"image processor {processor or 'of unknown type'}: {name} is missing")
        return config[name]

    for name, unsupported in (
        ("resample", needed("resample") not in _FILTERS),
        ("do_resize", not config.get("do_resize", True)),
        ("do_pad", config.get("do_pad", False)),
        ("crop_pct", "crop_pct" in config),
    ):
        if unsupported:
            raise ValueError(f"image processor {processor}: {name} {config[name]} is not supported")
    resize, resize_to = _transformers_size(needed("size"), family)
    size = resize_to
    if config.get("do_center_crop", False):
        _, size = _square("crop_size", needed("crop_size"))
    elif resize == "shortest_edge":
        raise ValueError(
            f"image processor {processor}: do_center_crop must be true beside size {config['size']}"
        )
    normalizes = config.get("do_normalize", "image_mean" in config)
    return Preprocessing(
        size=size,
        resize_to=resize_to,
        resize=resize,
        interpolation=_FILTERS[config["resample"]],
        crop_rounding="down",
        channels="bgr" if config.get("do_flip_channel_order", False) else "rgb",
        rescale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
        mean=_color(needed("image_mean")) if normalizes else (0.0, 0.0, 0.0),
        deviation=_color(needed("image_std")) if normalizes else (1.0, 1.0, 1.0),
    )


def to_transformers(preprocessing: Preprocessing) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of transformers' image processor that makes the same pixels.

    Where an odd number of pixels is cut off, transformers cuts as ``crop_rounding="down"``, whatever it is.
    """
    size, resize_to = preprocessing.size, preprocessing.resize_to
    is_exact = preprocessing.resize == "exact"
    return {
        # Of the processors with all of these fields, the one whose size may be the shortest edge's.
        "image_processor_type": "ViTImageProcessor" if is_exact else "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": resize_to, "width": resize_to} if is_exact else {"shortest_edge": resize_to},
        "resample": {name: number for number, name in _FILTERS.items()}[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": preprocessing.rescale,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.deviation),
        "do_flip_channel_order": preprocessing.channels == "bgr",
    }


def from_timm(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing in timm's ``pretrained_cfg``; what it lacks has timm's defaults.

    Those are of ``timm.data.resolve_data_config``; sizes are computed as in ``transforms_imagenet_eval``.

    Raises:
      ValueError: a field that asks for what `Preprocessing` can't say, by its name.
    """
    config = {name: value for name, value in config.items() if value is not None}
    input_size = tuple(config.get("input_size", (3, 224, 224)))
    if len(input_size) != 3 or input_size[0] != 3 or input_size[1] != input_size[2]:
        raise ValueError(f"timm's pretrained_cfg: input_size must be (3, side, side), got {input_size}")
    crop_pct, crop_mode = config.get("crop_pct", 0.875), config.get("crop_mode", "center")
    if not isinstance(crop_pct, int | float) or not 0 < crop_pct <= 1:
        raise ValueError(f"timm's pretrained_cfg: crop_pct must be above 0 and at most 1, got {crop_pct!r}")
    check_choice("crop_mode of timm's pretrained_cfg", crop_mode, ("center", "squash"))
    return Preprocessing(
        size=input_size[1],
        resize_to=math.floor(input_size[1] / crop_pct),
        resize="exact" if crop_mode == "squash" else "shortest_edge",
        interpolation=config.get("interpolation", "bicubic"),
        mean=_color(config.get("mean", IMAGENET_MEAN)),
        deviation=_color(config.get("std", IMAGENET_DEVIATION)),
    )


def _color(values):
    """A number for each channel, of one number for all or of several."""
    return (values,) * 3 if isinstance(values, int | float) else tuple(values)


def _transformers_size(size, family):
    """How an image is resized, and to what."""
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return "shortest_edge", size["shortest_edge"]
    if not isinstance(size, Mapping) and family not in _DEFAULTS:
        raise ValueError(f"image processor {family}: size {size} does not say which edges become that long")
    return _square("size", size)


def _square(name, size):
    """A size with equal sides, of one number or two."""
    sides = size if isinstance(size, Mapping) else {"height": size, "width": size}
    if set(sides) != {"height", "width"} or sides["height"] != sides["width"]:
        raise ValueError(f"image processor: {name} must have one height and width, the same, got {size}")
    return "exact", sides["height"]
