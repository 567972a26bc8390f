"""The output directory: create-if-absent objects, on local disks and any fsspec filesystem.

A part is committed by one atomic create under its final name; that object is the commit marker.
Locally: temporary file, fsync, hard link (which fails if the name is taken), fsync of the folder;
where links are missing, an exclusive create. Elsewhere: one conditional put (`mode="create"`).
Whoever comes second finds the name taken and looks whether it was himself, by a token in the
part's footer: an acknowledgement that got lost is a success, another's part is a lost race.

Trouble of a remote storage that may pass is waited out (`gc2ray.data.retries`).

Not covered: two writers in the same moment on a store that ignores the condition, which is told at
the start: there the last one wins, whole.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.errors import STORAGE_ERRORS, ConfigError
from gc2ray.core.schema import SCHEMA_KEY, SCHEMA_VERSION
from gc2ray.core.shards import Shard
from gc2ray.core.stats import RunStats
from gc2ray.data.parquet_footer import open_parquet, parse_footer, read_footer
from gc2ray.data.remote_file import RetryingFile
from gc2ray.data.retries import RETRY_POLICY, RetryPolicy
from gc2ray.data.storage import protocols, storage_of

READ_THREADS = 16
AT_START = RetryPolicy(total_seconds=15.0)
"""While somebody waits for the first word: an address may be wrong."""
COPY_BYTES = 1 << 20
LEFTOVER_SECONDS = 3600.0
"""A temporary file of that age belongs to nobody: a part is written in seconds."""
_PART = re.compile(r"part-(\d{7})-([0-9a-f]{16})\.parquet$")
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


log = logging.getLogger(__name__)


class Commit(StrEnum):
    """How a commit ended."""

    WON = "won"
    LOST_RACE = "lost_race"


@dataclass(frozen=True)
class PartFooter:
    """What the footer of a part says beside its schema.

    Attributes:
        sid: The shard.
        run: Fingerprint of the recipe.
        token: Of the try that wrote it.
        worker: Who wrote it.
        rows: Input rows that it answers.
        stats: Of its answers.
        written: When; None in parts from before that was noted.
    """

    sid: str
    run: str
    token: str
    worker: str
    rows: int
    stats: RunStats
    written: datetime | None = None

    def metadata(self) -> dict[str, str]:
        """As schema metadata."""
        written = {"gc2ray.written": self.written.isoformat()} if self.written else {}
        return {
            "gc2ray.sid": self.sid,
            "gc2ray.run": self.run,
            "gc2ray.token": self.token,
            "gc2ray.worker": self.worker,
            "gc2ray.rows": str(self.rows),
            "gc2ray.stats": self.stats.to_json(),
            **written,
        }

    @staticmethod
    def from_metadata(metadata: pq.FileMetaData) -> PartFooter:
        """The footer of a Parquet file.

        Raises:
            ValueError: It is not a part's.
            ConfigError: It is one of another version, with other columns.
        """
        found = metadata.metadata or {}
        try:
            values = {key: found[f"gc2ray.{key}".encode()].decode() for key in _FOOTER_KEYS}
            stats = RunStats.from_json(values.pop("stats"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a part's footer: {error}") from error
        version = found.get(SCHEMA_KEY.encode(), b"").decode()
        if version != str(SCHEMA_VERSION):
            raise ConfigError(
                f"written by another version of gc2ray (schema {version or 'unknown'}, this one "
                f"has {SCHEMA_VERSION}); choose a new output, or resume with that version"
            )
        if stats.rows != metadata.num_rows:
            raise ValueError(f"{metadata.num_rows} answers, statistics of {stats.rows}")
        # Parts from before there were several prompts per row have an answer per row.
        rows = int(found.get(b"gc2ray.rows", metadata.num_rows))
        when = found.get(b"gc2ray.written")
        written = datetime.fromisoformat(when.decode()) if when else None
        return PartFooter(rows=rows, stats=stats, written=written, **values)

    @property
    def answers(self) -> int:
        """Answer rows of the part: one for each prompt of a row."""
        return self.stats.rows


class Store:
    """Objects under one root, by name relative to it.

    Args:
        uri: Local directory or any fsspec URL.
        retry_policy: With a remote storage in trouble.

    Raises:
        ConfigError: No such filesystem.
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
        """List, and if need be write something, before anything depends on it.

        Raises:
            ConfigError: The storage does not answer, or not to us.
        """
        at_start = Store(self.uri, AT_START)
        try:
            at_start.names("data")
            if writing:
                at_start._probe()
        except STORAGE_ERRORS as error:
            raise ConfigError(
                f"output: {self.uri} cannot be used: {type(error).__name__}: {error}; credentials "
                "come from the storage's own chain (environment, profile or instance role)"
            ) from error

    def _probe(self) -> None:
        """Write something, twice where that tells whether the second writer is refused."""
        probe = self._path(f"_tmp/probe-{uuid.uuid4().hex}")
        if self._local:
            self._create_local(probe, io.BytesIO(b""))
        elif not self._refuses_second(probe):
            log.warning(
                "%s ignores conditional writes: of two drivers in the same moment the last one "
                "wins, with whole parts; run one driver at a time on this output",
                self.uri,
            )
        self._retry_policy.call("removing a probe", lambda: self._remove(probe))

    def _refuses_second(self, path: str) -> bool:
        """Whether a name that is taken is refused on the condition that it is free."""
        call, pipe = self._retry_policy.call, self._fs.pipe_file
        call("writing a probe", lambda: pipe(path, b""))
        try:
            call("writing a probe", lambda: pipe(path, b"", mode="create"))
        except FileExistsError:
            return True
        return False

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):  # an earlier try of this very call was faster
            self._fs.rm_file(path)

    def create(self, name: str, data: bytes) -> bool:
        """Make an object, whole or not at all; False if the name is taken.

        Raises:
            OSError: It could not be written.
        """
        return self._created(
            name,
            lambda: io.BytesIO(data),
            lambda target: self._fs.pipe_file(target, data, mode="create"),
        )

    def create_from(self, name: str, path: Path) -> bool:
        """As `create`, of a file on this machine, which need not fit into memory."""
        return self._created(
            name,
            lambda: path.open("rb"),
            lambda target: self._fs.put_file(str(path), target, mode="create"),
        )

    def _created(
        self, name: str, content: Callable[[], IO[bytes]], put: Callable[[str], object]
    ) -> bool:
        """`content` is for a local disk, `put` for any other storage."""
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
        """Make or overwrite an object, whole or not at all."""
        if not self._local:
            path = self._path(name)
            self._retry_policy.call(f"writing {name}", lambda: self._fs.pipe_file(path, data))
            return
        target = Path(self._path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary(io.BytesIO(data)).replace(target)

    def read(self, name: str) -> bytes | None:
        """An object's content; None if there is none."""
        try:
            content: bytes = self._retry_policy.call(
                f"reading {name}", lambda: self._fs.cat_file(self._path(name))
            )
        except FileNotFoundError:
            return None
        return content

    def sha256(self, name: str) -> str:
        """Of an object's content, which need not fit into memory.

        Raises:
            OSError: There is none, or the storage does not answer.
        """
        digest = hashlib.sha256()
        with self._open(name) as handle:
            while piece := handle.read(COPY_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def names(self, folder: str) -> list[str]:
        """Names of the objects in a folder, sorted; empty if there is no folder."""
        try:
            found = self._retry_policy.call(
                f"listing {folder}/", lambda: self._fs.ls(self._path(folder), detail=False)
            )
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{posixpath.basename(path)}" for path in found)

    def commit(self, shard: Shard, part: bytes, token: str) -> Commit:
        """Publish a shard's part.

        Args:
            shard: The shard.
            part: A Parquet file whose footer holds `token`.
            token: Unique to this try.

        Raises:
            OSError: It could not be written.
        """
        if self.create(shard.part_name, part):
            return Commit.WON
        return Commit.WON if self.footer(shard.part_name).token == token else Commit.LOST_RACE

    def committed(self) -> dict[str, str]:
        """Committed shards: sid to part name."""
        matches = [(_PART.search(name), name) for name in self.names("data")]
        return {match.group(2): name for match, name in matches if match}

    def metadata(self, name: str) -> pq.FileMetaData:
        """What the end of a Parquet file says of it.

        Raises:
            ValueError: It is not Parquet.
            OSError: The storage does not answer.
        """
        with self._open(name) as handle:
            tail = read_footer(handle)
        try:
            return parse_footer(tail)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"not Parquet: {error}") from error

    def _open(self, name: str) -> RetryingFile:
        return RetryingFile(self._fs, self._path(name), self._retry_policy)

    def footer(self, name: str) -> PartFooter:
        """The footer of a part.

        Raises:
            ConfigError: It is not a part, or one of another version.
            OSError: The storage does not answer.
        """
        try:
            return PartFooter.from_metadata(self.metadata(name))
        except ConfigError as error:
            raise ConfigError(f"{self.uri}: {name}: {error}") from error
        except ValueError as error:
            raise ConfigError(
                f"{self.uri}: {name} is not a part that gc2ray wrote; move it away, and rerun"
            ) from error

    def footers(self, names: Sequence[str]) -> list[PartFooter]:
        """The footers of parts, in order.

        Raises:
            ConfigError, OSError: As `footer`.
        """
        with ThreadPoolExecutor(READ_THREADS, "gc2ray-footer") as pool:
            return list(pool.map(self.footer, names))

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of a part, or all of them.

        Raises:
            OSError: It cannot be read; the message names it.
        """
        wanted = None if columns is None else list(columns)
        try:
            with self._open(name) as handle:
                part = open_parquet(handle, check_pages=True)
                return part.read(columns=wanted, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            said = " ".join(str(error).split())
            raise OSError(
                f"{self.uri}: {name} cannot be read: {said}; `gc2ray verify --deep` tells if it is "
                "damaged"
            ) from error

    def answers(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all committed answer rows, part by part.

        Raises:
            ConfigError: There are no answers, or a column is not among them.
            OSError: The storage does not answer.
        """
        names = sorted(self.committed().values())
        if not names:
            raise ConfigError(f"{self.uri}: holds no answers")
        tables = []
        for name in names:
            with self._open(name) as handle:
                part = open_parquet(handle)
                missing = sorted(set(columns) - set(part.schema_arrow.names))
                if missing:
                    raise ConfigError(
                        f"{self.uri}: has no column {missing[0]!r}; input columns are written back "
                        "if recipe.input.keep names them"
                    )
                tables.append(part.read(columns=list(columns), use_threads=False))
        return pa.concat_tables(tables)

    def tidy(self) -> None:
        """Remove the empty folder of temporary files; only where nobody writes any more."""
        folder = Path(self._root) / "_tmp"
        if self._local and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def sweep(self, older_seconds: float = LEFTOVER_SECONDS) -> None:
        """Remove temporary files of that age: of processes that were killed, not of living ones.

        Where that fails they stay: nothing depends on it.
        """
        try:
            for name in self.names("_tmp"):
                path = self._path(name)
                with suppress(FileNotFoundError):  # somebody else sweeps, too
                    age = datetime.now(UTC) - self._fs.modified(path)
                    if age.total_seconds() > older_seconds:
                        self._fs.rm_file(path)
        except STORAGE_ERRORS as error:
            log.warning("%s: leftovers in _tmp stay: %s", self.uri, error)

    def holds(self, other: Store) -> bool:
        """Whether another root is this one, or lies within."""
        own, its = (
            posixpath.join(os.path.realpath(root) if self._local else root, "")
            for root in (self._root, other._root)
        )
        return bool(self._fs == other._fs) and its.startswith(own)

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def _temporary(self, content: IO[bytes]) -> Path:
        """A synced file beside the data, on the same filesystem."""
        folder = Path(self._root) / "_tmp"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        _write_new(path, content)
        return path

    def _create_remote(self, name: str, write: Callable[[str], object]) -> None:
        """One conditional put, tried again while the storage is in trouble.

        It is looked first whether the name is taken: a store that ignores the condition would
        overwrite. Two writers in the same moment are then still possible there.

        Raises:
            FileExistsError: The name is taken, perhaps by an earlier try of this very call.
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
            _write_new(target, content)  # no links here: exclusive, though not atomic
        finally:
            temporary.unlink()
        _sync_folder(target.parent)


def part_index(name: str) -> int:
    """The index of the shard that a part is named for.

    Raises:
        ValueError: It is no part's name.
    """
    match = _PART.search(name)
    if match is None:
        raise ValueError(f"{name} is not the name of a part")
    return int(match.group(1))


_FOOTER_KEYS = ("sid", "run", "token", "worker", "stats")


def _write_new(path: Path, content: IO[bytes]) -> None:
    """Write and sync a file that is not there yet; nothing stays of it if that fails."""
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
