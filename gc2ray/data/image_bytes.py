"""Untrusted bytes to pixels: where they may come from, how large they may be, and anyres tiling.

What a dataset calls an image is not trusted. It is read only from places that the configuration
names, never beyond a size limit, decoded by a fixed list of Pillow's readers after its header has
been checked, and refused with `BadRow` if any of it is missing. What is left is cut into tiles,
bit-equal to transformers' LLaVA-NeXT processor, but with two resizes and as bytes.

Colours follow transformers' `do_convert_rgb` (transparency is laid on white), save for samples of
more than 8 bits, which Pillow would clip and which are scaled here. Turning by EXIF orientation
follows transformers' `load_image`.

Not covered: colour profiles, later frames of animations, samples of 9 to 15 bits stored in 16
(they come out dark), decoding at reduced size. A JPEG that somebody cut and closed again with an
end marker is complete to every decoder. `PIL.ImageFile.LOAD_TRUNCATED_IMAGES`, if other code in
the process sets it, defeats the check for missing data. A symbolic link that changes between check
and read is not caught.
"""

from __future__ import annotations

import errno
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import unquote

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import ExifTags, Image, UnidentifiedImageError

from gc2ray.compression.canvas import AnyRes, Tiles
from gc2ray.core.errors import STORAGE_ERRORS, BadRow, ConfigError, ShardError, Status
from gc2ray.core.records import ImageRef
from gc2ray.data.retries import PATIENCE, Patience
from gc2ray.data.storage import storage_of

ROOTS_KEY = "recipe.input.image_roots"
BYTES_KEY = "recipe.input.max_image_bytes"
PIXELS_KEY = "recipe.input.max_image_pixels"
"""The configuration keys behind `ImagePolicy`; messages name them."""

MAX_PIXELS = 89_478_485
"""Most pixels a policy may allow: from here on Pillow itself warns, then refuses.

Silencing that would need a global of Pillow's or `warnings.catch_warnings`, and neither is safe
with threads. Equals `PIL.Image.MAX_IMAGE_PIXELS` as shipped.
"""

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

WEB_PATIENCE = Patience(total_seconds=20.0)
"""With the web, where somebody else's server may fail for good."""

_MESSAGE_LIMIT = 200
_PLACE_LIMIT = 120
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_BYTES_REPR = re.compile(r"""b(['"]).*?\1""")
_DOT_SEGMENT = re.compile(r"(?:^|[/\\])\.\.?(?:$|[/\\?#;])")
_ROW_ERRNOS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImagePolicy:
    """What is accepted as an image. `MAX_SIDE` holds besides.

    Attributes:
        max_bytes: Most bytes of an encoded image.
        max_pixels: Most pixels, height times width; at most `MAX_PIXELS`.
        roots: Directories and URL prefixes under which images named by a path may lie; without
            any, none may. URLs of any protocol, http and https among them, need a root of theirs.

    Raises:
        ConfigError: A limit is out of range, or a root is empty, chained (`::`) or not plain text.
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 80_000_000
    roots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ConfigError(f"{BYTES_KEY} is {self.max_bytes}; it must be at least 1")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ConfigError(f"{PIXELS_KEY} is {self.max_pixels}; it must be 1 to {MAX_PIXELS}")
        for root in self.roots:
            if not root or "::" in root or _CONTROL.search(root):
                raise ConfigError(f"{ROOTS_KEY}: {root!r} is neither a directory nor a URL prefix")


def load_tiles(ref: ImageRef, anyres: AnyRes, policy: ImagePolicy) -> Tiles:
    """Read, decode and tile one image.

    Raises:
        BadRow: `BAD_IMAGE`, see `read_bytes` and `decode`.
        ConfigError, ShardError: See `read_bytes`.
    """
    return tiles_of(read_bytes(ref, policy), ref, anyres, policy)


def tiles_of(data: bytes, ref: ImageRef, anyres: AnyRes, policy: ImagePolicy) -> Tiles:
    """Decode and tile what was read of an image.

    Raises:
        BadRow: `BAD_IMAGE`, see `decode`.
    """
    try:
        image = decode(data, policy)
    except BadRow as error:
        if ref.data is not None or ref.path is None:
            raise
        raise _refusal(error.message, ref.path) from error
    return tile(image, anyres)


# ---------------------------------------------------------------------------------------- bytes


def read_bytes(ref: ImageRef, policy: ImagePolicy) -> bytes:
    """The encoded image: the bytes of the row, else what lies at its path.

    A relative path is looked for under each root in turn. Local paths are compared with symbolic
    links and `..` resolved, and what is opened is that file; `::` and the like are characters of a
    name. URLs are compared by protocol and whole components, and what is read
    is the URL that was compared. HTTP redirects are not followed: they could leave the root.

    Trouble that may pass is waited out. Of a storage that stays in trouble nothing is known about
    this image, and its shard is tried again; the web is another matter, where one page in a million
    always fails.

    Raises:
        BadRow: `BAD_IMAGE`: null, empty, too large, missing, not a file, not under a root, or a
            page of the web that cannot be had.
        ConfigError: fsspec cannot serve the protocol of a root.
        ShardError: The storage failed in a way that says nothing about this image.
    """
    if ref.data is not None:
        return _checked(ref.data, policy, None)
    if not ref.path:
        raise _refusal("the image is null: it has neither bytes nor a path")
    for location in _locations(ref.path, policy):
        data = _fetch(location, ref.path, policy)
        if data is not None:
            return _checked(data, policy, ref.path)
    raise _refusal("no such image file", ref.path)


def _checked(data: bytes, policy: ImagePolicy, path: str | None) -> bytes:
    if not data:
        raise _refusal("the image has no bytes", path)
    if len(data) > policy.max_bytes:
        raise _refusal(f"the image has more than {policy.max_bytes} bytes", path)
    return data


def _locations(path: str, policy: ImagePolicy) -> list[str]:
    """Where to look for a path: resolved, under a root, at least one.

    Raises:
        BadRow: Not under any root.
    """
    if not policy.roots:
        raise _refusal(f"images by path are off; {ROOTS_KEY} must name their directory", path)
    if _CONTROL.search(path) or _sneaky(path):
        raise _refusal("the path is refused: control characters, '::', or dots in a URL", path)
    roots = [_resolved(root) for root in policy.roots]
    allowed = [
        location
        for location in map(_resolved, _candidates(path, policy.roots))
        if any(_lies_under(location, root) for root in roots)
    ]
    if not allowed:
        raise _refusal(f"the path lies outside {ROOTS_KEY}", path)
    return allowed


def _sneaky(path: str) -> bool:
    """Whether a URL could be read as another than the one that is compared.

    fsspec takes `::` for a chain of file systems. HTTP clients resolve dot segments, also if they
    are percent-encoded or stand before a query.
    """
    url = _URL.fullmatch(path)
    if url is None:
        return False
    web = url[1].lower() in ("http", "https")
    return "::" in path or (web and _DOT_SEGMENT.search(unquote(url[2])) is not None)


def _candidates(path: str, roots: tuple[str, ...]) -> Iterator[str]:
    if _URL.fullmatch(path) or path.startswith("/"):
        yield path
        return
    for root in roots:
        joined = f"{root.rstrip('/')}/{path}"
        if not _sneaky(joined):
            yield joined


def _resolved(location: str) -> str:
    """A location with one spelling: a real absolute path, or `protocol://` and its components."""
    url = _URL.fullmatch(location)
    protocol, rest = (url[1].lower(), url[2]) if url else ("file", location)
    if protocol in ("file", "local"):
        return os.path.realpath(rest)
    parts: list[str] = []
    for part in rest.rstrip("/").split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part != ".":
            parts.append(part)
    return f"{protocol}://{'/'.join(parts)}"


def _lies_under(location: str, root: str) -> bool:
    return location == root or location.startswith(root.rstrip("/") + "/")


def _fetch(location: str, path: str, policy: ImagePolicy) -> bytes | None:
    """At most `max_bytes` + 1 bytes of a file, or None where there is none."""
    fs, inner = _filesystem(location)
    patience = WEB_PATIENCE if _is_web(location) else PATIENCE
    try:
        return patience.call("reading an image", lambda: _content(fs, inner, path, policy))
    except FileNotFoundError:
        return None
    except STORAGE_ERRORS as error:
        reason = f"cannot read the image ({type(error).__name__})"
        if _is_web(location) or _is_refused(error):
            raise _refusal(reason, path) from error
        raise ShardError(_one_line(f"{reason}: {path}: {error}")) from error


def _content(fs: Any, inner: str, path: str, policy: ImagePolicy) -> bytes:
    info = fs.info(inner)
    if info.get("type") != "file":
        raise _refusal("not a file", path)
    if (info.get("size") or 0) > policy.max_bytes:
        raise _refusal(f"the image has more than {policy.max_bytes} bytes", path)
    with fs.open(inner, "rb") as file:
        return _read_at_most(file, policy.max_bytes + 1)


def _is_refused(error: Exception) -> bool:
    """Whether an error says something about this image, and not about the storage."""
    is_the_files = isinstance(error, OSError) and error.errno in _ROW_ERRNOS
    return is_the_files or isinstance(error, _UNREADABLE)


def _is_web(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _filesystem(location: str) -> tuple[Any, str]:
    """Where a resolved location is; a local one is a path to the end, whatever it looks like."""
    if location.startswith("/"):
        return LocalFileSystem(), location
    options = {"allow_redirects": False} if _is_web(location) else {}
    try:
        return storage_of(location, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            _one_line(f"{ROOTS_KEY}: fsspec cannot read {location}: {error}")
        ) from error


def _read_at_most(file: IO[bytes], limit: int) -> bytes:
    """Streams may return less than they are asked for; only nothing means the end."""
    chunks = []
    while limit > 0 and (chunk := file.read(limit)):
        chunks.append(chunk)
        limit -= len(chunk)
    return b"".join(chunks)


# ---------------------------------------------------------------------------------------- pixels


def decode(data: bytes, policy: ImagePolicy) -> Image.Image:
    """The first frame as an upright RGB image.

    More than 8 bits: samples of 16 bits lose their lower byte. 32-bit integers are taken as they
    are up to 255, else lose as many low bytes as it takes; negative ones are black. Floating point
    is taken as 0..1 if nothing exceeds 1, as 0..255 if nothing exceeds that, else the largest
    value becomes white; negative and not finite values are black.

    Raises:
        BadRow: `BAD_IMAGE`: not an image of a known format, too large, damaged or cut short.
    """
    image = _loaded(data, policy)
    orientation = _orientation(image)
    try:
        rgb = _to_rgb(image)
    except (ValueError, OSError, MemoryError) as error:
        raise _refusal(f"no way from mode {image.mode} to RGB") from error
    turn = _TURNS.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def upright_size(data: bytes, policy: ImagePolicy) -> tuple[int, int]:
    """(height, width) of the image that `decode` would give, from its header alone.

    Damage behind the header is not seen. A PNG whose orientation stands behind its pixels is taken
    as it lies.

    Raises:
        BadRow: `BAD_IMAGE`: not an image of a known format, or too large.
    """
    image = _loaded(data, policy, pixels=False)
    late = image.format == "PNG" and "exif" not in image.info  # asking would decode the pixels
    upright = image.format == "TIFF"  # Pillow tells the size that it will have
    turned = not (late or upright) and _orientation(image) in (5, 6, 7, 8)
    width, height = image.size
    return (width, height) if turned else (height, width)


def _loaded(data: bytes, policy: ImagePolicy, *, pixels: bool = True) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(image.size, policy)  # only the header has been read so far
        if image.format == "JPEG2000":
            _check_end(data)
        if pixels:
            image.load()
    except UnidentifiedImageError as error:
        raise _refusal(f"not an image of a known format ({', '.join(_FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise _refusal(f"the image has more than {policy.max_pixels} pixels") from error
    except _DECODE_ERRORS as error:
        detail = _BYTES_REPR.sub("...", str(error))
        raise _refusal(f"cannot decode the image: {type(error).__name__}: {detail}") from error
    return image


def _check_size(size: tuple[int, int], policy: ImagePolicy) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _refusal(f"the image is {width} x {height} pixels")
    if width * height > policy.max_pixels:
        limit = f"more than {policy.max_pixels} pixels"
        raise _refusal(f"the image is {width} x {height} pixels, {limit}")
    if max(size) > MAX_SIDE:
        raise _refusal(f"the image is {width} x {height} pixels, a side over {MAX_SIDE}")


def _check_end(data: bytes) -> None:
    """Refuse a JPEG 2000 codestream without its end marker.

    OpenJPEG takes one cut between two tiles for whole and leaves the rest black. Compressed data
    cannot contain the marker.
    """
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or data.find(b"\xff\xd9", start) < 0:
        raise _refusal("cannot decode the image: it is cut short")


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


# ---------------------------------------------------------------------------------------- tiles


def tile(image: Image.Image, anyres: AnyRes) -> Tiles:
    """Thumbnail and crops of an RGB image, as transformers' LLaVA-NeXT processor cuts them.

    The thumbnail is the whole image squeezed into a square. For the crops the image is scaled to
    fit its canvas, centred on black, and the canvas is cut in raster order.

    Returns:
        `Tiles`: pixels uint8 (1 + rows * columns, T, T, 3), `size` that of `image`.

    Raises:
        ValueError: The image is not RGB, which is a bug of the caller.
    """
    if image.mode != "RGB":
        raise ValueError(f"tile takes RGB, not {image.mode}")
    size, side = (image.height, image.width), anyres.tile
    canvas_size, (rows, columns) = anyres.canvas_size(size), anyres.grid(size)
    pixels = np.empty((1 + rows * columns, side, side, 3), dtype=np.uint8)
    pixels[0] = np.asarray(image.resize((side, side), Image.Resampling(anyres.resample)))
    canvas = np.asarray(_canvas(image, canvas_size, anyres.resample))
    crops = canvas.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
    pixels[1:].reshape(crops.shape)[...] = crops
    return Tiles(pixels=pixels, size=size, grid=(rows, columns))


def _canvas(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """The image scaled into a black canvas of `size`, (height, width), and centred."""
    height, width = fitted_size((image.height, image.width), size)
    canvas = Image.new("RGB", (size[1], size[0]))
    corner = (size[1] - width) // 2, (size[0] - height) // 2
    canvas.paste(image.resize((width, height), Image.Resampling(resample)), corner)
    return canvas


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image scaled to fit; transformers' `get_patch_output_size`."""
    scale_y, scale_x = canvas[0] / size[0], canvas[1] / size[1]
    if scale_x < scale_y:
        return min(math.ceil(size[0] * scale_x), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * scale_y), canvas[1])


# ---------------------------------------------------------------------------------------- messages


def _refusal(what: str, path: str | None = None) -> BadRow:
    """`BAD_IMAGE` with one short line; of a long path the end is shown, it tells more."""
    if path is None:
        return BadRow(Status.BAD_IMAGE, _one_line(what))
    place = path if len(path) <= _PLACE_LIMIT else "..." + path[3 - _PLACE_LIMIT :]
    head = _one_line(what, _MESSAGE_LIMIT - len(place) - 2)
    return BadRow(Status.BAD_IMAGE, _one_line(f"{head}: {place}"))


def _one_line(text: str, limit: int = _MESSAGE_LIMIT) -> str:
    plain = "".join(char if char.isprintable() else " " for char in text)
    line = " ".join(plain.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
