"""Images behind URLs: which are allowed, and which failures are retried."""

from __future__ import annotations

import http.server
import threading
from typing import ClassVar

import fsspec
import pytest
import s3fs

from gc2ray.core.config.input import ImageLimits
from gc2ray.core.records import ImageRef
from gc2ray.data import image_bytes as images
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.retries import RetryPolicy
from gc2ray.engine.prompt_builder import load_tiles
from tests.support.fault_proxy import Faults
from tests.support.images import PNG, anyres, refusal_message
from tests.support.object_servers import a_bucket


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
    message = refusal_message(read_bytes, ImageRef(path=path), ImageLimits(roots=(root,)))
    assert "outside" in message or "the path is refused" in message


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
    assert "no such" in refusal_message(read_bytes, ImageRef(path=f"{site}/dir/gone.png"), policy)
    assert "outside" in refusal_message(read_bytes, ImageRef(path=f"{site}/secret.png"), policy)
    refusal_message(read_bytes, ImageRef(path=f"{site}/dir/elsewhere.png"), policy)
    small = ImageLimits(roots=policy.roots, max_bytes=len(PNG) - 1)
    assert "more than" in refusal_message(read_bytes, ImageRef(path=f"{site}/dir/image.png"), small)


@pytest.fixture
def short_retries(monkeypatch):
    short = RetryPolicy(total_seconds=1.0, first_seconds=0.01, longest_seconds=0.1)
    monkeypatch.setattr(images, "WEB_RETRY_POLICY", short)
    monkeypatch.setattr(images, "RETRY_POLICY", short)


@pytest.mark.usefixtures("short_retries")
@pytest.mark.parametrize("status", [503, 500, 429, 0])
def test_a_temporary_http_error_is_retried(site, monkeypatch, status):
    monkeypatch.setattr(Site, "trouble", [status] * 5)
    policy = ImageLimits(roots=(f"{site}/dir",))
    assert read_bytes(ImageRef(path=f"{site}/dir/image.png"), policy) == PNG
    assert Site.trouble == []


@pytest.mark.usefixtures("short_retries")
def test_a_lasting_http_error_fails_the_row(site, monkeypatch):
    monkeypatch.setattr(Site, "trouble", [500] * 10_000)
    policy = ImageLimits(roots=(f"{site}/dir",))
    message = refusal_message(read_bytes, ImageRef(path=f"{site}/dir/image.png"), policy)
    assert "cannot read the image (TimeoutError)" in message
    assert len(Site.trouble) < 9_990


@pytest.mark.usefixtures("short_retries")
@pytest.mark.parametrize("status", [403, 410])
def test_a_forbidden_or_removed_page_is_not_retried(site, monkeypatch, status):
    monkeypatch.setattr(Site, "trouble", [status] * 10)
    policy = ImageLimits(roots=(f"{site}/dir",))
    assert "no such image" in refusal_message(
        read_bytes, ImageRef(path=f"{site}/dir/image.png"), policy
    )
    assert len(Site.trouble) == 8, "HEAD, then GET"


def test_dropped_requests_to_a_bucket_are_retried(proxy):
    with a_bucket(proxy.host, proxy.port) as bucket:
        s3fs.S3FileSystem().pipe_file(f"{bucket}/image.png", PNG)
        proxy.faults = Faults(dropped=0.4)
        policy = ImageLimits(roots=(bucket,))
        for _ in range(10):
            assert read_bytes(ImageRef(path="image.png"), policy) == PNG
        assert proxy.met["dropped"] > 0
