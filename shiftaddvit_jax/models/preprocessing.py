"""What pixels a model expects: how an image of any size becomes its input, as data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from shiftaddvit_jax.validation import check_choice

Resize = Literal["shortest_edge", "exact"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Channels = Literal["rgb", "bgr"]
CropRounding = Literal["even", "down"]

Color = tuple[float, float, float]

# Per channel, of pixels in [0, 1].
IMAGENET_MEAN: Color = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION: Color = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """From an image to a model's input: resize, cut out the centre, rescale, normalize.

    Attributes:
      size: side of the model's input in pixels, a square.
      resize_to: what the image is resized to before the square is cut out, in pixels; at least ``size``.
      resize: ``"shortest_edge"``, whose length becomes ``resize_to`` and the other edge follows; or
        ``"exact"``, both edges become ``resize_to``, whatever the proportions were.
      interpolation: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``, antialiased as in Pillow.
      crop_rounding: where the square lies if an odd number of pixels is cut off: at the even one of the two
        nearest places (``"even"``: timm, torchvision), or at the first (``"down"``: transformers).
      channels: order of the input's channels, ``"rgb"`` or ``"bgr"``.
      rescale: factor of the pixels from 0 to 255, before the mean is subtracted.
      mean: what is subtracted from each channel, in the order of ``channels``.
      deviation: what each channel is then divided by.

    Raises:
      ValueError: a field out of range, by its name.
    """

    size: int
    resize_to: int
    resize: Resize = "shortest_edge"
    interpolation: Interpolation = "bicubic"
    crop_rounding: CropRounding = "even"
    channels: Channels = "rgb"
    rescale: float = 1 / 255
    mean: Color = IMAGENET_MEAN
    deviation: Color = IMAGENET_DEVIATION

    def __post_init__(self) -> None:
        """Check every field."""
        for name, least in (("size", 1), ("resize_to", self.size)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"preprocessing: {name} must be a whole number from {least}, got {value!r}")
        for name, choices in (
            ("resize", Resize),
            ("interpolation", Interpolation),
            ("crop_rounding", CropRounding),
            ("channels", Channels),
        ):
            check_choice(f"{name} of preprocessing", getattr(self, name), get_args(choices))
        if not _is_number(self.rescale) or self.rescale <= 0:
            raise ValueError(f"preprocessing: rescale must be a number above 0, got {self.rescale!r}")
        for name in ("mean", "deviation"):
            value = getattr(self, name)
            if not (isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))):
                raise ValueError(f"preprocessing: {name} must be three numbers, got {value!r}")
        if min(self.deviation) <= 0:
            raise ValueError(f"preprocessing: deviation must be above 0, got {self.deviation}")

    def at_size(self, size: int) -> "Preprocessing":
        """The same for inputs of another size, with the same share of the image cut out."""
        return replace(self, size=size, resize_to=size * self.resize_to // self.size)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `dataclasses.asdict`, from JSON too.

        Raises:
          ValueError: a field that is missing, unknown or out of range, by its name.
        """
        names = [field.name for field in fields(cls)]
        for name in found:
            check_choice("field of preprocessing", name, names)
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"preprocessing: {', '.join(missing)} missing")
        values: dict[str, Any] = dict(found)
        values |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return cls(**values)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
