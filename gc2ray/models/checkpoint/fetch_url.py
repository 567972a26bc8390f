"""Fetches a model from an fsspec URL into the cache, file by file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # in its `__init__`, documented
    filter_repo_objects,
)

from gc2ray.core.errors import ConfigError
from gc2ray.data.retries import RETRY_POLICY
from gc2ray.data.storage import storage_of
from gc2ray.models.checkpoint.cache import (
    CACHE_VARIABLE,
    FETCHED,
    LEFT_OUT,
    UNREADABLE,
    Tick,
    check_disk_space,
    locked,
    models_folder,
    unreadable,
)

FETCH_THREADS = 8


def fetch_from_url(url: str, patterns: Sequence[str], tick: Tick) -> Path:
    """Fetch a model once per node, and return its directory.

    Raises:
        ConfigError: There is no model, or it may not be read.
        OSError: The storage does not answer, or the disk is full.
    """
    filesystem, files = list_files(url, patterns)
    directory = models_folder() / _key(url, files)
    partial = directory.with_suffix(".partial")
    with locked(directory.with_suffix(".lock"), partial, tick):
        if not directory.is_dir():
            if partial.exists():  # of a process that was killed or failed
                shutil.rmtree(partial)
            needed = sum(file.size_bytes for file in files)
            check_disk_space(url, needed, directory.parent, CACHE_VARIABLE)
            try:
                _fetch(filesystem, files, partial, tick)
            except UNREADABLE as error:
                raise unreadable(url, error) from error
            partial.rename(directory)
    return directory


def list_files(url: str, patterns: Sequence[str] = FETCHED) -> tuple[Any, list[_File]]:
    """The filesystem of a URL, and the files to fetch from it.

    Raises:
        ConfigError: There is no model, or it may not be read.
        OSError: The storage does not answer.
    """
    try:
        filesystem, root = storage_of(url, use_listings_cache=False)
        listing = RETRY_POLICY.call(f"listing {url}", lambda: filesystem.find(root, detail=True))
        return filesystem, _wanted(url, root.rstrip("/"), listing, patterns)
    except (ImportError, ValueError, *UNREADABLE) as error:
        raise unreadable(url, error) from error


@dataclass(frozen=True)
class _File:
    """A file of a model behind a URL.

    Attributes:
        path: Path in its filesystem.
        name: Path below the model.
        size_bytes: Size; 0 if the storage does not report it.
        version: ETag or time of change; empty if the storage reports neither.
    """

    path: str
    name: str
    size_bytes: int
    version: str


def _wanted(
    url: str, root: str, listing: Mapping[str, Mapping[str, Any]], patterns: Sequence[str]
) -> list[_File]:
    """The files of a listing that are to be fetched, in order of name.

    Raises:
        ConfigError: There is no model, or a name leads out of it.
    """
    files = []
    for path, info in listing.items():
        if path == root:
            continue  # a file, not a directory
        name = path.removeprefix(f"{root}/")
        if name == path or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ConfigError(f"recipe.model.path: {url} lists {path!r}, which is not below it")
        version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
        files.append(_File(path, name, info.get("size") or 0, str(version)))
    wanted = filter_repo_objects(
        files,
        allow_patterns=list(patterns),
        ignore_patterns=list(LEFT_OUT),
        key=lambda file: file.name,
    )
    chosen = sorted(wanted, key=lambda file: file.name)
    if "config.json" not in [file.name for file in chosen]:
        raise ConfigError(f"recipe.model.path: there is no model at {url} (no config.json)")
    return chosen


def _key(url: str, files: Sequence[_File]) -> str:
    listing = [(file.name, file.size_bytes, file.version) for file in files]
    return hashlib.sha256(json.dumps([url.rstrip("/"), listing]).encode()).hexdigest()[:32]


def _fetch(filesystem: Any, files: Sequence[_File], partial: Path, tick: Tick) -> None:
    """Fetch files into a new folder, and sync them to the disk."""

    def fetch(file: _File) -> None:
        target = partial / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        callback = Callback(hooks={"tick": lambda *_args, **_kwargs: tick()})
        get = filesystem.get_file
        RETRY_POLICY.call(
            f"fetching {file.path}", lambda: get(file.path, str(target), callback=callback)
        )
        with target.open("rb+") as written:
            os.fsync(written.fileno())
            size = written.seek(0, os.SEEK_END)
        if size != file.size_bytes > 0:
            raise OSError(f"{file.path}: only {size} of {file.size_bytes} bytes were received")

    with ThreadPoolExecutor(FETCH_THREADS, "gc2ray-fetch") as executor:
        list(executor.map(fetch, files))
