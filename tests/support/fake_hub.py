"""A hub on loopback with one dataset, as far as its filesystem asks: revisions, folders, ranges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from tests.support.loopback import LoopbackServer, send

CONVERTED = "refs/convert/parquet"


class FakeHub(LoopbackServer):
    """The hub.

    Args:
        dataset: As `owner/name`.
        files: Of its converted branch, by path.

    Attributes:
        address: Of it.
        down_for: So many of the next requests are answered 503.
    """

    def __init__(self, dataset: str, files: Mapping[str, bytes]) -> None:
        super().__init__()
        self.down_for = 0
        self._tree = f"/api/datasets/{dataset}/tree/{CONVERTED}"
        self._revision = f"/api/datasets/{dataset}/revision/{CONVERTED}"
        self._files = {f"/datasets/{dataset}/resolve/{CONVERTED}/{p}": b for p, b in files.items()}
        self._paths = {path: len(data) for path, data in files.items()}
        self.address = f"http://{self.host}:{self.port}"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """One request."""
        path = unquote(urlsplit(request.path).path)
        if self.down_for:
            self.down_for -= 1
            _send(request, 503, b"{}")
        elif path == self._revision:
            _send(request, 200, json.dumps({"id": "x", "sha": "b" * 40, "siblings": []}).encode())
        elif path.startswith(self._tree):
            entries = self._entries(path.removeprefix(self._tree).strip("/"))
            _send(request, 200, json.dumps(entries).encode())
        elif path in self._files:
            content, asked = self._files[path], request.headers.get("Range", "bytes=0-")
            first, last = asked.removeprefix("bytes=").split("-")
            status = 206 if "Range" in request.headers else 200
            _send(request, status, content[int(first) : int(last or len(content)) + 1])
        else:
            _send(request, 404, b"{}")

    def _entries(self, folder: str) -> list[dict[str, object]]:
        """What lies in a folder."""
        found: dict[str, dict[str, object]] = {}
        for path, size in self._paths.items():
            if not path.startswith(f"{folder}/" if folder else ""):
                continue
            name, *below = path.removeprefix(folder).strip("/").split("/")
            full = f"{folder}/{name}".strip("/")
            kind = ("directory", 0) if below else ("file", size)
            found[full] = {"path": full, "type": kind[0], "size": kind[1], "oid": "a" * 40}
        return list(found.values())


def _send(request: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
    send(request, status, content, "application/json")
