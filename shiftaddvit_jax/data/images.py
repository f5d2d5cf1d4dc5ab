"""Image files, read as a viewer shows them."""

import io
import os
import stat
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # the extra `jpeg`; Pillow decodes the same pixels in more time
    simplejpeg = None

# The files that folders are searched for. What is in a file, its first bytes say, whatever its name.
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Pillow's names of the decoders that may run. Some others start a program: Ghostscript, for PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Where Pillow takes an image for a decompression bomb: twice the pixels whose RGB fills a quarter of a GiB.
MAX_PIXELS = 178_956_970
JPEG_START = b"\xff\xd8\xff"
MORE_TO_KNOW = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/", b"MPF\0")  # beside a JPEG's own pixels
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
SHRINKS = (
    8,
    4,
    2,
    1,
)  # what a JPEG's sides may be divided by while it is decoded, which saves most of the work

Pixels = UInt8[np.ndarray, "height width 3"]

_pillows_limit = threading.Lock()
# What undoes each EXIF orientation but 1, the upright one.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """An image that is missing, damaged or of a kind that is not read; one line says which and why."""


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file of which the header is read, for pixels of less than full size.

    Attributes:
      data: the file's bytes.
      name: what errors call it.
      stored: height and width of what is stored, in pixels.
      orientation: EXIF's; None if there is none.
    """

    data: bytes
    name: str
    stored: tuple[int, int]
    orientation: int | None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, upright, in pixels."""
        height, width = self.stored
        return (width, height) if self.orientation in (5, 6, 7, 8) else (height, width)

    def decode(self, shrink: int = 1) -> Pixels:
        """The pixels as `decode_file` has them, with both sides divided by one of `SHRINKS`, rounded up.

        Raises:
          UnreadableImage: a file that is damaged or cut off.
        """
        with named(self.name):
            pixels = self._decode_quickly(shrink)
            if pixels is None:
                with _open(self.data) as image:
                    image.draft(image.mode, (image.width // shrink, image.height // shrink))
                    pixels = np.asarray(image.convert("RGB"))
            if self.orientation in _UPRIGHT:
                return np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[self.orientation]))
            return pixels

    def _decode_quickly(self, shrink):
        """Simplejpeg's pixels; None where it is missing, or objects to what Pillow may read or name."""
        if simplejpeg is None:
            return None
        height, width = (-(-side // shrink) for side in self.stored)
        try:
            pixels = simplejpeg.decode_jpeg(self.data, min_height=height, min_width=width)
        except ValueError:
            return None
        return pixels if pixels.shape == (height, width, 3) else None


def decode_file(source: str | Path | bytes | BinaryIO | Image.Image, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The RGB pixels of an image file: upright, opaque, 8 bits a channel.

    - EXIF's orientation is undone.
    - Transparent pixels lie on white, so no hidden colour is seen.
    - 16-bit gray is divided by 257 and rounded. That is the file's scale, also if a camera filled 12 of its
      16 bits. 16-bit colours keep their high byte, at most 1 from the rounded quotient.
    - Floating-point gray is in [0, 1], or in [0, 255] if a pixel is above 1.
    - CMYK becomes RGB by (255 - ink) (255 - black) / 255, LAB by its definition. Colour profiles are ignored,
      as transformers, timm and torchvision ignore them.
    - Of several frames or pages, the first is read.

    Args:
      source: the path of a JPEG, PNG, WebP, BMP, TIFF or GIF file, whatever its suffix; the bytes of one; a
        binary file with one; or an image that Pillow opened.
      max_pixels: an image of more is refused before it is decoded.

    Raises:
      UnreadableImage: a file that is missing, damaged, cut off or none of these; more than ``max_pixels``
        pixels; integers of 32 bits, or floating-point numbers out of range. In one line, with its name.
    """
    return whole(open_image(source, max_pixels))


def whole(image: Pixels | Jpeg) -> Pixels:
    """All pixels of what `open_image` returns."""
    return image.decode() if isinstance(image, Jpeg) else image


def open_image(
    source: str | Path | bytes | BinaryIO | Image.Image,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Pixels | Jpeg:
    """What `decode_file` decodes; of a JPEG in gray or RGB, given by its path or as bytes, the header alone.

    Args:
      source: as for `decode_file`.
      max_pixels: as for `decode_file`.
      name: what errors call it; by default its path.

    Raises:
      UnreadableImage: as for `decode_file`; a JPEG may turn out to be damaged when it is decoded.
    """
    if name is None:
        name = str(source if isinstance(source, str | Path) else getattr(source, "name", None) or "the image")
    with named(name):
        if isinstance(source, Image.Image):
            return _upright_rgb(source, max_pixels)
        source = _jpeg_bytes(source) or source
        if isinstance(source, bytes) and (size := _plain_jpeg_size(source)):
            _check_size(*size, max_pixels)
            return Jpeg(source, name, size, None)
        with _open(source) as image:
            # Others, such as CMYK or several pictures in one file, are Pillow's.
            if isinstance(source, bytes) and image.format == "JPEG" and image.mode in ("RGB", "L"):
                _check_size(image.height, image.width, max_pixels)
                return Jpeg(source, name, (image.height, image.width), _orientation(image))
            return _upright_rgb(image, max_pixels)


@contextmanager
def named(name: str) -> Generator[None]:
    """Whatever goes wrong in the block becomes an `UnreadableImage` of that name."""
    try:
        yield
        return
    except FileNotFoundError:
        raise UnreadableImage(f"no image file at {name}") from None
    except UnidentifiedImageError:
        reason = "it is no whole JPEG, PNG, WebP, BMP, TIFF or GIF file"
    except Exception as error:  # a damaged file can lead Pillow's decoders to any
        reason = " ".join(str(error).split()) or type(error).__name__
    raise UnreadableImage(f"{name} cannot be read as an image: {reason}")


def _jpeg_bytes(source: Any) -> bytes | None:
    """The bytes of a file that begins as a JPEG does; None for others, which need not be read whole."""
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str | Path):
        return None
    mode = os.stat(source).st_mode
    if not stat.S_ISREG(mode):  # a pipe would be waited for
        raise ValueError(f"it is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
    with open(source, "rb") as file:
        return file.read() if file.peek(3).startswith(JPEG_START) else None


def _plain_jpeg_size(source: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that nothing but its pixels and colours needs to be known of; None else.

    simplejpeg reads a header in a fifth of Pillow's time, but not what EXIF, XMP or other pictures in the
    file say.
    """
    is_jpeg = source.startswith(JPEG_START)
    if simplejpeg is None or not is_jpeg or any(mark in source for mark in MORE_TO_KNOW):
        return None
    try:
        header: Any = simplejpeg.decode_jpeg_header(source)
    except ValueError:
        return None
    height, width, colors, _ = header
    return (height, width) if colors in ("RGB", "YCbCr", "Gray") else None


def _open(source):
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    with _pillows_limit:  # one for the process, with a warning at half of it; MAX_PIXELS is the limit here
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(height, width, max_pixels):
    if width * height > max_pixels:
        raise ValueError(f"it has {width} x {height} pixels; at most {max_pixels:,} are read")


def _orientation(image):
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the image is whole, what is said of it is not
        return None


def _upright_rgb(image, max_pixels):
    _check_size(image.height, image.width, max_pixels)
    _scale_transparent_color(image)
    image.load()  # all that a file says of its image may come after the pixels
    orientation = _orientation(image)
    rgb = _to_rgb(image)
    return np.asarray(rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb)


def _scale_transparent_color(image):
    """Scale a PNG's transparent colour as Pillow scales the pixels, to 8 bits a channel."""
    color = image.info.get("transparency")
    packing = image.tile[0].args if image.format == "PNG" and image.tile else None
    if color is None or packing not in ("L;2", "L;4", "RGB;16B"):
        return
    if packing == "RGB;16B":  # colours that share the high bytes are transparent with it
        image.info["transparency"] = tuple(value >> 8 for value in color)
    else:
        image.info["transparency"] = color * {"L;2": 85, "L;4": 17}[packing]


def _to_rgb(image):
    if image.mode == "I":
        raise ValueError("its pixels are 32-bit or signed integers, of unknown range; save 8 or 16 bits")
    if image.mode == "F" or image.mode.startswith("I;16"):
        gray = _gray_from_floats(image) if image.mode == "F" else _gray_from_16_bits(image)
        return Image.fromarray(gray).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image.convert("RGBA"))
    return image.convert("RGB")


def _gray_from_16_bits(image):
    values = np.asarray(image).astype(np.uint32)
    gray = _black_is_zero(image, ((values + 128) // 257).astype(np.uint8))
    return np.where(values == image.info.get("transparency"), np.uint8(BACKGROUND[0]), gray)


def _gray_from_floats(image):
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 255:  # or a number is NaN
        raise ValueError(f"its pixels are from {low:g} to {high:g}; expected [0, 1] or [0, 255]")
    return _black_is_zero(image, np.round(values * (1 if high > 1 else 255)).astype(np.uint8))


def _black_is_zero(image, gray):
    """``gray``, inverted if it is a TIFF's whose white is zero; Pillow does so up to 8 bits alone."""
    is_tiff = image.format == "TIFF"
    photometric = image.tag_v2.get(262) if is_tiff else None
    return 255 - gray if photometric == 0 else gray
