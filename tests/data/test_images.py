"""Untrusted bytes to pixels: what is refused and why, and tiles that equal transformers'."""

from __future__ import annotations

import errno
import functools
import http.server
import io
import os
import struct
import threading
import zlib
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import s3fs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from skimage import data as photographs
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from gc2ray.core.config.input import MAX_PIXELS, ImageLimits
from gc2ray.core.errors import BadRow, ConfigError, ShardError, Status
from gc2ray.core.records import ImageRef
from gc2ray.data import image_bytes as images
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import MAX_SIDE, decode, upright_size
from gc2ray.data.retries import RetryPolicy
from gc2ray.engine.prompt_builder import load_tiles
from gc2ray.models.families.llava_next import pixel_table
from gc2ray.models.image_processor import AnyRes, Tiles, tile
from tests.support.fault_proxy import Faults
from tests.support.object_servers import a_bucket

# Pillow remarks on damaged metadata; here most of it is damaged on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

POLICY = ImageLimits()
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SMALL_PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84), (84, 56))


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def gradient(height=24, width=40):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6, y * 10, x * y], axis=-1).astype(np.uint8))


PNG = encode(gradient(), "PNG")


@functools.cache
def samples():
    """Small valid images of every format and of the odd corners of some."""
    image, other = gradient(), gradient().rotate(180)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    animated = {"save_all": True, "append_images": [other]}
    return {
        "jpeg": encode(image, "JPEG", exif=exif),
        "jpeg progressive": encode(image, "JPEG", progressive=True),
        "mpo": encode(image, "MPO", **animated),
        "png": encode(image, "PNG", exif=exif),
        "png palette": encode(image.convert("P"), "PNG", transparency=3),
        "png 16": encode(Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40)), "PNG"),
        "gif": encode(image, "GIF", **animated),
        "webp": encode(image, "WEBP", exif=exif),
        "webp animated": encode(image, "WEBP", **animated),
        "tiff": encode(image, "TIFF", exif=exif),
        "tiff lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encode(image, "TIFF", compression="jpeg"),
        "tiff float": encode(image.convert("F"), "TIFF"),
        "bmp": encode(image, "BMP"),
        "ppm": encode(image, "PPM"),
        "avif": encode(image, "AVIF"),
        "jpeg 2000": encode(image, "JPEG2000"),
        "jpeg 2000 tiled": encode(image, "JPEG2000", tile_size=(16, 16), no_jp2=True),
    }


SAMPLE_NAMES = tuple(samples())


def refused(call, *args):
    """The message of a refusal, whose form is checked."""
    with pytest.raises(BadRow) as caught:
        call(*args)
    assert caught.value.status is Status.BAD_IMAGE
    message = caught.value.message
    assert 0 < len(message) <= 200
    assert message.isprintable()
    return message


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


# ------------------------------------------------------------------------------ refused: pixels


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
    data = encode(Image.fromarray(photographs.astronaut()), "JPEG")
    assert "truncated" in refused(decode, data[: len(data) // 2], POLICY)


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
    message = refused(decode, data, POLICY)
    assert "not an image" in message or "cannot decode" in message
    assert "0x" not in message, "an address differs from run to run"


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_header_bomb_is_refused_undecoded(side, monkeypatch):
    calls = forbid_decoding(monkeypatch)
    assert "more than 80000000 pixels" in refused(decode, png_header(side, side), POLICY)
    assert not calls


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_pixel_limit_holds_before_decoding_in_every_format(name, monkeypatch):
    data = samples()[name]
    assert decode(data, ImageLimits(max_pixels=960)).mode == "RGB"
    calls = forbid_decoding(monkeypatch)
    assert "959 pixels" in refused(decode, data, ImageLimits(max_pixels=959))
    assert not calls


def test_endless_side_is_refused_undecoded(monkeypatch):
    calls = forbid_decoding(monkeypatch)
    bomb = png_header(MAX_SIDE + 1, 1, bits=1, colour=0)
    assert "a side over" in refused(decode, bomb, POLICY)
    assert not calls


def test_policy_never_reaches_where_pillow_warns():
    assert MAX_PIXELS <= Image.MAX_IMAGE_PIXELS
    with pytest.raises(ConfigError, match="max_image_pixels"):
        ImageLimits(max_pixels=Image.MAX_IMAGE_PIXELS + 1)
    with pytest.raises(ConfigError, match="max_image_bytes"):
        ImageLimits(max_bytes=0)


def test_eps_is_refused():
    eps = encode(gradient(), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    assert "known format" in refused(decode, eps, POLICY)


# ------------------------------------------------------------------------------ refused: bytes


def test_null_image_is_refused():
    assert "null" in refused(read_bytes, ImageRef(), POLICY)
    assert "null" in refused(read_bytes, ImageRef(path=""), POLICY)


def test_zero_bytes_are_refused(tmp_path):
    assert "no bytes" in refused(read_bytes, ImageRef(data=b""), POLICY)
    empty = tmp_path / "empty.png"
    empty.touch()
    policy = ImageLimits(roots=(str(tmp_path),))
    message = refused(read_bytes, ImageRef(path=str(empty)), policy)
    assert "no bytes" in message
    assert "empty.png" in message


def test_too_many_bytes_are_refused(tmp_path):
    assert read_bytes(ImageRef(data=PNG), ImageLimits(max_bytes=len(PNG))) == PNG
    small = ImageLimits(max_bytes=len(PNG) - 1, roots=(str(tmp_path),))
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    for ref in (ImageRef(data=PNG), ImageRef(path=str(path))):
        assert f"more than {len(PNG) - 1} bytes" in refused(read_bytes, ref, small)


class Endless(fsspec.AbstractFileSystem):
    """Files without end; it knows the size of `sized` ones only, and cannot read `broken` ones."""

    protocol = "endless"
    cachable = False
    taken = 0

    def info(self, path, **_):
        return {"name": path, "type": "file", "size": 10**9 if "sized" in path else None}

    def open(self, path, *_, **__):
        if "broken" in path:
            raise OSError(errno.EIO, "the disk is on fire")
        return self

    def read(self, count):
        Endless.taken += min(count, 7)
        return b"x" * min(count, 7)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def endless():
    fsspec.register_implementation("endless", Endless, clobber=True)
    Endless.taken = 0
    return Endless


def test_no_more_than_the_limit_is_read(endless):
    policy = ImageLimits(max_bytes=100, roots=("endless://",))
    assert "more than 100" in refused(read_bytes, ImageRef(path="endless://a.png"), policy)
    assert endless.taken == 101


def test_what_is_known_to_be_too_large_is_not_read(endless):
    policy = ImageLimits(max_bytes=100, roots=("endless://",))
    assert "more than 100" in refused(read_bytes, ImageRef(path="endless://sized.png"), policy)
    assert endless.taken == 0


@pytest.mark.usefixtures("endless")
def test_broken_storage_is_not_the_fault_of_the_row():
    policy = ImageLimits(roots=("endless://",))
    with pytest.raises(ShardError, match="broken") as caught:
        read_bytes(ImageRef(path=f"endless://broken{'x' * 500}.png"), policy)
    assert len(str(caught.value)) <= 200


def test_missing_file_is_refused(tmp_path):
    policy = ImageLimits(roots=(str(tmp_path), "memory://nothing"))
    for path in (str(tmp_path / "gone.png"), "gone.png", "memory://nothing/gone.png"):
        message = refused(read_bytes, ImageRef(path=path), policy)
        assert "no such" in message
        assert "gone.png" in message


def test_directory_and_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    policy = ImageLimits(roots=(str(tmp_path),))
    for name in ("pipe", "folder", "."):
        assert "not a file" in refused(read_bytes, ImageRef(path=name), policy)


def test_paths_are_off_without_roots(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    for there in (str(path), f"file://{path}", "image.png", "http://127.0.0.1/image.png"):
        message = refused(read_bytes, ImageRef(path=there), POLICY)
        assert "by path are off; recipe.input.image_roots" in message


@pytest.fixture
def tree(tmp_path):
    """A root with a file and links out of and within it, and secrets beside it."""
    root, beside = tmp_path / "root", tmp_path / "root2"
    for folder in (root / "sub", beside):
        folder.mkdir(parents=True)
    (root / "sub" / "image.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (beside / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "door").symlink_to(beside)
    (root / "inside.png").symlink_to(root / "sub" / "image.png")
    return root


@pytest.mark.parametrize(
    "path",
    [
        "{root}/../secret.png",
        "{root}/sub/../../secret.png",
        "../secret.png",
        "sub/../../root2/secret.png",
        "{root}2/secret.png",
        "{root}/link.png",
        "link.png",
        "{root}/door/secret.png",
        "door/../secret.png",
        "file://{root}/../secret.png",
        "local://{root}2/secret.png",
        "/etc/hostname",
        "memory://{root}/sub/image.png",
        "simplecache::file://{root}/../secret.png",
        "filecache::{root}/sub/image.png",
        "{root}/sub/image.png\0",
        "http://127.0.0.1/{root}/sub/image.png",
        "door::zip/../../secret.png",
        "link.png/../../secret.png",
    ],
)
def test_path_outside_the_roots_is_refused(path, tree):
    policy = ImageLimits(roots=(str(tree),))
    message = refused(read_bytes, ImageRef(path=path.format(root=tree)), policy)
    assert "outside" in message or "the path is refused" in message


@pytest.mark.parametrize(
    "path",
    [
        "{root}/sub/image.png",
        "sub/image.png",
        "file://{root}/sub/image.png",
        "inside.png",
        "door/../root/sub/image.png",
        "{root}/./sub//image.png",
    ],
)
def test_path_under_a_root_is_read(path, tree):
    (tree.parent / "other").mkdir()
    policy = ImageLimits(roots=(str(tree.parent / "other"), f"{tree}/"))
    assert read_bytes(ImageRef(path=path.format(root=tree)), policy) == PNG


@pytest.mark.parametrize(
    "path",
    [
        "link.png::zip",
        "{root}/link.png::zip",
        "link.png::",
        "::link.png",
        "::{root}/link.png",
        "sub/image.png::zip",
        "{root}/sub/image.png::file://{root}/link.png",
        "sub/image.png::simplecache",
        "simplecache::link.png",
        "simplecache::{root}/link.png",
        "zip::link.png",
        "memory::link.png",
        "file:link.png",
        "file:/{root}/link.png",
        "file::{root}/link.png",
        "environ::zip",
        "~/link.png",
        "link.png?",
        "link.png#x",
        "*.png",
        "li?k.png",
        "lin[k].png",
    ],
)
def test_a_local_path_is_nothing_but_a_path(path, tree):
    """Whatever a library would read into it: no such name is there, so there is no such file."""
    policy = ImageLimits(roots=(str(tree),))
    message = refused(read_bytes, ImageRef(path=path.format(root=tree)), policy)
    assert "no such image file" in message or "outside" in message


@pytest.mark.parametrize("name", ["a::b.png", "::.png", "x::zip", "file:x.png", "~", "*?.png", "#"])
def test_a_name_may_have_any_characters(name, tree):
    (tree / name).write_bytes(PNG)
    policy = ImageLimits(roots=(str(tree),))
    for path in (name, f"{tree}/{name}"):
        assert read_bytes(ImageRef(path=path), policy) == PNG


def test_root_may_itself_be_a_link(tree):
    (tree.parent / "alias").symlink_to(tree)
    policy = ImageLimits(roots=(f"file://{tree.parent}/alias",))
    assert read_bytes(ImageRef(path=f"{tree.parent}/alias/sub/image.png"), policy) == PNG


def test_first_root_with_the_file_wins(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    for name in ("b", "c"):
        (tmp_path / name / "image.png").write_bytes(name.encode())
    policy = ImageLimits(roots=tuple(str(tmp_path / name) for name in ("a", "b", "c")))
    assert read_bytes(ImageRef(path="image.png"), policy) == b"b"


@pytest.fixture
def memory():
    """Files in memory, under a URL, and one beside it."""
    fs = fsspec.filesystem("memory")
    fs.pipe({"/photos/dir/image.png": PNG, "/photos/dir2/secret.png": b"secret"})
    yield fs
    fs.rm("/photos", recursive=True)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    "path",
    [
        "memory://photos/dir/image.png",
        "memory://photos/dir/x/../image.png",
        "MEMORY://photos/dir/./image.png",
        "image.png",
    ],
)
def test_url_under_a_root_is_read(path):
    policy = ImageLimits(roots=("memory://photos/dir/",))
    assert read_bytes(ImageRef(path=path), policy) == PNG
    assert load_tiles(ImageRef(path=path), anyres(), policy).size == (24, 40)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("root", "path"),
    [
        ("memory://photos/dir", "memory://photos/dir2/secret.png"),
        ("memory://photos/dir", "memory://photos/dir/../dir2/secret.png"),
        ("memory://photos/dir", "../dir2/secret.png"),
        ("memory://photos/dir", "dir::memory://photos/dir/image.png"),
        ("memory://photos/dir", "memory://photos/dir/image.png::zip"),
        ("memory://photos/dir", "image.png::zip"),
        ("memory://photos/dir", "simplecache::memory://photos/dir/image.png"),
        ("memory://photos/dir", "image.png::memory://photos/dir2/secret.png"),
        ("s3://bucket/dir", "s3://bucket/dir2/image.png"),
        ("s3://bucket/dir", "s3://bucket/dir/../image.png"),
        ("s3://bucket", "s3://bucket2/image.png"),
        ("s3://bucket", "https://bucket/image.png"),
        ("https://host/dir", "http://host/dir/image.png"),
        ("https://host/dir", "https://host@evil/dir/image.png"),
        ("https://host/dir", "https://host/dir/%2e%2e/image.png"),
        ("https://host/dir", "https://host/dir/..?x"),
        ("https://host/dir", "https://host/dir/.\t./image.png"),
        ("https://host/dir", "%2e%2e/image.png"),
    ],
)
def test_url_outside_the_roots_is_refused(root, path):
    message = refused(read_bytes, ImageRef(path=path), ImageLimits(roots=(root,)))
    assert "outside" in message or "the path is refused" in message


@pytest.mark.parametrize("root", ["", "simplecache::s3://bucket", "a\nb"])
def test_bad_root_is_a_configuration_error(root):
    with pytest.raises(ConfigError, match=r"recipe\.input\.image_roots"):
        ImageLimits(roots=(root,))


def test_unknown_protocol_is_a_configuration_error():
    policy = ImageLimits(roots=("nosuch://bucket",))
    with pytest.raises(ConfigError, match="nosuch"):
        read_bytes(ImageRef(path="nosuch://bucket/image.png"), policy)


class Site(http.server.BaseHTTPRequestHandler):
    """`/dir/image.png`, `/secret.png`, and a redirect from under the first to the second.

    The next requests are answered by `trouble` first: a status each, or 0 for nothing at all.
    """

    trouble: ClassVar[list[int]] = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        status = self.trouble.pop(0) if self.trouble else None
        if status is not None:
            self.close_connection = True
            if status:
                self.send_error(status)
            return
        if self.path == "/dir/elsewhere.png":
            self.send_response(302)
            self.send_header("Location", "/secret.png")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        found = self.path in ("/dir/image.png", "/secret.png")
        body = PNG if found else b"no"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_http_is_read_under_its_root_only_and_redirects_are_not_followed(site):
    policy = ImageLimits(roots=(f"{site}/dir",))
    assert read_bytes(ImageRef(path=f"{site}/dir/image.png"), policy) == PNG
    assert read_bytes(ImageRef(path="image.png"), policy) == PNG
    assert "no such" in refused(read_bytes, ImageRef(path=f"{site}/dir/gone.png"), policy)
    assert "outside" in refused(read_bytes, ImageRef(path=f"{site}/secret.png"), policy)
    refused(read_bytes, ImageRef(path=f"{site}/dir/elsewhere.png"), policy)
    small = ImageLimits(roots=policy.roots, max_bytes=len(PNG) - 1)
    assert "more than" in refused(read_bytes, ImageRef(path=f"{site}/dir/image.png"), small)


@pytest.fixture
def impatient(monkeypatch):
    short = RetryPolicy(total_seconds=1.0, first_seconds=0.01, longest_seconds=0.1)
    monkeypatch.setattr(images, "WEB_RETRY_POLICY", short)
    monkeypatch.setattr(images, "RETRY_POLICY", short)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", [503, 500, 429, 0])
def test_a_page_that_cannot_be_had_for_a_moment_is_waited_for(site, monkeypatch, status):
    monkeypatch.setattr(Site, "trouble", [status] * 5)
    policy = ImageLimits(roots=(f"{site}/dir",))
    assert read_bytes(ImageRef(path=f"{site}/dir/image.png"), policy) == PNG
    assert Site.trouble == []


@pytest.mark.usefixtures("impatient")
def test_a_page_that_always_fails_is_its_rows_fault(site, monkeypatch):
    monkeypatch.setattr(Site, "trouble", [500] * 10_000)
    policy = ImageLimits(roots=(f"{site}/dir",))
    message = refused(read_bytes, ImageRef(path=f"{site}/dir/image.png"), policy)
    assert "cannot read the image (TimeoutError)" in message
    assert len(Site.trouble) < 9_990


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", [403, 410])
def test_a_page_that_is_not_for_us_is_not_waited_for(site, monkeypatch, status):
    monkeypatch.setattr(Site, "trouble", [status] * 10)
    policy = ImageLimits(roots=(f"{site}/dir",))
    assert "no such image" in refused(read_bytes, ImageRef(path=f"{site}/dir/image.png"), policy)
    assert len(Site.trouble) == 8, "HEAD, then GET"


def test_a_bucket_in_trouble_is_waited_for(proxy):
    with a_bucket(proxy.host, proxy.port) as bucket:
        s3fs.S3FileSystem().pipe_file(f"{bucket}/image.png", PNG)
        proxy.faults = Faults(dropped=0.4)
        policy = ImageLimits(roots=(bucket,))
        for _ in range(10):
            assert read_bytes(ImageRef(path="image.png"), policy) == PNG
        assert proxy.met["dropped"] > 0


def test_bytes_of_the_row_come_before_its_path():
    ref = ImageRef(data=PNG, path="/etc/hostname")
    assert read_bytes(ref, POLICY) == PNG


def test_undecodable_file_is_named(tmp_path):
    (tmp_path / "page.png").write_bytes(b"<html>")
    policy = ImageLimits(roots=(str(tmp_path),))
    message = refused(load_tiles, ImageRef(path="page.png"), anyres(), policy)
    assert "not an image" in message
    assert message.endswith(": page.png")


def test_messages_quote_no_bytes():
    data = b"P3\n1 1\n255\n1 a\xfe 2"
    with pytest.raises(ValueError, match="xfe"):
        Image.open(io.BytesIO(data)).load()
    assert "xfe" not in refused(decode, data, POLICY)


def test_messages_stay_short_and_on_one_line(tmp_path):
    policy = ImageLimits(roots=(str(tmp_path),))
    path = "folder/" * 40 + "the end\u2028.png"
    message = refused(read_bytes, ImageRef(path=path), policy)
    assert message.endswith("the end .png")
    message = refused(read_bytes, ImageRef(path="x" * 5000), policy)  # longer than a name may be
    assert "cannot read" in message


# ------------------------------------------------------------------------------ good but odd


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
    assert grays(decode(encode(image, "PNG"), POLICY)) == expected
    assert grays(decode(encode(image, "TIFF"), POLICY)) == expected
    big = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert grays(decode(encode(big, "TIFF"), POLICY)) == expected
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
    assert grays(decode(encode(image, "TIFF"), POLICY)) == expected


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
    assert grays(decode(encode(image, "TIFF"), POLICY)) == expected


def test_1_bit():
    image = Image.fromarray(np.array([[True, False, True]]))
    assert grays(decode(encode(image, "PNG"), POLICY)) == [255, 0, 255]


def test_transparency_is_laid_on_white():
    gray = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.frombytes("L", (2, 1), b"\0\xff")])
    assert grays(decode(encode(gray, "PNG"), POLICY)) == [255, 100]
    colour = Image.new("RGBA", (1, 1), (200, 100, 0, 128))
    assert decode(encode(colour, "PNG"), POLICY).getpixel((0, 0)) == (227, 177, 127)
    palette = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image = decode(encode(palette, "PNG", transparency=1), POLICY)
    assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255,) * 3, (0, 0, 255)]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    pixel = decode(encode(image, "JPEG"), POLICY).getpixel((4, 4))
    assert np.abs(np.array(pixel) - (0, 255, 255)).max() <= 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame_of_an_animation(kind):
    red, blue = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    data = encode(red, kind, save_all=True, append_images=[blue])
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
    data = encode(gradient(), kind, exif=exif)
    upright = decode(data, POLICY)
    assert upright.tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes()
    assert upright.size == ((24, 40) if orientation >= 5 else (40, 24))


def test_rotated_jpeg_swaps_sides():
    exif = Image.Exif()
    exif[0x0112] = 6
    ref = ImageRef(data=encode(Image.new("RGB", (800, 400)), "JPEG", exif=exif))
    tiles = load_tiles(ref, anyres(), POLICY)
    assert tiles.size == (800, 400)
    assert tiles.grid == (2, 1)


@pytest.mark.parametrize("name", samples())
def test_the_size_of_every_format_is_known_from_its_header(name):
    data = samples()[name]
    assert upright_size(data, ImageLimits()) == decode(data, ImageLimits()).size[::-1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_is_known_from_the_header(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(gradient(), kind, exif=exif)
    assert upright_size(data, ImageLimits()) == decode(data, ImageLimits()).size[::-1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_header_is_enough_for_the_size(kind):
    data = encode(gradient(), kind)
    data = data[: len(data) - 120]
    assert upright_size(data, ImageLimits()) == gradient().size[::-1]
    with pytest.raises(BadRow, match="cannot decode"):
        decode(data, ImageLimits())


def test_what_a_header_tells_is_refused_as_when_it_is_decoded():
    for data, policy in (
        (b"nothing", ImageLimits()),
        (encode(gradient(), "PNG"), ImageLimits(max_pixels=100)),
    ):
        with pytest.raises(BadRow) as decoding:
            decode(data, policy)
        with pytest.raises(BadRow) as looking:
            upright_size(data, policy)
        assert looking.value.message == decoding.value.message


@pytest.mark.parametrize("exif", [b"Exif\0\0??garbage", b"Exif\0\0II*\0"])
def test_damaged_exif_does_not_cost_the_image(exif):
    data = encode(gradient(), "PNG", exif=exif)
    with pytest.raises((SyntaxError, struct.error)):
        Image.open(io.BytesIO(data)).getexif()
    assert decode(data, POLICY).tobytes() == gradient().tobytes()


def test_decoded_image_is_free_of_its_file():
    for data in samples().values():
        assert type(decode(data, POLICY)) is Image.Image


# ------------------------------------------------------------------------------ anything at all


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


# ------------------------------------------------------------------------------ equal to HF's


@functools.cache
def processor(side=336, pinpoints=PINPOINTS):
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in pinpoints],
    )


def anyres(side=336, pinpoints=PINPOINTS):
    source = processor(side, pinpoints)
    return AnyRes(
        tile=side,
        pinpoints=pinpoints,
        resample=int(source.resample),
        mean=tuple(source.image_mean),
        std=tuple(source.image_std),
        rescale=source.rescale_factor,
    )


def normalised(tiles: Tiles, geometry: AnyRes):
    table, places = pixel_table(geometry), torch.from_numpy(tiles.pixels).long()
    return torch.stack([table[channel][places[..., channel]] for channel in range(3)], dim=1)


def assert_equal_to_transformers(tiles, image, side=336, pinpoints=PINPOINTS):
    expected = processor(side, pinpoints)(image, return_tensors="pt")
    assert tiles.pixels.dtype == np.uint8
    assert tiles.size == tuple(expected["image_sizes"][0].tolist())
    assert torch.equal(
        normalised(tiles, anyres(side, pinpoints)), expected["pixel_values"][0].float()
    )


SIZES = [(1, 1), (1, 3000), (3000, 1), (2000, 10), (10, 2000), (2, 3), (336, 336), (337, 335)]
SIZES += [(336, 672), (672, 672), (671, 673), (768, 1024), (1080, 607), (999, 333), (90, 2000)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_tiles_equal_transformers(size):
    noise = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert_equal_to_transformers(tile(image, anyres()), image)


def test_tiles_of_a_photograph_equal_transformers():
    data = encode(Image.fromarray(photographs.astronaut()), "JPEG", quality=90)
    tiles = load_tiles(ImageRef(data=data), anyres(), POLICY)
    assert tiles.pixels.shape == (5, 336, 336, 3)
    assert_equal_to_transformers(tiles, Image.open(io.BytesIO(data)))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 9))
def test_small_tiles_equal_transformers(height, width, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    tiles = tile(image, anyres(28, SMALL_PINPOINTS))
    assert_equal_to_transformers(tiles, image, 28, SMALL_PINPOINTS)


def odd_images():
    image = gradient(120, 200)
    alpha = Image.linear_gradient("L").resize(image.size)
    rgba = image.copy()
    rgba.putalpha(alpha)
    palette = image.convert("P")
    return {
        "RGBA": encode(rgba, "PNG"),
        "LA": encode(rgba.convert("LA"), "PNG"),
        "P with transparency": encode(palette, "PNG", transparency=palette.getpixel((5, 5))),
        "RGB with transparency": encode(image, "PNG", transparency=image.getpixel((5, 5))),
        "GIF with transparency": encode(palette, "GIF", transparency=palette.getpixel((5, 5))),
        "WEBP with alpha": encode(rgba, "WEBP"),
        "1": encode(image.convert("1"), "PNG"),
        "L": encode(image.convert("L"), "JPEG"),
        "CMYK": encode(image.convert("CMYK"), "JPEG"),
        "YCbCr": encode(image, "TIFF", compression="jpeg"),
        "LAB": encode(image.convert("LAB"), "TIFF"),
        "I up to 255": encode(image.convert("L").convert("I"), "TIFF"),
    }


@pytest.mark.parametrize("name", odd_images())
def test_odd_modes_equal_transformers(name):
    data = odd_images()[name]
    tiles = tile(decode(data, POLICY), anyres(28, SMALL_PINPOINTS))
    assert_equal_to_transformers(tiles, Image.open(io.BytesIO(data)), 28, SMALL_PINPOINTS)


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 8000), st.integers(1, 8000))
def test_canvas_size_equals_transformers(height, width):
    expected = select_best_resolution((height, width), [list(item) for item in PINPOINTS])
    assert anyres().canvas_size((height, width)) == tuple(expected)


def test_tile_takes_rgb_only():
    with pytest.raises(ValueError, match="RGB"):
        tile(Image.new("L", (4, 4)), anyres())


def test_padding_is_black_and_centred():
    tiles = tile(Image.new("RGB", (672, 100), "white"), anyres())
    assert tiles.grid == (1, 2)
    lit = tiles.pixels[1:, :, 0, 0].astype(bool)
    assert (lit == ((np.arange(336) >= 118) & (np.arange(336) < 218))).all()
