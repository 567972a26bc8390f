"""The folder of fetched models: its path, its locks, and checks of disk space."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from botocore.exceptions import NoCredentialsError
from filelock import FileLock, Timeout

from gc2ray.core.errors import ConfigError, first_line

LEFT_OUT = ("*/*.safetensors",)
"""Checkpoints in folders below the model, which are never loaded."""

FETCHED = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
CACHE_VARIABLE = "GC2RAY_CACHE"
JITTER_SECONDS = 3.0
"""Workers that start together spread their first requests to the storage over this time."""
POLL_SECONDS = 1.0
"""How often a waiting process checks the progress of the one that fetches."""
UNREADABLE = (FileNotFoundError, PermissionError, NoCredentialsError)
Tick = Callable[[], None]


def models_folder() -> Path:
    """Where models from URLs, and locks, are kept on this node."""
    cache = os.environ.get(CACHE_VARIABLE) or "~/.cache/gc2ray"
    return Path(cache).expanduser().absolute() / "models"


@contextmanager
def locked(path: Path, watched: Path, tick: Tick) -> Iterator[None]:
    """Hold a lock of this node; while another process holds it, `tick` when `watched` grows.

    The lock is the kernel's, so a killed process leaves none behind.

    Raises:
        ConfigError: The lock file cannot be written.
    """
    lock = FileLock(path)
    seen = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=POLL_SECONDS)
            except Timeout:
                before, seen = seen, _bytes_below(watched)
                if seen != before:
                    tick()
    except OSError as error:
        raise ConfigError(
            f"models are kept in {path.parent}, which cannot be written: {error.strerror}; name "
            f"another folder in the environment variable {CACHE_VARIABLE}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _bytes_below(folder: Path) -> int:
    """Bytes on disk; files may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(parent, name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def check_disk_space(model: str, needed_bytes: int, folder: Path, variable: str) -> None:
    """Refuse to fill a disk.

    Raises:
        OSError: Less than `needed_bytes` are free.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise OSError(
            f"{model} needs {needed_bytes / 1e9:.3f} GB, and {folder} has {free_bytes / 1e9:.3f} "
            f"GB free: free space there, or set {variable} to a larger disk"
        )


def pause(jitter_seconds: float) -> None:
    """Sleep a random part of a time, independent of any seed."""
    time.sleep(random.SystemRandom().uniform(0, jitter_seconds))


def unreadable(path: str, error: Exception) -> ConfigError:
    """The error of a model whose files cannot be read."""
    return ConfigError(f"recipe.model.path: {path} cannot be read: {first_line(error)}")
