"""Untrusted bytes to pixels: what is refused and why, and how odd images are read."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from skimage import data as photographs

from gc2ray.core.config.input import ImageLimits
from gc2ray.core.errors import BadRow
from gc2ray.data.image_decoding import MAX_SIDE, decode, upright_size
from tests.support.images import POLICY, gradient, refusal_message
from tests.support.rows import encoded

# Pillow remarks on damaged metadata; here most of it is damaged on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@functools.cache
def samples():
    """Small valid images of every format and of the odd corners of some."""
    image, other = gradient(), gradient().rotate(180)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    animated = {"save_all": True, "append_images": [other]}
    return {
        "jpeg": encoded(image, "JPEG", exif=exif),
        "jpeg progressive": encoded(image, "JPEG", progressive=True),
        "mpo": encoded(image, "MPO", **animated),
        "png": encoded(image, "PNG", exif=exif),
        "png palette": encoded(image.convert("P"), "PNG", transparency=3),
        "png 16": encoded(Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40)), "PNG"),
        "gif": encoded(image, "GIF", **animated),
        "webp": encoded(image, "WEBP", exif=exif),
        "webp animated": encoded(image, "WEBP", **animated),
        "tiff": encoded(image, "TIFF", exif=exif),
        "tiff lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encoded(image, "TIFF", compression="jpeg"),
        "tiff float": encoded(image.convert("F"), "TIFF"),
        "bmp": encoded(image, "BMP"),
        "ppm": encoded(image, "PPM"),
        "avif": encoded(image, "AVIF"),
        "jpeg 2000": encoded(image, "JPEG2000"),
        "jpeg 2000 tiled": encoded(image, "JPEG2000", tile_size=(16, 16), no_jp2=True),
    }


SAMPLE_NAMES = tuple(samples())


def forbid_decoding(monkeypatch):
    """Record, instead of do, every decoding of pixels."""
    calls = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", calls.append)
    return calls


def png_header(width, height, bits=8, colour=2):
    """A tiny PNG that claims to be of this size."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_cut_image_is_refused_or_whole(name):
    data = samples()[name]
    whole = decode(data, POLICY)
    refusals = 0
    for length in range(1, len(data)):
        try:
            image = decode(data[:length], POLICY)
        except BadRow:
            refusals += 1
        else:  # only what comes after the first frame was cut off
            assert image.tobytes() == whole.tobytes(), f"half an image from {length} bytes"
    assert refusals > len(data) // 3


def test_truncated_photograph_is_refused():
    data = encoded(Image.fromarray(photographs.astronaut()), "JPEG")
    assert "truncated" in refusal_message(decode, data[: len(data) // 2], POLICY)


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        np.random.default_rng(0).bytes(4096),
        b"\x00",
        b"\xff\xd8\xff",
        b'{"error": "gone"}\n\n',
    ],
    ids=["html", "random", "null byte", "three bytes of JPEG", "json"],
)
def test_wrong_bytes_are_refused(data):
    message = refusal_message(decode, data, POLICY)
    assert "not an image" in message or "cannot decode" in message
    assert "0x" not in message, "an address differs from run to run"


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_header_bomb_is_refused_undecoded(side, monkeypatch):
    calls = forbid_decoding(monkeypatch)
    assert "more than 80000000 pixels" in refusal_message(decode, png_header(side, side), POLICY)
    assert not calls


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_pixel_limit_holds_before_decoding_in_every_format(name, monkeypatch):
    data = samples()[name]
    assert decode(data, ImageLimits(max_pixels=960)).mode == "RGB"
    calls = forbid_decoding(monkeypatch)
    assert "959 pixels" in refusal_message(decode, data, ImageLimits(max_pixels=959))
    assert not calls


def test_endless_side_is_refused_undecoded(monkeypatch):
    calls = forbid_decoding(monkeypatch)
    bomb = png_header(MAX_SIDE + 1, 1, bits=1, colour=0)
    assert "a side over" in refusal_message(decode, bomb, POLICY)
    assert not calls


def test_eps_is_refused():
    eps = encoded(gradient(), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    assert "known format" in refusal_message(decode, eps, POLICY)


def test_messages_quote_no_bytes():
    data = b"P3\n1 1\n255\n1 a\xfe 2"
    with pytest.raises(ValueError, match="xfe"):
        Image.open(io.BytesIO(data)).load()
    assert "xfe" not in refusal_message(decode, data, POLICY)


def grays(image):
    """The first row, of an image that must be gray."""
    pixels = np.asarray(image)
    assert (pixels[..., :1] == pixels).all()
    return pixels[0, :, 0].tolist()


def test_16_bits_are_scaled_not_clipped():
    values = np.array([[0, 255, 256, 1000, 32768, 65535]])
    expected = [0, 0, 1, 3, 128, 255]
    image = Image.fromarray(values.astype(np.uint16))
    assert image.mode == "I;16"
    assert grays(decode(encoded(image, "PNG"), POLICY)) == expected
    assert grays(decode(encoded(image, "TIFF"), POLICY)) == expected
    big = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert grays(decode(encoded(big, "TIFF"), POLICY)) == expected
    assert grays(decode(b"P5\n6 1\n65535\n" + values.astype(">u2").tobytes(), POLICY)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 7, 255], [0, 7, 255]),
        ([-9, 0, 255], [0, 0, 255]),
        ([0, 256, 65535], [0, 1, 255]),
        ([0, 65536, 2**24 - 1], [0, 1, 255]),
        ([0, 2**24, 2**31 - 1], [0, 1, 127]),
        ([-(2**31), -1, -5], [0, 0, 0]),
    ],
)
def test_32_bit_integers(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert image.mode == "I"
    assert grays(decode(encoded(image, "TIFF"), POLICY)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 1.5, 255.0], [0, 2, 255]),
        ([0.0, 500.0, 1000.0], [0, 128, 255]),
        ([-3.0, float("nan"), 1.0], [0, 0, 255]),
        ([float("inf"), 3e38, 0.0], [0, 255, 0]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_floating_point(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F"
    assert grays(decode(encoded(image, "TIFF"), POLICY)) == expected


def test_1_bit():
    image = Image.fromarray(np.array([[True, False, True]]))
    assert grays(decode(encoded(image, "PNG"), POLICY)) == [255, 0, 255]


def test_transparency_is_laid_on_white():
    gray = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.frombytes("L", (2, 1), b"\0\xff")])
    assert grays(decode(encoded(gray, "PNG"), POLICY)) == [255, 100]
    colour = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    assert decode(encoded(colour, "PNG"), POLICY).getpixel((0, 0)) == (227, 177, 127)
    palette = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image = decode(encoded(palette, "PNG", transparency=1), POLICY)
    assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255,) * 3, (0, 0, 255)]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    pixel = decode(encoded(image, "JPEG"), POLICY).getpixel((4, 4))
    assert np.abs(np.array(pixel) - (0, 255, 255)).max() <= 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame_of_an_animation(kind):
    red, blue = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    data = encoded(red, kind, save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    image = decode(data, POLICY)
    assert image.size == (8, 6)
    pixel = np.array(image.getpixel((4, 3)), dtype=int)
    assert np.abs(pixel - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), kind, exif=exif)
    upright = decode(data, POLICY)
    assert upright.tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes()
    assert upright.size == ((24, 40) if orientation >= 5 else (40, 24))


@pytest.mark.parametrize("name", samples())
def test_the_size_of_every_format_is_known_from_its_header(name):
    data = samples()[name]
    assert upright_size(data, ImageLimits()) == decode(data, ImageLimits()).size[::-1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_is_known_from_the_header(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), kind, exif=exif)
    assert upright_size(data, ImageLimits()) == decode(data, ImageLimits()).size[::-1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_header_is_enough_for_the_size(kind):
    data = encoded(gradient(), kind)
    data = data[: len(data) - 120]
    assert upright_size(data, ImageLimits()) == gradient().size[::-1]
    with pytest.raises(BadRow, match="cannot decode"):
        decode(data, ImageLimits())


def test_a_bad_header_is_refused_with_the_message_of_decoding():
    for data, policy in (
        (b"nothing", ImageLimits()),
        (encoded(gradient(), "PNG"), ImageLimits(max_pixels=100)),
    ):
        with pytest.raises(BadRow) as decoding:
            decode(data, policy)
        with pytest.raises(BadRow) as looking:
            upright_size(data, policy)
        assert looking.value.message == decoding.value.message


@pytest.mark.parametrize("exif", [b"Exif\0\0??garbage", b"Exif\0\0II*\0"])
def test_an_image_with_damaged_exif_is_decoded(exif):
    data = encoded(gradient(), "PNG", exif=exif)
    with pytest.raises((SyntaxError, struct.error)):
        Image.open(io.BytesIO(data)).getexif()
    assert decode(data, POLICY).tobytes() == gradient().tobytes()


def test_a_decoded_image_holds_no_file():
    for data in samples().values():
        assert type(decode(data, POLICY)) is Image.Image


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=64), st.sampled_from([b"", *(data[:12] for data in samples().values())]))
def test_any_bytes_are_decoded_or_refused(tail, head):
    decoded_or_refused(head + tail)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_images_are_decoded_or_refused(draw):
    data = bytearray(samples()[draw.draw(st.sampled_from(SAMPLE_NAMES))])
    reach = draw.draw(st.sampled_from([40, 200, len(data)]))  # headers are where it hurts
    for _ in range(draw.draw(st.integers(1, 6))):
        place = draw.draw(st.integers(0, min(reach, len(data)) - 1))
        data[place] = draw.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, data[place] ^ 1]))
    if draw.draw(st.booleans()):
        del data[draw.draw(st.integers(0, len(data))) :]
    decoded_or_refused(bytes(data))


def decoded_or_refused(data):
    message = ""
    try:
        image = decode(data, ImageLimits(max_pixels=1_000_000))
    except BadRow as error:
        message = error.message
    else:
        assert image.mode == "RGB"
        assert len(image.tobytes()) == image.width * image.height * 3
    assert not message or message.isprintable()
    assert len(message) <= 200
