"""A proxy in front of an object store, with faults that can be switched on.

It forwards what it gets as it is, `Host` included, because that is signed. What it does to a
request is drawn at random and counted, so that a test can show that its fault was met; what is
drawn happens to the first request that it can happen to, so that it is met for sure. Nothing goes
by the clock: an outage lasts for so many requests, however slow the machine is.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

from gc2ray.data.retries import RetryPolicy
from tests.support.loopback import LoopbackServer, send

LONG_RETRIES = RetryPolicy(total_seconds=60.0, first_seconds=0.05, longest_seconds=1.0)
"""With faults that pass."""
ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>"


@dataclass(frozen=True)
class Faults:
    """What goes wrong.

    Attributes:
        busy: Share of requests that are answered 503, and not forwarded.
        dropped: Share of connections that are closed without an answer, nothing forwarded.
        lost: Share of puts that are forwarded, and their acknowledgement replaced by 500.
        status: Every request of `refused` is answered so, and not forwarded; 0: none.
        refused: Methods.
        outage_requests: So many requests in a row, whatever they are, are answered 503.
        trickle_seconds: Before each piece of an answer's body.
        spared_parts: So many parts of a run are stored before `status` begins, or the parts after
            them are slow or held: a job is in the middle then, however few rows it has.
        part_seconds: Before such a part is stored.
        held: Set once such parts may be stored; until then they wait.
    """

    busy: float = 0.0
    dropped: float = 0.0
    lost: float = 0.0
    status: int = 0
    refused: tuple[str, ...] = ("PUT",)
    outage_requests: int = 0
    trickle_seconds: float = 0.0
    spared_parts: int = 0
    part_seconds: float = 0.0
    held: threading.Event | None = None


class FaultProxy(LoopbackServer):
    """The proxy; it listens at `host` and `port`.

    Attributes:
        faults: May be replaced at any time.
        met: Requests by what became of them; puts of parts, too, and those that were held.
        sent_bytes: Of bodies of answers that were passed on.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self.faults = Faults()
        self.met: Counter[str] = Counter()
        self.sent_bytes = 0
        self._draw = random.Random(0)
        self._lock = threading.Lock()
        self._upstream = (host, port)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """One request: met by a fault, or forwarded."""
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.command == "PUT" and "/data/part-" in request.path:
            self._hold_up()
        fault = self._fault(request.command)
        if fault == "dropped":
            request.close_connection = True
        elif fault in ("busy", "outage"):
            _answer(request, 503, "SlowDown")
        elif fault == "status":
            _answer(request, self.faults.status, _CODES[self.faults.status])
        else:
            status, headers, content = self._forward(request, body)
            if fault == "lost":
                _answer(request, 500, "InternalError")
            else:
                self._pass_on(request, status, headers, content)

    def _hold_up(self) -> None:
        """A part that is to be stored: counted, and slow or held if it is not spared."""
        with self._lock:
            self.met["part"] += 1
            faults, spared = self.faults, self.met["part"] <= self.faults.spared_parts
        if spared:
            return
        time.sleep(faults.part_seconds)
        if faults.held is not None:
            self.met["held"] += 1
            faults.held.wait()

    def _fault(self, command: str) -> str:
        with self._lock:
            fault = self._drawn(command, self._draw.random())
            self.met[fault] += 1
        return fault

    def _drawn(self, command: str, drawn: float) -> str:
        faults = self.faults
        if self.met["outage"] < faults.outage_requests:
            return "outage"
        over = self.met["part"] > faults.spared_parts or not faults.spared_parts
        if faults.status and command in faults.refused and over:
            return "status"
        for name in ("busy", "dropped", "lost"):
            share = getattr(faults, name) if name != "lost" or command == "PUT" else 0.0
            if drawn < share or (share and not self.met[name]):
                return name
            drawn -= share
        return "forwarded"

    def _forward(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(*self._upstream, timeout=30)
        try:
            upstream.putrequest(
                request.command, request.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _pass_on(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
    ) -> None:
        request.send_response_only(status)
        is_head = request.command == "HEAD"
        for name, value in headers:
            if is_head or name.lower() not in ("content-length", "transfer-encoding", "connection"):
                request.send_header(name, value)
        if not is_head:
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        with self._lock:
            self.sent_bytes += len(content) if not is_head else 0
        step = max(1, len(content) // 4) if self.faults.trickle_seconds else max(1, len(content))
        for first in range(0, len(content) if not is_head else 0, step):
            time.sleep(self.faults.trickle_seconds)
            request.wfile.write(content[first : first + step])
            request.wfile.flush()


EVERYTHING = ("GET", "HEAD", "PUT", "POST", "DELETE")
_CODES = {
    400: "ExpiredToken",
    403: "AccessDenied",
    409: "ConditionalRequestConflict",
    507: "InsufficientStorage",
}


def _answer(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    send(request, status, ERROR.format(code=code).encode(), "application/xml")
