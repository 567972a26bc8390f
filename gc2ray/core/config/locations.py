"""Checks paths and URLs of a configuration without a call to any storage."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from gc2ray.core.errors import ConfigError

HUB = "hf:"
"""Prefix of datasets of the Hugging Face hub, see `gc2ray.data.input_entries`."""
_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):(/*)")
_STORAGES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "http", "https", "file"}
_VARIABLE = re.compile(r"(?:^|/)\$(?:\w|\{)")

Location: TypeAlias = str | os.PathLike[str]
"""A local path, or an fsspec URL as text."""

LOCAL_STARTS = ("/", ".", "~")


def is_local_path(location: str) -> bool:
    """Whether a location is clearly a local path."""
    return location.startswith(LOCAL_STARTS) and "://" not in location


def check_location(key: str, location: str) -> None:
    """Refuse a path or URL that would be taken for something else.

    Args:
        key: The setting that names it.
        location: Its value.

    Raises:
        ConfigError: It is empty, a URL without its slashes, or has in it what a shell would have
            replaced.
    """
    if not location.strip() or "\0" in location:
        raise ConfigError(f"{key}: {location!r} is neither a path nor a URL")
    for part in [] if is_local_path(location) else location.split("::"):
        scheme = _SCHEME.match(part)
        slashes = len(scheme.group(2)) if scheme else 2
        if scheme and (slashes == 1 or (not slashes and scheme.group(1).lower() in _STORAGES)):
            root = "/" if scheme.group(1) == "file" else ""
            meant = f"{scheme.group(1)}://{root}{part[scheme.end() :]}"
            raise ConfigError(f"{key}: {location!r} is not a URL; did you mean {meant!r}?")
    if _VARIABLE.search(location):
        raise ConfigError(
            f"{key}: {location!r} has a shell variable, and variables are not expanded; write the "
            "whole path"
        )
    try:
        Path(location).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{key}: {location!r}: there is no such user on this machine; {error}"
        ) from error


def as_location(key: str, given: Location) -> str:
    """A location as text, checked; see `check_location` for arguments and errors."""
    location = os.fspath(given)
    check_location(key, location)
    return location


def as_locations(key: str, given: Sequence[Location]) -> list[str]:
    """Locations as text, checked; at least one.

    Raises:
        ConfigError: There is none, or as `check_location`.
    """
    if not given:
        raise ConfigError(f"{key}: name at least one")
    return [as_location(key, location) for location in given]


def is_url(location: str) -> bool:
    """Whether a location is a URL for fsspec; see `gc2ray.data.storage`."""
    if is_local_path(location):
        return False
    return "://" in location or "::" in location or location.startswith(HUB)
