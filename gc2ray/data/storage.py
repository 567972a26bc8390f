"""`storage_of`: the filesystem of a path or URL, and the path on that filesystem.

A location that begins like a local path is always one: fsspec reads `::` as a chain of filesystems,
and would read `/data/set` for `/data/set::v2`.

Not covered: which locations images may be read from (`gc2ray.data.image_bytes`), and the checks of
locations in a configuration (`gc2ray.core.config.locations`).
"""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gc2ray.core.config.locations import is_local_path


def storage_of(location: str, **options: Any) -> tuple[Any, str]:
    """The filesystem of a local path or of any fsspec URL, and the path there.

    Args:
        location: The path or URL.
        options: Options of the filesystem, for a URL.

    Raises:
        ValueError, ImportError: There is no such filesystem.
    """
    if is_local_path(location):
        return LocalFileSystem(), LocalFileSystem._strip_protocol(location)
    filesystem, path = fsspec.core.url_to_fs(location, **options)
    return filesystem, path


def protocols(filesystem: Any) -> tuple[str, ...]:
    """The protocols of a filesystem's URLs."""
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def without_dots(path: str) -> str:
    """A path without its components `.` and `..`; doubled slashes stay."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part != ".":
            parts.append(part)
    return "/".join(parts)
