"""Image files against the numbers that were written into them."""

import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from shiftaddvit_jax.data import decode_file, images
from shiftaddvit_jax.data.images import (
    FORMATS,
    MAX_PIXELS,
    SHRINKS,
    SUFFIXES,
    Jpeg,
    UnreadableImage,
    open_image,
)

RAMP = np.linspace(0, 65535, 256 * 8).astype(np.uint16).reshape(8, 256)
DIVIDED = np.round(RAMP / 257).astype(np.uint8)  # 65535 / 255 is 257
COLORS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)


def encode(image, suffix, **settings):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[suffix], **settings)
    return file.getvalue()


def in_rgb(gray):
    return np.repeat(np.asarray(gray)[..., None], 3, axis=-1)


def png(rows, width, bits, color_type, height=None, **chunks):
    """A PNG of raw rows; ``height`` is what its header says, by default their number."""
    header = struct.pack(">IIBBBBB", width, height or len(rows), bits, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = {"IHDR": header, **chunks, "IDAT": data, "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part))
        + name.encode()
        + part
        + struct.pack(">I", zlib.crc32(name.encode() + part))
        for name, part in parts.items()
    )


def png16(array, color_type, **chunks):
    return png([row.astype(">u2").tobytes() for row in array], array.shape[1], 16, color_type, **chunks)


def tiff(array, photometric, order="<", kind=1):
    """An uncompressed TIFF; ``kind`` is 1 for unsigned, 2 for signed, 3 for floating-point numbers."""
    height, width, *rest = array.shape
    samples = rest[0] if rest else 1
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(f"{order}{samples}H", *[8 * array.dtype.itemsize] * samples)
    kinds = struct.pack(f"{order}{samples}H", *[kind] * samples)
    after = 8 + len(data)
    tags = [(256, "I", width), (257, "I", height), (258, bits, after), (259, "H", 1), (262, "H", photometric)]
    tags += [(273, "I", 8), (277, "H", samples), (278, "I", height), (279, "I", len(data))]
    tags += [(339, kinds, after + len(bits))]
    directory = struct.pack(f"{order}H", len(tags))
    for tag, form, value in tags:
        if isinstance(form, bytes):  # several numbers: what fits into four bytes is here, more is elsewhere
            field = form.ljust(4, b"\0") if len(form) <= 4 else struct.pack(f"{order}I", value)
            directory += struct.pack(f"{order}HHI", tag, 3, samples) + field
        else:
            field = struct.pack(order + form, value).ljust(4, b"\0")
            directory += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[form], 1) + field
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", after + 2 * len(bits))
    return start + data + bits + kinds + directory + bytes(4)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_pixels_are_those_that_were_written(suffix):
    settings = {"lossless": True} if suffix == ".webp" else {}
    np.testing.assert_array_equal(decode_file(encode(COLORS, suffix, **settings)), COLORS)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".gif"])
def test_one_color_survives_where_pixels_are_lossy(suffix):
    pixels = decode_file(encode(Image.new("RGB", (16, 16), (200, 100, 50)), suffix))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (16, 16, 3))
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to((200, 100, 50), (16, 16, 3)), atol=3)


@pytest.mark.parametrize("source", ["path", "text", "bytes", "file", "image"])
def test_a_path_bytes_a_file_and_an_image_are_the_same_pixels(tmp_path, source):
    path = tmp_path / "colors.PNG"
    path.write_bytes(encode(COLORS, ".png"))
    with path.open("rb") as file, Image.open(path) as image:
        sources = {"path": path, "text": str(path), "bytes": path.read_bytes(), "file": file, "image": image}
        np.testing.assert_array_equal(decode_file(sources[source]), COLORS)
        assert not file.closed


def test_what_a_file_holds_counts_not_its_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(COLORS, ".png"))
    np.testing.assert_array_equal(decode_file(tmp_path / "a.jpg"), COLORS)


def test_every_suffix_has_a_decoder_and_every_decoder_a_suffix():
    Image.init()
    found = {Image.registered_extensions()[suffix] for suffix in SUFFIXES}
    assert found == set(FORMATS)


# Gray of more and fewer bits.


@pytest.mark.parametrize(
    "data",
    [
        encode(RAMP, ".png"),
        encode(RAMP, ".tif"),
        encode(RAMP, ".tif", compression="tiff_lzw"),
        tiff(RAMP, 1, "<"),
        tiff(RAMP, 1, ">"),
        tiff(65535 - RAMP, 0, "<"),
    ],
    ids=["png", "tiff", "lzw", "little", "big", "white is zero"],
)
def test_16_bit_gray_is_divided_and_rounded(data):
    pixels = decode_file(data)
    np.testing.assert_array_equal(pixels, in_rgb(DIVIDED))
    assert len(np.unique(pixels)) == 256
    assert pixels.mean() == pytest.approx(127.5, abs=0.1)


def test_every_16_bit_value_is_rounded_as_it_should_be():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(decode_file(encode(values, ".png"))[..., 1], np.round(values / 257))


def test_12_bits_in_16_keep_the_files_scale():
    pixels = decode_file(encode(RAMP // 16, ".png"))
    np.testing.assert_array_equal(pixels, in_rgb(np.round(RAMP // 16 / 257)))
    assert len(np.unique(pixels)) == 17


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_colors_keep_256_levels(order):
    colors = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)
    expected = np.round(colors / 257)
    for data in (png16(colors, 2), tiff(colors, 2, order)):
        pixels = decode_file(data)
        np.testing.assert_array_equal(pixels, colors >> 8)
        assert np.abs(pixels - expected).max() <= 1
        assert len(np.unique(pixels)) == 256
        assert pixels.mean() == pytest.approx(127.5, abs=0.1)


def test_16_bit_alpha_is_composed():
    alpha = np.full_like(RAMP, 65535)
    alpha[:4] = 0
    for array, color_type in ((np.stack([RAMP, alpha], -1), 4), (np.stack([RAMP] * 3 + [alpha], -1), 6)):
        pixels = decode_file(png16(array, color_type))
        assert (pixels[:4] == 255).all()
        np.testing.assert_array_equal(pixels[4:], in_rgb(RAMP >> 8)[4:])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [False, True])
def test_gray_of_few_bits_spans_0_to_255_and_its_transparent_level_is_white(bits, transparent):
    levels = np.arange(2**bits)
    packed = np.packbits(np.unpackbits(levels.astype(np.uint8)[:, None], axis=1)[:, -bits:].ravel())
    chunks = {"tRNS": struct.pack(">H", 1)} if transparent else {}
    pixels = decode_file(png([packed.tobytes()], len(levels), bits, 0, **chunks))
    expected = levels * 255 // (2**bits - 1)
    if transparent:
        expected[1] = 255
    np.testing.assert_array_equal(pixels[0], in_rgb(expected))


def test_gray_and_one_bit_files_have_three_equal_channels():
    gray = COLORS[..., 0]
    np.testing.assert_array_equal(decode_file(encode(gray, ".png")), in_rgb(gray))
    assert np.unique(decode_file(encode(Image.new("L", (8, 8), 7), ".jpg"))) == [7]
    for suffix in (".png", ".tif", ".bmp"):
        bits = Image.fromarray(gray > 127)
        np.testing.assert_array_equal(decode_file(encode(bits, suffix)), in_rgb(255 * (gray > 127)))


@pytest.mark.parametrize("scale", [1, 255])
def test_floating_point_gray_is_scaled(scale):
    values = (RAMP / 65535 * scale).astype(np.float32)
    expected = np.round(values * (255 / scale))
    for data in (encode(values, ".tif"), tiff(values, 1, ">", kind=3), tiff(values, 1, "<", kind=3)):
        np.testing.assert_array_equal(decode_file(data), in_rgb(expected))
    np.testing.assert_array_equal(decode_file(tiff(values, 0, kind=3)), in_rgb(255 - expected))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(np.full((2, 2), -0.5, np.float32), ".tif"), r"from -0\.5 to -0\.5; expected \[0, 1\]"),
        (encode(np.full((2, 2), 300, np.float32), ".tif"), "from 300 to 300"),
        (encode(np.full((2, 2), np.nan, np.float32), ".tif"), "from nan to nan"),
        (encode(np.full((2, 2), 70000, np.int32), ".tif"), "32-bit or signed integers"),
        (tiff(np.full((2, 2), -3, np.int16), 1, kind=2), "32-bit or signed integers"),
        (tiff(np.zeros((2, 2, 3), np.float32), 2, kind=3), "no whole JPEG, PNG"),
    ],
)
def test_numbers_of_unknown_range_are_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        decode_file(data)


# Orientation.


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(suffix, orientation):
    """Each corner of the upright image has a gray of its own; the stored one is turned as EXIF says."""
    upright = np.zeros((32, 48), np.uint8)
    upright[:16, 24:], upright[16:, :24], upright[16:, 24:] = 80, 160, 240
    rows_first, rows_last = upright, upright[::-1]
    stored = {  # EXIF 2.3, table 8: where the stored rows and columns lie on the upright image
        1: rows_first,
        2: rows_first[:, ::-1],
        3: rows_last[:, ::-1],
        4: rows_last,
        5: rows_first.T,
        6: rows_first.T[::-1],
        7: rows_first.T[::-1, ::-1],
        8: rows_first.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {".webp": {"lossless": True}, ".jpg": {"quality": 95}}.get(suffix, {})
    pixels = decode_file(encode(np.ascontiguousarray(stored), suffix, exif=exif, **settings))
    np.testing.assert_allclose(pixels.astype(int), in_rgb(upright), atol=2)


@pytest.mark.parametrize("exif", [b"Exif\0\0damaged", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_leaves_the_image_as_it_is_stored(exif):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_file(encode(COLORS, ".png", exif=exif)).shape == COLORS.shape


# Transparency.


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
@pytest.mark.parametrize("hidden", [BLACK, GREEN])
def test_hidden_colors_are_not_seen(suffix, hidden):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., :3] = hidden
    rgba[2:6, 2:6] = (*RED, 255)
    settings = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[2:6, 2:6] = RED
    np.testing.assert_array_equal(decode_file(encode(rgba, suffix, **settings)), expected)


def test_half_transparent_colors_are_mixed_with_white():
    alpha = np.arange(256, dtype=np.uint8)[:, None]
    rgba = np.concatenate([np.tile(np.uint8([10, 120, 250]), (256, 1)), alpha], axis=1)[None]
    share = alpha / 255
    expected = rgba[..., :3] * share + 255 * (1 - share)
    np.testing.assert_allclose(decode_file(encode(rgba, ".png")), expected, atol=0.6)


def test_a_black_drawing_with_alpha_is_seen():
    gray_alpha = np.zeros((8, 8, 2), np.uint8)
    gray_alpha[2:6, 2:6, 1] = 255
    expected = in_rgb(255 - gray_alpha[..., 1])
    np.testing.assert_array_equal(decode_file(encode(gray_alpha, ".png")), expected)


@pytest.mark.parametrize(
    ("suffix", "transparency"),
    [(".png", None), (".png", 0), (".png", bytes([0, 255, 128])), (".gif", None), (".gif", 0)],
)
def test_palettes_with_and_without_transparency(suffix, transparency):
    image = Image.new("P", (6, 2))
    image.putpalette([*GREEN, *RED, 0, 0, 100])
    image.putdata([0, 0, 1, 1, 2, 2] * 2)
    settings = {} if transparency is None else {"transparency": transparency}
    first = GREEN if transparency is None else WHITE
    last = (127, 127, 177) if isinstance(transparency, bytes) else (0, 0, 100)
    expected = np.repeat(np.array([[first, RED, last]]), 2, axis=1).repeat(2, axis=0)
    np.testing.assert_allclose(decode_file(encode(image, suffix, **settings)), expected, atol=1)


def test_a_color_that_is_called_transparent_is_white():
    colors = np.array([[RED, GREEN, (1, 2, 3)]], np.uint8)
    data = encode(colors, ".png", transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode_file(data), [[RED, GREEN, WHITE]])
    wide = colors.astype(np.uint16) * 257
    data = png16(wide, 2, tRNS=struct.pack(">HHH", *wide[0, 2].tolist()))
    np.testing.assert_array_equal(decode_file(data), [[RED, GREEN, WHITE]])


def test_a_16_bit_gray_that_is_called_transparent_is_white():
    data = png16(RAMP, 0, tRNS=struct.pack(">H", int(RAMP[3, 5])))
    np.testing.assert_array_equal(decode_file(data), in_rgb(np.where(RAMP[3, 5] == RAMP, 255, DIVIDED)))


# Other colours.


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_inks_become_colors(suffix):
    inks = np.array([0, 200, 120, 40])
    expected = (255 - inks[:3]) * (255 - inks[3]) / 255
    pixels = decode_file(encode(Image.new("CMYK", (16, 16), tuple(inks.tolist())), suffix))
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (16, 16, 3)), atol=3)


def test_ycck_jpegs_are_converted():
    """A CMYK JPEG that says YCCK: its components are luminance, both chrominances and black, inverted."""
    stored = np.array([150, 90, 170, 220])
    data = encode(Image.new("CMYK", (16, 16), tuple((255 - stored).tolist())), ".jpg", quality=100)
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0
    data = data[: adobe + 11] + b"\x02" + data[adobe + 12 :]
    luminance, blue, red = stored[0], stored[1] - 128, stored[2] - 128
    colors = luminance + np.array([1.402 * red, -0.344136 * blue - 0.714136 * red, 1.772 * blue])
    # libjpeg makes 255 - colour of it, as ink; Adobe's inks are inverted once more.
    expected = (255 - colors.clip(0, 255)) * stored[3] / 255
    np.testing.assert_allclose(decode_file(data), np.broadcast_to(expected, (16, 16, 3)), atol=4)


def test_lab_becomes_srgb():
    for lightness, gray in ((0, 0), (50, 119), (100, 255)):  # CIE 15: L* of a gray in sRGB
        lab = np.full((4, 4, 3), (round(lightness * 2.55), 0, 0), np.uint8)
        np.testing.assert_allclose(decode_file(tiff(lab, 8)).astype(int), gray, atol=1)


# The first of several.


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_the_first_frame_is_read(suffix):
    first, second = (Image.new("RGB", (8, 8), color) for color in (RED, GREEN))
    settings = {"lossless": True} if suffix == ".webp" else {}
    data = encode(first, suffix, save_all=True, append_images=[second], **settings)
    np.testing.assert_array_equal(decode_file(data), np.broadcast_to(RED, (8, 8, 3)))


def test_a_jpeg_of_several_pictures_is_read():
    file = io.BytesIO()
    first, second = (Image.new("RGB", (16, 16), color) for color in ((90, 90, 90), WHITE))
    first.save(file, "MPO", save_all=True, append_images=[second])
    assert (decode_file(file.getvalue()) == 90).all()


# What is refused.


def refusal(source):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        decode_file(source)
    assert error.value.__cause__ is None
    return str(error.value)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        POSTSCRIPT,
        b"%PDF-1.4\n",
        b"<html>404</html>",
        b"P6 1 1 255\n\0\0\0",
        "AVIF",
        "JPEG2000",
        "ICO",
    ],
    ids=lambda data: str(data)[:12],
)
def test_other_files_named_jpg_are_refused(tmp_path, data):
    if isinstance(data, str):
        file = io.BytesIO()
        Image.new("RGB", (32, 32)).save(file, data)
        data = file.getvalue()
    (tmp_path / "cat.jpg").write_bytes(data)
    message = refusal(tmp_path / "cat.jpg")
    reason = "it is no whole JPEG, PNG, WebP, BMP, TIFF or GIF file"
    assert message == f"{tmp_path / 'cat.jpg'} cannot be read as an image: {reason}"


def test_no_program_is_started(tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "cat.jpg").write_bytes(POSTSCRIPT)
    refusal(tmp_path / "cat.jpg")
    refusal(POSTSCRIPT)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif", ".gif"])
def test_files_cut_off_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(noise, suffix)
    for share in (0.02, 0.5, 0.9):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(data[: int(share * len(data))])
        assert refusal(path).startswith(f"{path} cannot be read as an image: ")


def pixels_or_refusal(source):
    try:
        return decode_file(source)
    except ValueError as error:
        return str(error)


def test_a_damaged_file_gives_pixels_or_one_line():
    """Bytes are changed at random: no error but a `ValueError` of one line."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for suffix in (".jpg", ".png", ".webp", ".bmp", ".tif", ".gif"):
            whole = np.frombuffer(encode(noise, suffix, exif=exif), np.uint8)
            for _ in range(40):
                damaged = whole.copy()
                places = rng.integers(0, min(len(whole), 300), 3)
                damaged[places] = rng.integers(0, 256, 3)
                found = pixels_or_refusal(damaged.tobytes())
                assert isinstance(found, np.ndarray) or "\n" not in found


def test_what_is_no_file_is_refused(tmp_path):
    assert refusal(tmp_path / "no.jpg") == f"no image file at {tmp_path / 'no.jpg'}"
    assert refusal(tmp_path).endswith("it is a folder")
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    assert refusal(pipe).endswith("it is no regular file")


def test_too_many_pixels_are_refused_before_they_are_decoded():
    width, height = 14000, 13000
    assert width * height > MAX_PIXELS
    assert refusal(png([], width, 8, 0, height=height)).endswith(
        "it has 14000 x 13000 pixels; at most 178,956,970 are read"
    )


def test_images_that_pillow_warns_of_are_read_without_a_word(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # it warns above, and raises above twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode_file(encode(COLORS, ".png")), COLORS)
    assert Image.MAX_IMAGE_PIXELS == 20


@pytest.mark.parametrize("shape", [(1, 1), (5000, 1), (1, 5000)])
def test_thin_images_are_read(shape):
    pixels = np.full((*shape, 3), (9, 8, 7), np.uint8)
    np.testing.assert_array_equal(decode_file(encode(pixels, ".png")), pixels)


def test_threads_decode_at_once():
    data = encode(COLORS, ".png")
    with ThreadPoolExecutor(8) as pool:
        for pixels in pool.map(decode_file, [data] * 64):
            np.testing.assert_array_equal(pixels, COLORS)


def photograph(height=61, width=83):
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 5 + k) + np.cos(columns / (4 + k)) for k in range(3)]
    return (127 + 60 * np.stack(waves, -1)).astype(np.uint8)


def jpeg(tmp_path, pixels, orientation=None, **settings):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    path = tmp_path / "photograph.jpg"
    Image.fromarray(pixels).save(path, quality=90, exif=exif, **settings)
    return path


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(images, "simplejpeg", None)
    return request.param


@pytest.mark.parametrize(
    "settings",
    [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"restart_marker_blocks": 2}],
    ids=str,
)
@pytest.mark.parametrize("gray", [False, True])
def test_a_jpeg_is_the_picture_that_pillow_decodes(tmp_path, decoder, settings, gray):
    pixels = photograph()[..., 0] if gray else photograph()
    path = jpeg(tmp_path, pixels, **settings)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    assert abs(decode_file(path).astype(int) - expected).max() <= 1
    assert abs(decode_file(path.read_bytes()).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_a_jpeg_is_shrunk_upright_and_its_size_known_before(tmp_path, decoder, orientation):
    sides = (64, 88) if orientation else (61, 83)
    image = open_image(jpeg(tmp_path, photograph(*sides), orientation))
    assert isinstance(image, Jpeg)
    whole = image.decode()
    assert image.size == whole.shape[:2] == decode_file(tmp_path / "photograph.jpg").shape[:2]
    for shrink in (2, 4, 8):
        small = image.decode(shrink)
        assert small.shape[:2] == tuple(-(-side // shrink) for side in image.size)
        # Means of squares, which the scaled transforms of libjpeg come close to.
        rows, columns = (side // shrink for side in image.size)
        squares = whole[: rows * shrink, : columns * shrink].reshape(rows, shrink, columns, shrink, 3)
        inner = small[2 : rows - 2, 2 : columns - 2].astype(float)
        means = squares.mean((1, 3))[2 : rows - 2, 2 : columns - 2]
        assert abs(inner - means).mean() < 2


def test_both_decoders_shrink_to_the_same_picture(tmp_path, monkeypatch):
    image = open_image(jpeg(tmp_path, photograph(), 6))
    quick = [image.decode(shrink).astype(int) for shrink in SHRINKS]
    monkeypatch.setattr(images, "simplejpeg", None)
    for one, shrink in zip(quick, SHRINKS, strict=True):
        assert abs(one - image.decode(shrink).astype(int)).max() <= 1


@pytest.mark.parametrize("kept", [0.4, 0.9, 0.995])
def test_a_jpeg_that_is_cut_off_is_refused_by_both_decoders(tmp_path, decoder, kept):
    path = jpeg(tmp_path, photograph())
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UnreadableImage, match=r"photograph\.jpg cannot be read as an image: .*truncated"):
        decode_file(path)


def test_what_simplejpeg_is_not_for_is_pillows(tmp_path):
    Image.fromarray(photograph()).convert("CMYK").save(tmp_path / "ink.jpg")
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    for name in ("ink.jpg", "a.png"):
        assert isinstance(open_image(tmp_path / name), np.ndarray)
