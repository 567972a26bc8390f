"""Untrusted bytes to RGB pixels.

Bytes are decoded by a fixed list of Pillow's readers after their header has been checked, and
refused with `BadRow` if any of the image is missing.

Colours follow transformers' `do_convert_rgb` (transparency is laid on white), save for samples of
more than 8 bits, which Pillow would clip and which are scaled here. Turning by EXIF orientation
follows transformers' `load_image`.

Not covered: colour profiles, later frames of animations, samples of 9 to 15 bits stored in 16
(they come out dark), decoding at reduced size. A JPEG that somebody cut and closed again with an
end marker is complete to every decoder. `PIL.ImageFile.LOAD_TRUNCATED_IMAGES`, if other code in
the process sets it, defeats the check for missing data.
"""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from gc2ray.core.config.input import (
    ImageLimits,
)
from gc2ray.core.errors import BadRow, Status

MAX_SIDE = 1 << 20
"""Longest side that is decoded. Pillow's resize takes 32 bytes of filter weights for each pixel of
a side: an image of one row could stay within `max_pixels` and still need gigabytes."""
# MPO has no reader of its own: JPEG's opens it. EPS must never be here, it starts Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# What Pillow's readers raise on bytes that are not what they claim to be. Caught around calls into
# Pillow only. The plain programming errors among them come from readers that trust a header field.
_DECODE_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,  # Pillow's remarks, where the process makes errors of warnings
)
_MESSAGE_LIMIT = 200
_PLACE_LIMIT = 120
_BYTES_REPR = re.compile(r"""b(['"]).*?\1""")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, limits: ImageLimits) -> Image.Image:
    """The first frame as an upright RGB image.

    More than 8 bits: samples of 16 bits lose their lower byte. 32-bit integers are taken as they
    are up to 255, else lose as many low bytes as it takes; negative ones are black. Floating point
    is taken as 0..1 if nothing exceeds 1, as 0..255 if nothing exceeds that, else the largest
    value becomes white; negative and not finite values are black.

    Raises:
        BadRow: `BAD_IMAGE`: not an image of a known format, too large, damaged or cut short.
    """
    image = _loaded(data, limits)
    orientation = _orientation(image)
    try:
        rgb = _to_rgb(image)
    except (ValueError, OSError, MemoryError) as error:
        raise refusal(f"cannot convert mode {image.mode} to RGB") from error
    turn = _TURNS.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def upright_size(data: bytes, limits: ImageLimits) -> tuple[int, int]:
    """(height, width) of the image that `decode` would give, from its header alone.

    Damage behind the header is not seen. A PNG whose orientation stands behind its pixels is taken
    as it lies.

    Raises:
        BadRow: `BAD_IMAGE`: not an image of a known format, or too large.
    """
    image = _loaded(data, limits, pixels=False)
    late = image.format == "PNG" and "exif" not in image.info  # asking would decode the pixels
    upright = image.format == "TIFF"  # Pillow gives the size after turning
    turned = not (late or upright) and _orientation(image) in (5, 6, 7, 8)
    width, height = image.size
    return (width, height) if turned else (height, width)


def _loaded(data: bytes, limits: ImageLimits, *, pixels: bool = True) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(image.size, limits)  # only the header has been read so far
        if image.format == "JPEG2000":
            _check_end(data)
        if pixels:
            image.load()
    except UnidentifiedImageError as error:
        raise refusal(f"not an image of a known format ({', '.join(_FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise refusal(f"the image has more than {limits.max_pixels} pixels") from error
    except _DECODE_ERRORS as error:
        detail = _BYTES_REPR.sub("...", str(error))
        raise refusal(f"cannot decode the image: {type(error).__name__}: {detail}") from error
    return image


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise refusal(f"the image is {width} x {height} pixels")
    if width * height > limits.max_pixels:
        limit = f"more than {limits.max_pixels} pixels"
        raise refusal(f"the image is {width} x {height} pixels, {limit}")
    if max(size) > MAX_SIDE:
        raise refusal(f"the image is {width} x {height} pixels, a side over {MAX_SIDE}")


def _check_end(data: bytes) -> None:
    """Refuse a JPEG 2000 codestream without its end marker.

    OpenJPEG takes one cut between two tiles for whole and leaves the rest black. Compressed data
    cannot contain the marker.
    """
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or data.find(b"\xff\xd9", start) < 0:
        raise refusal("cannot decode the image: it is cut short")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation; 1, upright, where there is none or it cannot be read.

    Damaged metadata does not cost the row: the pixels are whole, and viewers ignore it too.
    """
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, as transformers' `convert_to_rgb` where that does not clip."""
    if image.mode == "F":
        return _gray(_bytes_from_float(np.asarray(image)))
    if image.mode.startswith("I"):
        return _gray(_bytes_from_integers(np.asarray(image)))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).convert("RGB")


def _bytes_from_integers(values: np.ndarray) -> np.ndarray:
    """(H, W) of uint16 or int32 to uint8; the rule is in `decode`."""
    if values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    positive = values.clip(min=0)
    whole_bytes = (int(positive.max()).bit_length() + 7) // 8
    return (positive >> 8 * max(whole_bytes - 1, 0)).astype(np.uint8)


def _bytes_from_float(values: np.ndarray) -> np.ndarray:
    """(H, W) of float32 to uint8; the rule is in `decode`."""
    finite = np.where(np.isfinite(values), values, 0).clip(min=0)
    top = float(finite.max())
    if top <= 1:
        finite = finite * 255
    elif top > 255:
        finite = finite / top * 255
    return finite.round().astype(np.uint8)


def refusal(what: str, path: str | None = None) -> BadRow:
    """`BAD_IMAGE` with one short line; a long path is cut at its beginning."""
    if path is None:
        return BadRow(Status.BAD_IMAGE, one_line(what))
    place = path if len(path) <= _PLACE_LIMIT else "..." + path[3 - _PLACE_LIMIT :]
    head = one_line(what, _MESSAGE_LIMIT - len(place) - 2)
    return BadRow(Status.BAD_IMAGE, one_line(f"{head}: {place}"))


def one_line(text: str, limit: int = _MESSAGE_LIMIT) -> str:
    """A message of printable characters on one line, cut where it is too long."""
    plain = "".join(char if char.isprintable() else " " for char in text)
    line = " ".join(plain.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
