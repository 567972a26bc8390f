"""`Source`: the input of a recipe, planned by its footers and read span by span.

Planning lists the files once and reads only their footers. A file that changed after planning is an
error. A span that begins where the span before it ended continues that read, so a row group that is
cut into many shards is read once if one worker has them.

Not covered: reading from several threads at a time.
"""

from __future__ import annotations

import errno
import itertools
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from gc2ray.core.config.input import InputConfig
from gc2ray.core.errors import ConfigError, ShardError, first_line, storage_errors
from gc2ray.core.records import Request
from gc2ray.core.shards import SourceFile, Span, bytes_digest
from gc2ray.data.formats.base import InputFile, RowFile
from gc2ray.data.formats.registry import format_of
from gc2ray.data.input_entries import URI_KEY, is_web
from gc2ray.data.listing import Listing, partition_types, partition_values
from gc2ray.data.parquet_footer import FOOTER_THREADS
from gc2ray.data.retries import RETRY_POLICY, RetryPolicy
from gc2ray.data.rows import RowReader

LARGE_GROUP_BYTES = 256 << 20
PEEK_BYTES = 64
BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file; `git lfs pull` fetches it"),
    (b"<", "an HTML or XML page"),
    (b"PARE", "an encrypted Parquet file"),
    (b"PAR1", "a Parquet file that is cut short or damaged"),
    (b"ARROW1", "an Arrow file, perhaps damaged"),
)
MAGICS = (b"PAR1", b"ARROW1")
CHANGED = ("mtime", "LastModified", "Last-Modified", "created", "Content-MD5", "Digest")
"""Names that storages use for the time of a change, or for what stands in its place."""
WEAK = "W/"
OF_AN_OUTPUT = re.compile(r"(^|/)(plan/\d{4}|data/part-\d{7}-[0-9a-f]{16})\.parquet$")

log = logging.getLogger(__name__)


def read_errors() -> tuple[type[Exception], ...]:
    """The exception types that reading an input file raises, for an `except` clause."""
    return (*storage_errors(), pa.ArrowException)


class Source:
    """The input of a recipe.

    Args:
        config: Its files and its columns.
        retry_policy: How long temporary trouble of the storage is waited out.
    """

    def __init__(self, config: InputConfig, retry_policy: RetryPolicy = RETRY_POLICY) -> None:
        self.config = config
        self._retry_policy = retry_policy
        self._rows = RowReader(config)
        self._kept: _Reading | None = None

    @cached_property
    def _listing(self) -> Listing:
        """The files of the input; cached because it takes a call to the storage for each entry."""
        return Listing.from_uris(self.config.uris(), self._retry_policy)

    def scan(self) -> tuple[list[SourceFile], pa.Schema]:
        """Every file in order, and the schema of the columns that are written back.

        Raises:
            ConfigError: There are no files, one cannot be read, or columns are missing.
        """
        with self._listing.listed() as paths:
            if not paths:
                raise ConfigError(
                    f"{URI_KEY}: no Parquet files at {', '.join(self.config.uris())}"
                    f"{self._listing.missing()}"
                )
            probed = self._probe_all(paths)
        _check_keys([probe.file.source for probe in probed])
        _warn_of_large_groups(probed)
        columns = [(probe.file.source, probe.columns) for probe in probed]
        return [probe.file for probe in probed], self._rows.kept_columns(columns)

    def apart(self, files: Sequence[SourceFile], planned: Collection[str]) -> list[SourceFile]:
        """The files that are not planned under another name."""
        paths = {self._listing.path(file.source): file for file in files}
        new = {*self._listing.others(list(paths), planned)}
        return [file for path, file in paths.items() if path in new or file.source in planned]

    def unplanned(self, planned: Collection[str]) -> list[str]:
        """Sources with rows, or that cannot be read, that are not among the planned ones.

        Raises:
            ConfigError: The storage does not answer.
        """
        with self._listing.listed() as paths:
            new = self._listing.others(paths, planned)
            with ThreadPoolExecutor(FOOTER_THREADS, "gc2ray-footer") as pool:
                paths = list(itertools.compress(new, pool.map(self._may_have_rows, new)))
        return [self._listing.source(path) for path in paths]

    def would_take(self, folder: str, names: Sequence[str]) -> bool:
        """Whether one of some files would be part of the input, if it existed.

        Args:
            folder: Local path or fsspec URL of a folder.
            names: Names of the files, relative to it.

        Raises:
            ConfigError: The storage of the input does not answer.
        """
        return self._listing.would_take(folder, names)

    def _may_have_rows(self, path: str) -> bool:
        try:
            with self._opened(path) as rows:
                return sum(rows.groups()) > 0
        except read_errors():
            return True

    def _probe_all(self, paths: Sequence[str]) -> list[_Probed]:
        """Probe every file, the first one alone: a mistake is usually the same in all files.

        Raises:
            ConfigError: A file cannot be read, or does not have the columns.
        """
        folders = partition_types(partition_values(self._listing.source(path)) for path in paths)
        first = self._probe(paths[0], folders)
        with ThreadPoolExecutor(FOOTER_THREADS, "gc2ray-footer") as pool:
            return [first, *pool.map(lambda path: self._probe(path, folders), paths[1:])]

    def _probe(self, path: str, folders: Mapping[str, pa.DataType]) -> _Probed:
        source = self._listing.source(path)
        try:
            fingerprint = self._fingerprint(path)
            with self._opened(path) as rows:
                columns = self._checked(rows.schema, source, folders)
                inside = _inside(rows, self._rows.columns)
                largest = max(rows.group_bytes(inside), default=0)
                file = SourceFile(source, fingerprint, rows.groups())
                return _Probed(file, columns, largest)
        except (*read_errors(), *self._web_errors) as error:
            reason = self._diagnosis(path, error)
            raise ConfigError(f"{URI_KEY}: {source} cannot be read: {reason}") from error

    @cached_property
    def _web_errors(self) -> tuple[type[Exception], ...]:
        """What the web's filesystem also raises: for servers that serve no ranges."""
        return (ValueError,) if is_web(self._listing.filesystem) else ()

    def _checked(
        self, schema: pa.Schema, source: str, folders: Mapping[str, pa.DataType]
    ) -> pa.Schema:
        """As `RowReader.check`, with a hint if the file looks like part of an output."""
        try:
            return self._rows.check(schema, source, folders)
        except ConfigError as error:
            if not OF_AN_OUTPUT.search(source):
                raise
            raise ConfigError(
                f"{URI_KEY}: {source} seems to belong to an output of gc2ray inside the input; "
                "move that output, or select the input's own files by a pattern"
            ) from error

    def _diagnosis(self, path: str, error: Exception) -> str:
        """Why a file cannot be read, judged by its size and its first bytes."""
        if not isinstance(error, pa.ArrowException) and not _is_of_parquet(error):
            return str(error)  # the storage's trouble
        try:
            size = int(self._info(path)["size"])
            with self._file(path).open() as file:
                begin = file.read(PEEK_BYTES)
        except read_errors():
            return str(error)
        kind = f"{_kind_of_file(begin)} ({size:,} bytes)"
        return f"{kind}: {first_line(error)}" if begin.startswith(MAGICS) else kind

    def read(self, span: Span, host_memory_bytes: int) -> Iterator[Request]:
        """The requests of a span in order: at least one per row, one for each of its prompts.

        Args:
            span: The rows to read.
            host_memory_bytes: Approximate limit of undecoded input in memory.

        Raises:
            ShardError: The file is missing, changed, or damaged.
        """
        path = self._listing.path(span.source)
        reading: _Reading | None = None
        try:
            self._check_unchanged(path, span)
            reading = self._resumed(span)
            if reading is None:
                opened = self._opened(path)
                columns = self._rows.columns
                reading = _Reading(opened, span, columns, host_memory_bytes)
            for row, record in reading.records(span.stop):
                yield from self._rows.requests(span.source, row, record)
            if reading.row < span.stop:
                raise ShardError(f"{span.source} ends at row {reading.row}, planned to {span.stop}")
            self._check_unchanged(path, span)  # or two files may have been read
            self._kept, reading = reading, None
        except (*read_errors(), *self._web_errors) as error:
            raise ShardError(f"{span.source}: {error}") from error
        finally:
            if reading is not None:
                reading.close()

    def _resumed(self, span: Span) -> _Reading | None:
        """The last reading, if the span continues it; otherwise that reading is closed."""
        kept, self._kept = self._kept, None
        if kept is None or kept.continues_with(span):
            return kept
        kept.close()
        return None

    def _opened(self, path: str) -> AbstractContextManager[RowFile]:
        """A file's rows; it is closed at the end.

        Raises:
            OSError, pa.ArrowException: It cannot be read.
            ConfigError: Files of its format cannot be read from such a storage.
        """
        return format_of(path).open_rows(self._file(path))

    def _file(self, path: str) -> InputFile:
        return InputFile(self._listing.filesystem, path, self._retry_policy)

    def _check_unchanged(self, path: str, span: Span) -> None:
        if self._fingerprint(path) != span.fingerprint:
            raise ShardError(f"{span.source} changed since the run was planned")

    def _fingerprint(self, path: str) -> str:
        """The storage's ETag; without one, size, time of change and a digest of the footer.

        A weak ETag is not enough: bytes may change while it stays the same.
        """
        info = self._info(path)
        tag = str(info.get("ETag") or "")
        if tag and not tag.startswith(WEAK):
            return f"etag:{tag}".replace('"', "")
        with self._file(path).open() as file:
            footer = format_of(path).read_end(file)
        changed = next((str(info[key]) for key in CHANGED if info.get(key)), "")
        version = f"{changed} {tag}".strip().replace('"', "")
        return f"size:{int(info['size'])} changed:{version} footer:{bytes_digest(footer)[:16]}"

    def _info(self, path: str) -> Mapping[str, Any]:
        """The storage's metadata of a file.

        Raises:
            OSError: There is no such file, or it can only be read from beginning to end.
        """
        filesystem = self._listing.filesystem
        info: Mapping[str, Any] = self._retry_policy.call(
            f"asking for {path}", lambda: filesystem.info(path)
        )
        if info.get("size") is None or info.get("partial") is False:
            raise OSError(
                errno.ESPIPE,
                "the server gives no size or serves no byte ranges, which Parquet needs; copy the "
                "file to a disk or a bucket",
                path,
            )
        return info


@dataclass(frozen=True)
class _Probed:
    """A file, those of its columns that are read, and the bytes of its largest row group."""

    file: SourceFile
    columns: pa.Schema
    largest_bytes: int


class _Reading:
    """A file that is read row by row.

    Args:
        opened: The file; closed by `close`.
        span: Where to begin, and which row groups to read to their end.
        columns: Names of the columns to read.
        host_memory_bytes: Approximate limit of what is in memory at a time.

    Attributes:
        row: Number of the next row.
        close: Closes the file.
    """

    def __init__(
        self,
        opened: AbstractContextManager[RowFile],
        span: Span,
        columns: tuple[str, ...],
        host_memory_bytes: int,
    ) -> None:
        self.row = span.first
        self._span = span
        self._rest: pa.RecordBatch | None = None
        with ExitStack() as stack:
            rows = stack.enter_context(opened)
            self._columns = _inside(rows, columns)
            from_folders = partition_values(span.source)
            self._spelled = {
                name: pa.scalar(from_folders.get(name), pa.string())
                for name in columns
                if name not in self._columns
            }
            self._batches = rows.batches(span.first, span.stop, self._columns, host_memory_bytes)
            ends = itertools.accumulate(rows.groups())
            self._end = next((end for end in ends if end >= span.stop), span.stop)
            self.close = stack.pop_all().close

    def continues_with(self, span: Span) -> bool:
        """Whether its next rows are those of a span, all of them."""
        same = (span.source, span.fingerprint) == (self._span.source, self._span.fingerprint)
        return same and span.first == self.row and span.stop <= self._end

    def records(self, stop: int) -> Iterator[tuple[int, dict[str, pa.Scalar]]]:
        """Rows with their numbers, up to `stop` or the end of the reading."""
        while self.row < stop and (batch := self._ahead()) is not None:
            taken = min(len(batch), stop - self.row)
            self._rest = batch.slice(taken)
            for index in range(taken):
                self.row += 1
                record = {name: batch.column(name)[index] for name in self._columns}
                yield self.row - 1, {**record, **self._spelled}

    def _ahead(self) -> pa.RecordBatch | None:
        """Rows from the next one on; None at the end of the reading."""
        while self._rest is None or not len(self._rest):
            start, batch = next(self._batches, (0, None))
            if batch is None:
                return None
            self._rest = batch.slice(min(len(batch), max(0, self.row - start)))
        return self._rest


def _inside(rows: RowFile, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that are in the file; the others come from its folders."""
    return tuple(name for name in columns if name in rows.schema.names)


def _is_of_parquet(error: Exception) -> bool:
    """Whether pyarrow's reader raised an error: it raises plain `OSError`, too."""
    return type(error) is OSError and error.errno is None


def _kind_of_file(begin: bytes) -> str:
    """What a file is, judged by its first bytes."""
    if not begin:
        return "it is empty"
    return next((kind for mark, kind in BEGINNINGS if begin.startswith(mark)), "no Parquet file")


def _check_keys(sources: Sequence[str]) -> None:
    """Refuse sources of which two rows could have the same key.

    Raises:
        ConfigError: The name of a source is also the key of another source's row or prompt.
    """
    names = {*sources}
    for source in sources:
        before, mark, number = source.rpartition("#")
        if mark and number.isdecimal() and before in names:
            raise ConfigError(
                f"{URI_KEY}: the name {source} is also the row_key of a row of {before}; rename "
                "one of the two files"
            )


def _warn_of_large_groups(probed: Sequence[_Probed]) -> None:
    large = [probe for probe in probed if probe.largest_bytes > LARGE_GROUP_BYTES]
    if large:
        worst = max(large, key=lambda probe: probe.largest_bytes)
        log.warning(
            "%d input files have row groups above %d MB (%s: %d MB): a worker that gets a later "
            "part of a row group reads it from its beginning; write row groups of a few MB",
            len(large),
            LARGE_GROUP_BYTES >> 20,
            worst.file.source,
            worst.largest_bytes >> 20,
        )
