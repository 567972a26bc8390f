"""A model behind an fsspec URL, fetched file by file into the cache."""

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
    check_room,
    locked,
    models_folder,
    unreadable,
)

FETCH_THREADS = 8


def from_url(url: str, patterns: Sequence[str], tick: Tick) -> Path:
    """Fetched once per node.

    Raises:
        ConfigError: There is no model, or it may not be read.
        OSError: The storage does not answer, or the disk has no room.
    """
    filesystem, files = files_behind(url, patterns)
    directory = models_folder() / _key(url, files)
    partial = directory.with_suffix(".partial")
    with locked(directory.with_suffix(".lock"), partial, tick):
        if not directory.is_dir():
            if partial.exists():  # of a process that was killed, or failed
                shutil.rmtree(partial)
            needed = sum(file.size_bytes for file in files)
            check_room(url, needed, directory.parent, CACHE_VARIABLE)
            try:
                _fetch(filesystem, files, partial, tick)
            except UNREADABLE as error:
                raise unreadable(url, error) from error
            partial.rename(directory)
    return directory


def files_behind(url: str, patterns: Sequence[str] = FETCHED) -> tuple[Any, list[_File]]:
    """The filesystem, and what is to be fetched from it.

    Raises:
        ConfigError: There is no model, or it may not be read.
        OSError: The storage does not answer.
    """
    try:
        filesystem, root = storage_of(url, use_listings_cache=False)
        found = RETRY_POLICY.call(f"listing {url}", lambda: filesystem.find(root, detail=True))
        return filesystem, _listed(url, root.rstrip("/"), found, patterns)
    except (ImportError, ValueError, *UNREADABLE) as error:
        raise unreadable(url, error) from error


@dataclass(frozen=True)
class _File:
    """A file of a model behind a URL.

    Attributes:
        path: In its filesystem.
        name: Below the model.
        size_bytes: 0 where the storage does not tell.
        version: What changes with its content, as far as the storage tells.
    """

    path: str
    name: str
    size_bytes: int
    version: str


def _listed(
    url: str, root: str, found: Mapping[str, Mapping[str, Any]], patterns: Sequence[str]
) -> list[_File]:
    """What is to be fetched, in order of name.

    Raises:
        ConfigError: There is no model, or a name leads out of it.
    """
    files = []
    for path, info in found.items():
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
    """Files into a new folder, and onto the disk."""

    def fetch(file: _File) -> None:
        target = partial / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        told = Callback(hooks={"tick": lambda *_args, **_told: tick()})
        get = filesystem.get_file
        RETRY_POLICY.call(
            f"fetching {file.path}", lambda: get(file.path, str(target), callback=told)
        )
        with target.open("rb+") as written:
            os.fsync(written.fileno())
            size = written.seek(0, os.SEEK_END)
        if size != file.size_bytes > 0:
            raise OSError(f"{file.path}: {size} bytes came of {file.size_bytes}")

    with ThreadPoolExecutor(FETCH_THREADS, "gc2ray-fetch") as pool:
        list(pool.map(fetch, files))
