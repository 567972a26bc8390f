"""Files of the web: read by their URLs, in ranges, and not once they changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from gc2ray.core.errors import ShardError
from tests.support.loopback import LoopbackServer
from tests.support.sources import MEMORY, parquet_bytes, refusal, source_of, sources_read, whole


class Site(LoopbackServer):
    """Files by path, with or without ranges and tags; whatever stands behind `?` is all the same.

    Attributes:
        files: Contents.
        head: Of every answer.
        ranges: Whether they are served.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes] = {}
        self.head: dict[str, str] = {}
        self.ranges = True
        self.url = f"http://{self.host}:{self.port}"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        content = self.files.get(request.path.partition("?")[0])
        asked = request.headers.get("Range") if self.ranges else None
        status = 404 if content is None else 206 if asked else 200
        body = content or b""
        if asked and content:
            first, last = asked.removeprefix("bytes=").split("-")
            body = content[int(first) : int(last or len(content)) + 1]
        request.send_response_only(status)
        head = {
            "Content-Length": str(len(body)),
            "Accept-Ranges": "bytes" if self.ranges else "none",
        }
        for name, value in {**head, **self.head}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


@pytest.fixture
def site() -> Iterator[Site]:
    with Site().running() as server:
        server.files = {
            "/d/a.parquet": parquet_bytes(),
            "/d/b": parquet_bytes(),
            "/c//a.parquet": parquet_bytes(),
        }
        yield server


@pytest.mark.parametrize(
    ("names", "sources"),
    [
        (["/d/a.parquet"], ["a.parquet"]),
        (["/d/b"], ["b"]),
        (["/c//a.parquet"], ["a.parquet"]),
        (["/d/a.parquet?X-Sig=a*b%2F[c]"], ["a.parquet"]),
        (["/d/a.parquet?X-Sig=a", "/d/b?X-Sig=b"], ["a.parquet", "b"]),
        (["/d/b?part=1", "/d/b?part=2"], ["b?part=1", "b?part=2"]),
        (["/d/a.parquet", "/d/x/../a.parquet"], ["a.parquet"]),
        (["/d/a.parquet", "/c//a.parquet"], ["d/a.parquet", "c//a.parquet"]),
    ],
)
def test_files_of_the_web_are_read_by_their_urls(
    site: Site, names: list[str], sources: list[str]
) -> None:
    assert sources_read(source_of([f"{site.url}{name}" for name in names])) == sources


def test_a_file_of_the_web_that_is_not_there_is_refused(site: Site) -> None:
    assert "gone.parquet cannot be read" in refusal(source_of(f"{site.url}/d/gone.parquet"))


@pytest.mark.parametrize("head", [{"Accept-Ranges": "none"}, {}])
def test_a_server_without_ranges_is_refused(site: Site, head: dict[str, str]) -> None:
    site.ranges, site.head = False, head
    site.files["/d/a.parquet"] = parquet_bytes(image=[os.urandom(1 << 17)] * 2)
    message = refusal(source_of(f"{site.url}/d/a.parquet"))
    assert message.startswith("recipe.input.uri: a.parquet cannot be read: ")
    assert "range" in message


@pytest.mark.parametrize(
    ("head", "later"),
    [
        ({}, {}),
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"1"'}),
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}),
        ({"Last-Modified": "Sun, 29 Nov 2026 10:00:00 GMT"},) * 2,
    ],
)
def test_a_file_of_the_web_that_changes_is_noticed(
    site: Site, head: dict[str, str], later: dict[str, str]
) -> None:
    site.head = head
    source = source_of(f"{site.url}/d/a.parquet")
    (file,), _ = source.scan()
    assert len(list(source.read(whole(file), MEMORY))) == 2
    site.head = later
    site.files["/d/a.parquet"] = parquet_bytes(image=[b"x", b"z"])
    assert len(site.files["/d/a.parquet"]) == len(parquet_bytes())
    with pytest.raises(ShardError, match="changed since"):
        list(source.read(whole(file), MEMORY))
