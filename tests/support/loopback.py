"""A web server on loopback that a test's own code answers for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class LoopbackServer:
    """The server; it listens at `host` and `port` from the start, and answers while it is running.

    Subclasses say in `handle` what becomes of a request.
    """

    def __init__(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

            def do(self) -> None:
                server.handle(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host, self.port = "127.0.0.1", int(self._server.server_address[1])

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request; called by many threads."""
        raise NotImplementedError

    @contextmanager
    def running(self) -> Iterator[Self]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


def send(request: BaseHTTPRequestHandler, status: int, content: bytes, kind: str) -> None:
    """A whole answer; without its content where only its head is asked for."""
    content = content if request.command != "HEAD" else b""
    request.send_response_only(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)
