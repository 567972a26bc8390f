"""`Store`: objects that are created whole or not at all, on local disks and any fsspec filesystem.

On a local disk, `create` writes a temporary file, syncs it, links it to the final name (which fails
if the name is taken) and syncs the folder; where the disk has no hard links, it creates the file
exclusively. Elsewhere it makes one conditional put (`mode="create"`).

Temporary trouble of a remote storage is waited out (`gc2ray.data.retries`).

Not covered: two writers at the same moment on a store that ignores the condition. The last one
wins, with whole objects; a warning at the start says so.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import posixpath
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.errors import ConfigError, storage_errors
from gc2ray.data.parquet_footer import parse_footer, read_footer
from gc2ray.data.remote_file import RetryingFile
from gc2ray.data.retries import RETRY_POLICY, RetryPolicy
from gc2ray.data.storage import protocols, storage_of

AT_START = RetryPolicy(total_seconds=15.0)
"""Retries of the check at the start; short, as somebody waits and the address may be wrong."""
COPY_BYTES = 1 << 20
LEFTOVER_SECONDS = 3600.0
"""Age at which a temporary file is a leftover: a part is written in seconds."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


T = TypeVar("T")

log = logging.getLogger(__name__)


class Store:
    """Objects under one root, by name relative to it.

    Args:
        uri: Local directory or any fsspec URL.
        retry_policy: How long temporary trouble of a remote storage is waited out.

    Raises:
        ConfigError: The filesystem is unknown.
    """

    def __init__(self, uri: str, retry_policy: RetryPolicy = RETRY_POLICY) -> None:
        self.uri = uri
        self._retry_policy = retry_policy
        try:
            self._fs, self._root = storage_of(uri, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"output: {error}") from error
        self._local = "file" in protocols(self._fs)

    def __reduce__(self) -> tuple[type[Store], tuple[str, RetryPolicy]]:
        # Never a filesystem: its pickle may hold credentials.
        return type(self), (self.uri, self._retry_policy)

    def check_usable(self, *, writing: bool) -> None:
        """Try to list and, if `writing`, to write, before anything depends on it.

        Raises:
            ConfigError: The storage does not answer, or refuses.
        """
        if self._local and Path(self._root).is_file():
            raise ConfigError(f"output: {self.uri} is a file, not the directory of a run's output")
        at_start = Store(self.uri, AT_START)
        try:
            at_start.names("data")
            if writing:
                at_start._probe()
        except storage_errors() as error:
            raise ConfigError(
                f"output: {self.uri} cannot be used: {type(error).__name__}: {error}; credentials "
                "come from the storage's own chain (environment, profile or instance role)"
            ) from error

    def _probe(self) -> None:
        """Write a probe; on remote storages twice, to see whether the second write is refused."""
        probe = self._path(f"_tmp/probe-{uuid.uuid4().hex}")
        if self._local:
            self._create_local(probe, io.BytesIO(b""))
        elif not self._refuses_second(probe):
            log.warning(
                "%s ignores conditional writes: if two drivers commit at the same moment, the last "
                "one wins, with whole parts; run one driver at a time on this output",
                self.uri,
            )
        self._retry_policy.call("removing a probe", lambda: self._remove(probe))

    def _refuses_second(self, path: str) -> bool:
        """Whether a conditional write to a name that is taken is refused."""
        call, pipe = self._retry_policy.call, self._fs.pipe_file
        call("writing a probe", lambda: pipe(path, b""))
        try:
            call("writing a probe", lambda: pipe(path, b"", mode="create"))
        except FileExistsError:
            return True
        return False

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):  # an earlier attempt of this call removed it
            self._fs.rm_file(path)

    def create(self, name: str, data: bytes) -> bool:
        """Create an object, whole or not at all; return False if the name is taken.

        Raises:
            OSError: The object could not be written.
        """
        return self._created(
            name,
            lambda: io.BytesIO(data),
            lambda target: self._fs.pipe_file(target, data, mode="create"),
        )

    def create_from(self, name: str, path: Path) -> bool:
        """As `create`, from a file on this machine that need not fit into memory."""
        return self._created(
            name,
            lambda: path.open("rb"),
            lambda target: self._fs.put_file(str(path), target, mode="create"),
        )

    def _created(
        self, name: str, content: Callable[[], IO[bytes]], put: Callable[[str], object]
    ) -> bool:
        """Use `content` for a local disk, `put` for any other storage."""
        try:
            if self._local:
                with content() as opened:
                    self._create_local(self._path(name), opened)
            else:
                self._create_remote(name, put)
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Create or overwrite an object, whole or not at all."""
        if not self._local:
            path = self._path(name)
            self._retry_policy.call(f"writing {name}", lambda: self._fs.pipe_file(path, data))
            return
        target = Path(self._path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary(io.BytesIO(data)).replace(target)

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is no such object."""
        try:
            content: bytes = self._retry_policy.call(
                f"reading {name}", lambda: self._fs.cat_file(self._path(name))
            )
        except FileNotFoundError:
            return None
        return content

    def sha256(self, name: str) -> str:
        """The digest of an object's content, which need not fit into memory.

        Raises:
            OSError: There is no such object, or the storage does not answer.
        """
        digest = hashlib.sha256()
        with self.open(name) as handle:
            while piece := handle.read(COPY_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def names(self, folder: str) -> list[str]:
        """Names of the objects in a folder, sorted; empty if there is no folder."""
        try:
            paths = self._retry_policy.call(
                f"listing {folder}/", lambda: self._fs.ls(self._path(folder), detail=False)
            )
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{posixpath.basename(path)}" for path in paths)

    def metadata(self, name: str) -> pq.FileMetaData:
        """The metadata of a Parquet file.

        Raises:
            ValueError: The object is not Parquet.
            OSError: The storage does not answer.
        """
        with self.open(name) as handle:
            tail = read_footer(handle)
        try:
            return parse_footer(tail)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"not Parquet: {error}") from error

    def open(self, name: str) -> RetryingFile:
        """An object, open for reading.

        Raises:
            OSError: There is no such object, or the storage does not answer.
        """
        return RetryingFile(self._fs, self._path(name), self._retry_policy)

    def tidy(self) -> None:
        """Remove the empty folder of temporary files; only call it after the last write."""
        folder = Path(self._root) / "_tmp"
        if self._local and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def sweep(self, older_seconds: float = LEFTOVER_SECONDS) -> None:
        """Remove temporary files that killed processes left, by their age.

        If that fails they stay; nothing depends on it.
        """
        try:
            for name in self.names("_tmp"):
                path = self._path(name)
                with suppress(FileNotFoundError):  # another process removed it
                    age = datetime.now(UTC) - self._fs.modified(path)
                    if age.total_seconds() > older_seconds:
                        self._fs.rm_file(path)
        except storage_errors() as error:
            log.warning("%s: leftovers in _tmp stay: %s", self.uri, error)

    def holds(self, other: Store) -> bool:
        """Whether another store's root is this root, or lies inside it."""
        own, its = (
            posixpath.join(os.path.realpath(root) if self._local else root, "")
            for root in (self._root, other._root)
        )
        is_same = (self._local and other._local) or bool(self._fs == other._fs)
        return is_same and its.startswith(own)

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def _temporary(self, content: IO[bytes]) -> Path:
        """A synced temporary file on the same filesystem as the data."""
        folder = Path(self._root) / "_tmp"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        _write_new(path, content)
        return path

    def _create_remote(self, name: str, write: Callable[[str], object]) -> None:
        """Make one conditional put, again while the storage is in trouble.

        The name is looked up first, because a store that ignores the condition would overwrite the
        object. On such a store two writers at the same moment may still collide.

        Raises:
            FileExistsError: The name is taken, perhaps by an earlier attempt of this call.
        """
        path = self._path(name)

        def put() -> None:
            if self._is_taken(path):
                raise FileExistsError(errno.EEXIST, "the name is taken", name)
            write(path)

        self._retry_policy.call(f"writing {name}", put)

    def _is_taken(self, path: str) -> bool:
        try:
            self._fs.info(path)
        except FileNotFoundError:
            return False
        return True

    def _create_local(self, path: str, content: IO[bytes]) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._temporary(content)
        try:
            target.hardlink_to(temporary)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _write_new(target, content)  # without links: exclusive, but not atomic
        finally:
            temporary.unlink()
        _sync_folder(target.parent)


def json_bytes(content: object) -> bytes:
    """A record as indented JSON."""
    return (json.dumps(content, indent=2) + "\n").encode()


def read_records(
    store: Store, names: Iterable[str], parse: Callable[[bytes], T]
) -> Iterator[tuple[str, T]]:
    """The records in some objects, with their names; other objects are skipped with a warning.

    Args:
        store: The store.
        names: Names of the objects.
        parse: Parses a record; raises ValueError, KeyError or TypeError for other data.
    """
    for name in names:
        try:
            record = parse(store.read(name) or b"")
        except (ValueError, KeyError, TypeError):
            log.warning("%s: %s is not a record that gc2ray wrote", store.uri, name)
        else:
            yield name, record


def _write_new(path: Path, content: IO[bytes]) -> None:
    """Write and sync a new file; if that fails, remove it."""
    content.seek(0)
    with path.open("xb") as handle:
        try:
            shutil.copyfileobj(content, handle, COPY_BYTES)
            handle.flush()
            os.fsync(handle.fileno())
        except OSError:
            path.unlink()
            raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
