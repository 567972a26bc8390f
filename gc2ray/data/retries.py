"""`RetryPolicy`: calls to a storage that may fail for a while.

Temporary trouble is waited out: throttling, servers that are down or busy, lost connections,
timeouts. Everything else is raised at once: missing permissions, missing files, full disks. Errors
are classified by type, error number and HTTP status, never by their text.

s3fs and botocore retry for a second or two by themselves; `RetryPolicy` continues after that.

Not covered: calls that never return; filesystems have timeouts of their own.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

from gc2ray.core.errors import ErrorName, loaded_errors, storage_errors

T = TypeVar("T")

PASSING_STATUS = {HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.REQUEST_TIMEOUT}
LASTING_STATUS = {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.INSUFFICIENT_STORAGE}
_MOST_DOUBLINGS = 32  # more would overflow some day
_PASSING_ERRNO = {errno.EBUSY, errno.EREMOTEIO, errno.EAGAIN, errno.ETIMEDOUT}
_AIOHTTP, _BOTOCORE, _HUB = (
    "aiohttp.client_exceptions",
    "botocore.exceptions",
    "huggingface_hub.errors",
)
_PASSING: tuple[ErrorName, ...] = (
    (_BOTOCORE, "HTTPClientError"),
    (_BOTOCORE, "ConnectionError"),
    (_AIOHTTP, "ClientConnectionError"),
    (_AIOHTTP, "ClientPayloadError"),
    (_HUB, "HTTPError"),
)
_LASTING: tuple[ErrorName, ...] = ((_HUB, "OfflineModeIsEnabled"),)
_HTTP_STATUS: dict[ErrorName, Callable[[Any], Any]] = {
    (_BOTOCORE, "ClientError"): lambda error: error.response.get("ResponseMetadata", {}).get(
        "HTTPStatusCode", 0
    ),
    (_AIOHTTP, "ClientResponseError"): lambda error: error.status,
    (_HUB, "HfHubHTTPError"): lambda error: error.response.status_code,
}
"""The HTTP status in an error, by the error's type."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How long temporary trouble is waited out.

    Attributes:
        total_seconds: Time from the first failure until the error is raised.
        first_seconds: Longest wait after the first failure; doubled after each failure.
        longest_seconds: Longest wait after any failure.
    """

    total_seconds: float = 120.0
    first_seconds: float = 0.2
    longest_seconds: float = 15.0

    def call(self, what: str, work: Callable[[], T]) -> T:
        """The result of `work`, which is called again while its errors are temporary.

        Args:
            what: The operation and its object, for messages.
            work: The operation; it must be safe to repeat.

        Raises:
            OSError: The trouble lasted too long; the message has the time and the last error.
            Exception: Another error of `work`, with `what` as a note.
        """
        started, failures = None, 0
        while True:
            try:
                return work()
            except storage_errors() as error:
                if not is_transient(error):
                    error.add_note(what)
                    raise
                started = time.monotonic() if started is None else started
                tried, wait = time.monotonic() - started, self._wait(failures)
                if tried + wait > self.total_seconds:
                    last = f"last: {type(error).__name__}: {error}"
                    message = f"{what}: tried for {tried:.0f} s, {last}"
                    raise OSError(errno.ETIMEDOUT, message) from error
                log.warning("%s: %s; again in %.1f s", what, type(error).__name__, wait)
            failures += 1
            time.sleep(wait)

    def _wait(self, failures: int) -> float:
        """A random wait after a number of failures, from 0 up, so that callers spread."""
        doubled = self.first_seconds * 2.0 ** min(failures, _MOST_DOUBLINGS)
        return random.uniform(0, min(doubled, self.longest_seconds))  # noqa: S311 - no secret


RETRY_POLICY = RetryPolicy()
"""The default for storages."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later.

    A missing file stays missing, unless the error has a cause: the web's filesystem raises
    `FileNotFoundError` for any failure, with the real error as its cause.
    """
    cause = error.__cause__
    status = _http_status(error) or _http_status(cause)
    if status is not None:
        is_server = status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in LASTING_STATUS
        return is_server or status in PASSING_STATUS
    if isinstance(error, FileNotFoundError) and cause is not None:
        return is_transient(cause)
    passing: tuple[type[Exception], ...] = (TimeoutError, ConnectionError, *loaded_errors(_PASSING))
    if isinstance(error, passing) and not isinstance(error, loaded_errors(_LASTING)):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def _http_status(error: BaseException | None) -> int | None:
    """The HTTP status in an error; None if it has none."""
    for name, status in _HTTP_STATUS.items():
        if isinstance(error, loaded_errors([name])):
            return int(status(error))
    return None
