"""Random changes to training images, as timm makes them: crops, flips, colours, RandAugment, erasing.

Each function takes an image, an array or Pillow's, and a generator, and leaves the image itself as it is.
Distributions are those of timm 1.0.31 (``timm.data.transforms``, ``auto_augment``, ``random_erasing``) and of
torchvision's ``ColorJitter``; pixels are Pillow's, as theirs are.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from shiftaddvit_jax.data.images import SHRINKS, Jpeg, whole
from shiftaddvit_jax.data.preprocessing import crop, normalize_as, resize
from shiftaddvit_jax.models.preprocessing import Preprocessing
from shiftaddvit_jax.validation import check_choice

INTERPOLATIONS = ("random", "nearest", "bilinear", "bicubic", "lanczos")
ERASING_MODES = ("const", "rand", "pixel")
GREY = (128, 128, 128)

# Functions of these return what they were given: between Pillow's images, nothing is copied.
Picture = UInt8[np.ndarray, "height width 3"] | Image.Image
Fill = tuple[int, int, int]
Range = tuple[float, float]


@dataclass(frozen=True)
class Augmentation:
    """The changes that one training image goes through, in this order; the defaults are timm's.

    Attributes:
      scale: range of the crop's area, as a part of the image's.
      ratio: range of the crop's width over its height.
      interpolation: of resizing and of RandAugment; ``"random"`` draws bilinear or bicubic each time.
      flip: probability of a mirrored image.
      policy: ``""``; RandAugment, such as ``"rand-m9-mstd0.5-inc1"``, see `parse_policy`; or ``"3a"``, the
        three augmentations of DeiT III.
      color_jitter: strengths of `color_jitter`, or one for brightness, contrast and saturation. RandAugment
        changes colours itself, and switches it off.
      erase: probability of erasing, see `random_erasing`.
      erase_mode: what replaces the erased pixels.
      erase_count: largest number of rectangles erased.

    Raises:
      ValueError: a field out of range.
    """

    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    interpolation: str = "random"
    flip: float = 0.5
    policy: str = ""
    color_jitter: float | tuple[float, ...] = 0.4
    erase: float = 0.0
    erase_mode: str = "const"
    erase_count: int = 1

    def __post_init__(self) -> None:
        """Check every field."""
        for name, most in (("scale", 1), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} must be two rising numbers above 0, got {getattr(self, name)}")
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability, got {getattr(self, name)}")
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("erase_mode", self.erase_mode, ERASING_MODES)
        if self.erase_count < 1:
            raise ValueError(f"erase_count must be at least 1, got {self.erase_count}")
        jitter = self.color_jitter
        if isinstance(jitter, tuple) and len(jitter) not in (3, 4):
            raise ValueError(f"color_jitter must be one, three or four strengths, got {jitter}")
        if self.policy not in ("", "3a"):
            parse_policy(self.policy)

    def __call__(
        self,
        image: UInt8[np.ndarray, "height width 3"] | Jpeg,
        preprocessing: Preprocessing,
        rng: np.random.Generator,
    ) -> Float[np.ndarray, "size size 3"]:
        """``image``, changed at random, as the model takes it, float32."""
        picture: Picture = _resized_crop(
            image, preprocessing.size, rng, self.scale, self.ratio, self.interpolation
        )
        picture = random_flip(picture, rng, self.flip)
        if self.policy == "3a":
            picture = three_augment(picture, rng)
        elif self.policy:
            fill = mean_color(preprocessing)
            picture = rand_augment(picture, self.policy, rng, fill=fill, interpolation=self.interpolation)
        if self.policy in ("", "3a"):
            jitter = self.color_jitter
            picture = color_jitter(picture, rng, *(jitter if isinstance(jitter, tuple) else (jitter,) * 3))
        normal = normalize_as(np.asarray(picture), preprocessing)
        return random_erasing(
            normal, rng, probability=self.erase, mode=self.erase_mode, max_count=self.erase_count
        )


def no_augmentation(
    image: UInt8[np.ndarray, "height width 3"] | Jpeg, preprocessing: Preprocessing, rng: np.random.Generator
) -> Float[np.ndarray, "size size 3"]:
    """``image`` as the model takes it, float32, as in evaluation; nothing is drawn."""
    return normalize_as(crop(whole(image), preprocessing), preprocessing)


def affine(
    image: UInt8[np.ndarray, "height width 3"] | Jpeg, preprocessing: Preprocessing, rng: np.random.Generator
) -> Float[np.ndarray, "size size 3"]:
    """The centre square of ``image``, turned, scaled, shifted and sheared a little, float32; for handwriting.

    Drawn evenly: 12 degrees either way, 0.88 to 1.15 times each side, a tenth of a side either way, and a
    shear of 0.15 either way. What comes from outside has the colour of the image's first pixel.
    """
    pixels, size = whole(image), preprocessing.size
    angle = np.deg2rad(rng.uniform(-12, 12))
    scale_x, scale_y = rng.uniform(0.88, 1.15, size=2)
    shift_x, shift_y = rng.uniform(-0.1, 0.1, size=2) * size
    shear = rng.uniform(-0.15, 0.15)
    # Pillow wants the map from output to input pixels, here about the centre.
    a, b = math.cos(angle) / scale_x, math.sin(angle) / scale_x + shear
    d, e = -math.sin(angle) / scale_y, math.cos(angle) / scale_y
    centre = size / 2
    c = centre - a * (centre + shift_x) - b * (centre + shift_y)
    f = centre - d * (centre + shift_x) - e * (centre + shift_y)
    corner = tuple(int(value) for value in pixels[0, 0])
    square = Image.fromarray(resize(pixels, size))
    moved = _affine(square, (a, b, c, d, e, f), corner, Image.Resampling.BILINEAR)
    return normalize_as(np.asarray(moved), preprocessing)


def mean_color(preprocessing: Preprocessing) -> Fill:
    """The RGB pixel that normalization turns to 0, rounded."""
    red, green, blue = (min(255, round(mean / preprocessing.rescale)) for mean in preprocessing.mean)
    return (red, green, blue) if preprocessing.channels == "rgb" else (blue, green, red)


def random_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a crop of random area and aspect, in pixels.

    Up to ten draws are made until one lies in the image; then the crop is the largest one at the centre whose
    aspect is allowed.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return left, top, left + crop_width, top + crop_height


def random_resized_crop(
    image: UInt8[np.ndarray, "height width 3"] | Jpeg,
    size: int,
    rng: np.random.Generator,
    *,
    scale: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    interpolation: str = "random",
) -> UInt8[np.ndarray, "size size 3"]:
    """A crop by `random_crop_box`, resized to ``size`` pixels a side.

    A `Jpeg` is decoded at the least of its sizes at which the crop still has ``size`` pixels a side.
    """
    return np.asarray(_resized_crop(image, size, rng, scale, ratio, interpolation))


def _resized_crop(image, size, rng, scale, ratio, interpolation) -> Image.Image:
    height, width = image.size if isinstance(image, Jpeg) else image.shape[:2]
    box = random_crop_box(height, width, rng, scale, ratio)
    left, top, right, bottom = box
    if isinstance(image, Jpeg):
        shortest = min(right - left, bottom - top)
        shrink = next(shrink for shrink in SHRINKS if shrink == 1 or shrink * size <= shortest)
        image = image.decode(shrink)
        left, top, right, bottom = (edge / shrink for edge in box)
    # Cut first: Pillow's resize of a box also reads the pixels around it.
    x, y = math.floor(left), math.floor(top)
    cut = Image.fromarray(np.ascontiguousarray(image[y : math.ceil(bottom), x : math.ceil(right)]))
    inside = (left - x, top - y, right - x, bottom - y)
    return cut.resize((size, size), _filter(_drawn(interpolation, rng)), inside)


def random_flip(image: Picture, rng: np.random.Generator, probability: float = 0.5) -> Picture:
    """``image``, mirrored left to right with that probability."""
    if rng.random() >= probability:
        return image
    return _alike(_picture(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT), image)


def color_jitter(
    image: Picture,
    rng: np.random.Generator,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Picture:
    """``image`` with other colours, changed in random order.

    Brightness, contrast and saturation are multiplied by numbers from 1 - strength (at least 0) to
    1 + strength. The hue turns by up to ``hue``, at most 0.5, of the circle.
    """
    changed = _picture(image)
    strengths = (brightness, contrast, saturation)
    factors = [rng.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
    turn = rng.uniform(-hue, hue)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in rng.permutation(4):
        if index == 3 and hue:
            changed = _turn_hue(changed, turn)
        elif index < 3 and strengths[index]:
            changed = enhancers[index](changed).enhance(factors[index])
    return _alike(changed, image)


def three_augment(image: Picture, rng: np.random.Generator) -> Picture:
    """``image`` in grey, solarized or blurred (a Gaussian of 0.1 to 2 pixels), each as probable.

    Touvron et al., "DeiT III: Revenge of the ViT", 2022. `color_jitter` of 0.3 follows it there.
    """
    picture = _picture(image)
    match int(rng.integers(3)):
        case 0:
            picture = ImageOps.solarize(picture, 128)
        case 1:
            picture = ImageEnhance.Color(picture).enhance(0.0)
        case _:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    return _alike(picture, image)


@dataclass(frozen=True)
class Policy:
    """RandAugment's settings.

    Attributes:
      magnitude: mean strength of an operation.
      layers: operations drawn for an image, with replacement.
      deviation: standard deviation of the magnitude; infinite for uniform draws from 0 to ``magnitude``.
      maximum: what magnitudes are clipped to.
      increasing: whether all operations grow stronger with the magnitude.
      probability: that an operation, once drawn, is applied.
    """

    magnitude: int = 10
    layers: int = 2
    deviation: float = 0.0
    maximum: int = 10
    increasing: bool = False
    probability: float = 0.5


@cache
def parse_policy(text: str) -> Policy:
    """The settings that timm's name of a policy stands for, such as ``"rand-m9-mstd0.5-inc1"``.

    After ``rand``, in any order: ``m`` magnitude, ``n`` layers, ``mstd`` deviation (above 100: uniform),
    ``mmax`` maximum, ``inc`` 1 for increasing operations, ``p`` probability.

    Raises:
      ValueError: another name, or an unknown part.
    """
    kind, *parts = text.split("-")
    if kind != "rand":
        raise ValueError(f"unknown policy {text!r}; expected '3a', or 'rand' as in 'rand-m9-mstd0.5-inc1'")
    types = {
        "m": ("magnitude", int),
        "n": ("layers", int),
        "mstd": ("deviation", lambda value: math.inf if float(value) > 100 else float(value)),
        "mmax": ("maximum", int),
        "inc": ("increasing", lambda value: bool(int(value))),
        "p": ("probability", float),
    }
    settings: dict[str, Any] = {}
    for part in parts:
        name = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if not name or name[1] not in types:
            raise ValueError(f"unknown part {part!r} of the policy {text!r}; known: {', '.join(types)}")
        field, convert = types[name[1]]
        try:
            settings[field] = convert(name[2])
        except ValueError:
            raise ValueError(f"{part!r} in the policy {text!r} must be a whole number") from None
    return Policy(**settings)


def rand_augment(
    image: Picture,
    policy: str | Policy,
    rng: np.random.Generator,
    *,
    fill: Fill = GREY,
    interpolation: str = "random",
) -> Picture:
    """``image`` after RandAugment.

    Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2019.

    Args:
      image: the pixels.
      policy: settings, or timm's name of them, see `parse_policy`.
      rng: where operations, magnitudes and signs are drawn from.
      fill: the colour of pixels from outside the image.
      interpolation: of operations that move pixels; ``"random"`` is bilinear or bicubic each time.
    """
    settings = parse_policy(policy) if isinstance(policy, str) else policy
    names = INCREASING_OPERATIONS if settings.increasing else OPERATIONS
    picture = _picture(image)
    for name in rng.choice(names, settings.layers):
        if rng.random() >= settings.probability:
            continue
        magnitude = float(settings.magnitude)
        if settings.deviation == math.inf:
            magnitude = rng.uniform(0, magnitude)
        elif settings.deviation:
            magnitude = rng.normal(magnitude, settings.deviation)
        picture = apply_operation(
            picture,
            str(name),
            min(max(magnitude, 0.0), settings.maximum),
            sign=-1 if rng.random() < 0.5 else 1,
            fill=fill,
            interpolation=_drawn(interpolation, rng),
        )
    return _alike(picture, image)


def apply_operation(
    image: Picture,
    name: str,
    magnitude: float,
    *,
    sign: Literal[-1, 1] = 1,
    fill: Fill = GREY,
    interpolation: str = "bicubic",
) -> Picture:
    """``image`` after one operation of RandAugment.

    Args:
      image: the pixels.
      name: of `OPERATIONS` or `INCREASING_OPERATIONS`.
      magnitude: strength, 0 to 10, or to the policy's maximum.
      sign: direction of what can go either way: moves, and the factors of increasing colour changes.
      fill: the colour of pixels from outside the image.
      interpolation: of operations that move pixels.

    Raises:
      ValueError: an unknown operation.
    """
    check_choice("operation", name, _OPERATIONS)
    changed = _OPERATIONS[name](_picture(image), magnitude / 10, sign, fill, _filter(interpolation))
    return _alike(changed, image)


def random_erasing(
    image: Float[np.ndarray, "height width 3"],
    rng: np.random.Generator,
    *,
    probability: float = 0.5,
    mode: str = "const",
    min_area: float = 0.02,
    max_area: float = 1 / 3,
    min_aspect: float = 0.3,
    max_aspect: float | None = None,
    min_count: int = 1,
    max_count: int = 1,
) -> Float[np.ndarray, "height width 3"]:
    """A normalized image with random rectangles replaced.

    Zhong et al., "Random Erasing Data Augmentation", 2017.

    Args:
      image: normalized pixels.
      rng: where rectangles and their pixels are drawn from.
      probability: that anything is erased.
      mode: what comes instead: ``"const"``, 0; ``"rand"``, one colour from a normal distribution;
        ``"pixel"``, each value from a normal distribution.
      min_area: least area of all rectangles together, as a part of the image's.
      max_area: largest area of all rectangles together.
      min_aspect: least height over width.
      max_aspect: largest height over width; 1 / ``min_aspect`` where None.
      min_count: least number of rectangles.
      max_count: largest number of rectangles.

    Raises:
      ValueError: an unknown mode.
    """
    check_choice("mode", mode, ERASING_MODES)
    if rng.random() >= probability:
        return image
    image = image.copy()
    height, width = image.shape[:2]
    aspects = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))
    count = int(rng.integers(min_count, max_count + 1))
    for _ in range(count):
        for _ in range(10):
            area = rng.uniform(min_area, max_area) * height * width / count
            aspect = math.exp(rng.uniform(*aspects))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < height and wide < width:
                top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
                image[top : top + tall, left : left + wide] = _erased(mode, tall, wide, rng)
                break
    return image


def _erased(mode, height, width, rng):
    if mode == "const":
        return 0.0
    return rng.standard_normal((height, width, 3) if mode == "pixel" else 3, dtype=np.float32)


def _picture(image: Picture) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _alike(changed: Picture, image: Picture) -> Picture:
    """What ``image`` became, of its kind."""
    return np.asarray(changed) if isinstance(image, np.ndarray) else changed


def _drawn(interpolation, rng):
    """The interpolation's name; for ``"random"``, one that is drawn."""
    return ("bilinear", "bicubic")[rng.integers(2)] if interpolation == "random" else interpolation


def _filter(interpolation):
    return Image.Resampling[interpolation.upper()]


def _turn_hue(image, turn):
    hue, saturation, value = image.convert("HSV").split()
    # Wraps around, as the circle does.
    turned = np.asarray(hue) + np.int32(turn * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _affine(image, matrix, fill, filter_):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, filter_, fillcolor=fill)


def _posterize(image, bits):
    """The highest bits of each value; black without any, where `ImageOps.posterize` of Pillow 13 fails."""
    mask = 256 - 2 ** (8 - min(max(bits, 0), 8))
    return image.point([value & mask for value in range(256)] * 3)


def _add_to_dark(image, amount):
    """``amount`` added to the values below 128."""
    table = [min(255, value + amount) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhance(kind):
    return lambda image, level, sign, fill, filter_: kind(image).enhance(level * 1.8 + 0.1)


def _enhance_increasingly(kind):
    # A factor of 1 changes nothing.
    return lambda image, level, sign, fill, filter_: kind(image).enhance(max(0.1, 1 + sign * (level * 0.9)))


# By timm's name: the image after an operation of a level, which is a magnitude over 10.
_Operation = Callable[[Image.Image, float, int, Fill, Image.Resampling], Image.Image]
_OPERATIONS: dict[str, _Operation] = {
    "AutoContrast": lambda image, level, sign, fill, filter_: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, sign, fill, filter_: ImageOps.equalize(image),
    "Invert": lambda image, level, sign, fill, filter_: ImageOps.invert(image),
    "Rotate": lambda image, level, sign, fill, filter_: image.rotate(
        sign * (level * 30), filter_, fillcolor=fill
    ),
    "Posterize": lambda image, level, sign, fill, filter_: _posterize(image, int(level * 4)),
    "PosterizeIncreasing": lambda image, level, sign, fill, filter_: _posterize(image, 4 - int(level * 4)),
    "Solarize": lambda image, level, sign, fill, filter_: ImageOps.solarize(
        image, min(256, int(level * 256))
    ),
    "SolarizeIncreasing": lambda image, level, sign, fill, filter_: ImageOps.solarize(
        image, 256 - min(256, int(level * 256))
    ),
    "SolarizeAdd": lambda image, level, sign, fill, filter_: _add_to_dark(image, min(128, int(level * 110))),
    "Color": _enhance(ImageEnhance.Color),
    "ColorIncreasing": _enhance_increasingly(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "ContrastIncreasing": _enhance_increasingly(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "BrightnessIncreasing": _enhance_increasingly(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "SharpnessIncreasing": _enhance_increasingly(ImageEnhance.Sharpness),
    "ShearX": lambda image, level, sign, fill, filter_: _affine(
        image, (1, sign * (level * 0.3), 0, 0, 1, 0), fill, filter_
    ),
    "ShearY": lambda image, level, sign, fill, filter_: _affine(
        image, (1, 0, 0, sign * (level * 0.3), 1, 0), fill, filter_
    ),
    "TranslateXRel": lambda image, level, sign, fill, filter_: _affine(
        image, (1, 0, sign * (level * 0.45) * image.width, 0, 1, 0), fill, filter_
    ),
    "TranslateYRel": lambda image, level, sign, fill, filter_: _affine(
        image, (1, 0, 0, 0, 1, sign * (level * 0.45) * image.height), fill, filter_
    ),
}

OPERATIONS = tuple(name for name in _OPERATIONS if not name.endswith("Increasing"))
INCREASING_OPERATIONS = tuple(
    f"{name}Increasing" if f"{name}Increasing" in _OPERATIONS else name for name in OPERATIONS
)

# What a config names: from an image, the model's preprocessing and a generator to the model's input.
AUGMENTATIONS = {
    "none": no_augmentation,
    "affine": affine,
    "crop_flip": Augmentation(color_jitter=0.0),
}
