"""Which filesystem a place is on (`storage_of`), and what the place is called there.

A place that begins as a local path is one, whatever else is in its name: fsspec takes `::` for a
chain of filesystems, and would read `/data/set` where `/data/set::v2` is named.

Not covered: which places may be read (`gc2ray.data.image_bytes`), or make sense
(`gc2ray.core.config.job`).
"""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gc2ray.core.config.locations import is_local_path


def storage_of(place: str, **options: Any) -> tuple[Any, str]:
    """The filesystem of a local path or of any fsspec URL, and the path there.

    Args:
        place: The path or URL.
        options: Of the filesystem, for a URL.

    Raises:
        ValueError, ImportError: There is no such filesystem.
    """
    if is_local_path(place):
        return LocalFileSystem(), LocalFileSystem._strip_protocol(place)
    filesystem, path = fsspec.core.url_to_fs(place, **options)
    return filesystem, path


def protocols(filesystem: Any) -> tuple[str, ...]:
    """What a filesystem's URLs begin with."""
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
