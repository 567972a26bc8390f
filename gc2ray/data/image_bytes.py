"""Reads the encoded bytes of images, from allowed locations only and up to a size limit.

A dataset is not trusted: its images are read only from locations that the configuration names.

Not covered: a symbolic link that changes between check and read.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import IO, Any
from urllib.parse import unquote

from fsspec.implementations.local import LocalFileSystem

from gc2ray.core.config.input import (
    CONTROL_CHARACTERS,
    ROOTS_KEY,
    ImageLimits,
)
from gc2ray.core.errors import ConfigError, ShardError, storage_errors
from gc2ray.core.records import ImageRef
from gc2ray.data.image_decoding import (
    one_line,
    refusal,
)
from gc2ray.data.retries import RETRY_POLICY, RetryPolicy
from gc2ray.data.storage import storage_of, without_dots

WEB_RETRY_POLICY = RetryPolicy(total_seconds=20.0)
"""Shorter for the web, where a server may have failed for good."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE | re.DOTALL)
_DOT_SEGMENT = re.compile(r"(?:^|[/\\])\.\.?(?:$|[/\\?#;])")
_ROW_ERRNOS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def read_bytes(ref: ImageRef, limits: ImageLimits) -> bytes:
    """The encoded image: the bytes of the row, else what lies at its path.

    A relative path is looked for under each root in turn. Local paths are compared with symbolic
    links and `..` resolved, and what is opened is that file; `::` and the like are characters of a
    name. URLs are compared by protocol and whole components, and what is read
    is the URL that was compared. HTTP redirects are not followed: they could leave the root.

    Temporary trouble is waited out. If a storage stays in trouble, that says nothing about this
    image, and its shard is tried again. On the web one page in a million always fails, so there the
    row fails.

    Raises:
        BadRow: `BAD_IMAGE`: null, empty, too large, missing, not a file, not under a root, or a
            page of the web that cannot be had.
        ConfigError: fsspec cannot serve the protocol of a root.
        ShardError: The storage failed in a way that says nothing about this image.
    """
    if ref.data is not None:
        return _checked(ref.data, limits, None)
    if not ref.path:
        raise refusal("the image is null: it has neither bytes nor a path")
    for location in _locations(ref.path, limits):
        data = _fetch(location, ref.path, limits)
        if data is not None:
            return _checked(data, limits, ref.path)
    raise refusal("no such image file", ref.path)


def _checked(data: bytes, limits: ImageLimits, path: str | None) -> bytes:
    if not data:
        raise refusal("the image has no bytes", path)
    if len(data) > limits.max_bytes:
        raise refusal(f"the image has more than {limits.max_bytes} bytes", path)
    return data


def _locations(path: str, limits: ImageLimits) -> list[str]:
    """Where to look for a path: resolved, under a root, at least one.

    Raises:
        BadRow: Not under any root.
    """
    if not limits.roots:
        raise refusal(f"images by path are off; {ROOTS_KEY} must name their directory", path)
    if CONTROL_CHARACTERS.search(path) or _sneaky(path):
        raise refusal("the path is refused: control characters, '::', or dots in a URL", path)
    roots = [_resolved(root) for root in limits.roots]
    allowed = [
        location
        for location in map(_resolved, _candidates(path, limits.roots))
        if any(_lies_under(location, root) for root in roots)
    ]
    if not allowed:
        raise refusal(f"the path lies outside {ROOTS_KEY}", path)
    return allowed


def _sneaky(path: str) -> bool:
    """Whether a URL could be read as another URL than the one that is compared.

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
    """The canonical spelling of a location: a real absolute path, or `protocol://` and a path."""
    url = _URL.fullmatch(location)
    protocol, rest = (url[1].lower(), url[2]) if url else ("file", location)
    if protocol in ("file", "local"):
        return os.path.realpath(rest)
    return f"{protocol}://{without_dots(rest.rstrip('/'))}"


def _lies_under(location: str, root: str) -> bool:
    return location == root or location.startswith(root.rstrip("/") + "/")


def _fetch(location: str, path: str, limits: ImageLimits) -> bytes | None:
    """At most `max_bytes` + 1 bytes of a file, or None where there is none."""
    fs, inner = _filesystem(location)
    retry_policy = WEB_RETRY_POLICY if _is_web(location) else RETRY_POLICY
    try:
        return retry_policy.call("reading an image", lambda: _content(fs, inner, path, limits))
    except FileNotFoundError:
        return None
    except storage_errors() as error:
        reason = f"cannot read the image ({type(error).__name__})"
        if _is_web(location) or _is_refused(error):
            raise refusal(reason, path) from error
        raise ShardError(one_line(f"{reason}: {path}: {error}")) from error


def _content(fs: Any, inner: str, path: str, limits: ImageLimits) -> bytes:
    info = fs.info(inner)
    if info.get("type") != "file":
        raise refusal("not a file", path)
    if (info.get("size") or 0) > limits.max_bytes:
        raise refusal(f"the image has more than {limits.max_bytes} bytes", path)
    with fs.open(inner, "rb") as file:
        return _read_at_most(file, limits.max_bytes + 1)


def _is_refused(error: Exception) -> bool:
    """Whether an error says something about this image, and not about the storage."""
    is_the_files = isinstance(error, OSError) and error.errno in _ROW_ERRNOS
    return is_the_files or isinstance(error, _UNREADABLE)


def _is_web(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _filesystem(location: str) -> tuple[Any, str]:
    """The filesystem and path of a resolved location; all of a local location is its path."""
    if location.startswith("/"):
        return LocalFileSystem(), location
    options = {"allow_redirects": False} if _is_web(location) else {}
    try:
        return storage_of(location, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            one_line(f"{ROOTS_KEY}: fsspec cannot read {location}: {error}")
        ) from error


def _read_at_most(file: IO[bytes], limit: int) -> bytes:
    """Read up to `limit` bytes: streams may return fewer, and only an empty read is the end."""
    chunks = []
    while limit > 0 and (chunk := file.read(limit)):
        chunks.append(chunk)
        limit -= len(chunk)
    return b"".join(chunks)
