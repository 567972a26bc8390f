"""`Source`: the input of a recipe, planned by its footers and read span by span.

Planning lists once and reads footers only. A file that changed since it was planned is an error,
not a mixture. A span that begins where the one before it ended is read on from there, so that a row
group that is cut into many shards is read once, if the same worker has them.

Not covered: reading from several threads at a time.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from gc2ray.core.config.input import InputConfig
from gc2ray.core.errors import ConfigError, ShardError, first_line, storage_errors
from gc2ray.core.records import Request
from gc2ray.core.shards import SourceFile, Span, digest
from gc2ray.data.formats.arrow import ArrowRows
from gc2ray.data.formats.parquet import ParquetRows
from gc2ray.data.listing import Listing, partition_types, partition_values
from gc2ray.data.parquet_footer import Readable, read_footer
from gc2ray.data.places import ARROW, URI_KEY, is_web
from gc2ray.data.remote_file import RetryingFile
from gc2ray.data.retries import RETRY_POLICY, RetryPolicy
from gc2ray.data.rows import RowReader

FOOTER_THREADS = 16
LARGE_GROUP_BYTES = 256 << 20
END_BYTES = 64 << 10
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
"""What storages call the time of a change, or tell in its place."""
WEAK = "W/"
OF_AN_OUTPUT = re.compile(r"(^|/)(plan/\d{4}|data/part-\d{7}-[0-9a-f]{16})\.parquet$")

log = logging.getLogger(__name__)


def read_errors() -> tuple[type[Exception], ...]:
    """The exception types that reading an input file raises, for an `except` clause."""
    return (*storage_errors(), pa.ArrowException)


class Source:
    """The input of a recipe.

    Args:
        config: Where it is and which columns it has.
        retry_policy: With a storage in trouble.
    """

    def __init__(self, config: InputConfig, retry_policy: RetryPolicy = RETRY_POLICY) -> None:
        self.config = config
        self._retry_policy = retry_policy
        self._rows = RowReader(config)
        self._kept: _Reading | None = None

    @cached_property
    def _listing(self) -> Listing:
        """Where the input is: asking which entries are files costs a call each."""
        return Listing.from_uris(self.config.uris(), self._retry_policy)

    def scan(self) -> tuple[list[SourceFile], pa.Schema]:
        """Every file in order, and the schema of the columns that are written back.

        Raises:
            ConfigError: There are no files, one cannot be read, or columns are missing.
        """
        with self._listing.listed() as found:
            if not found:
                raise ConfigError(
                    f"{URI_KEY}: no Parquet files at {', '.join(self.config.uris())}"
                    f"{self._listing.missing()}"
                )
            looked = self._looked(found)
        _check_keys([file.file.source for file in looked])
        _warn_of_large_groups(looked)
        columns = [(file.file.source, file.columns) for file in looked]
        return [file.file for file in looked], self._rows.carried(columns)

    def apart(self, files: Sequence[SourceFile], planned: Collection[str]) -> list[SourceFile]:
        """Files without those that are planned under another name."""
        paths = {self._listing.path(file.source): file for file in files}
        new = {*self._listing.others(list(paths), planned)}
        return [file for path, file in paths.items() if path in new or file.source in planned]

    def unplanned(self, planned: Collection[str]) -> list[str]:
        """Sources that have rows, or cannot be read, and are not among some.

        Raises:
            ConfigError: The storage does not answer.
        """
        with self._listing.listed() as found:
            new = self._listing.others(found, planned)
            with ThreadPoolExecutor(FOOTER_THREADS, "gc2ray-footer") as pool:
                found = list(itertools.compress(new, pool.map(self._may_have_rows, new)))
        return [self._listing.source(path) for path in found]

    def would_take(self, folder: str, names: Sequence[str]) -> bool:
        """Whether one of some files would be input, if it were there.

        Args:
            folder: That they are below: local path, or any fsspec URL.
            names: Theirs, below that.

        Raises:
            ConfigError: The input's storage does not answer.
        """
        return self._listing.would_take(folder, names)

    def _may_have_rows(self, path: str) -> bool:
        try:
            with self._opened(path) as rows:
                return sum(rows.groups()) > 0
        except read_errors():
            return True

    def _looked(self, paths: Sequence[str]) -> list[_Probed]:
        """A look at every file, and at the first one first: what is wrong is so in all, as a rule.

        Raises:
            ConfigError: One cannot be read, or has not the columns.
        """
        folders = partition_types(partition_values(self._listing.source(path)) for path in paths)
        first = self._look(paths[0], folders)
        with ThreadPoolExecutor(FOOTER_THREADS, "gc2ray-footer") as pool:
            return [first, *pool.map(lambda path: self._look(path, folders), paths[1:])]

    def _look(self, path: str, folders: Mapping[str, pa.DataType]) -> _Probed:
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
            told = self._diagnosis(path, error)
            raise ConfigError(f"{URI_KEY}: {source} cannot be read: {told}") from error

    @cached_property
    def _web_errors(self) -> tuple[type[Exception], ...]:
        """What the web's filesystem raises, too, of servers that serve no ranges."""
        return (ValueError,) if is_web(self._listing.filesystem) else ()

    def _checked(
        self, schema: pa.Schema, source: str, folders: Mapping[str, pa.DataType]
    ) -> pa.Schema:
        """As `RowReader.check`; of what looks like an output's own file that is said."""
        try:
            return self._rows.check(schema, source, folders)
        except ConfigError as error:
            if not OF_AN_OUTPUT.search(source):
                raise
            raise ConfigError(
                f"{URI_KEY}: {source} seems to be of an output of gc2ray that lies in the input; "
                "move that output, or name the input's own files by a pattern"
            ) from error

    def _diagnosis(self, path: str, error: Exception) -> str:
        """What a file is that cannot be read, as far as its size and beginning tell."""
        if not isinstance(error, pa.ArrowException) and not _is_of_parquet(error):
            return str(error)  # the storage's trouble
        try:
            size = int(self._info(path)["size"])
            with self._file(path) as file:
                begin = file.read(PEEK_BYTES)
        except read_errors():
            return str(error)
        told = f"{_what_begins(begin)} ({size:,} bytes)"
        return f"{told}: {first_line(error)}" if begin.startswith(MAGICS) else told

    def read(self, span: Span, host_memory_bytes: int) -> Iterator[Request]:
        """The requests of a span in order: at least one per row, one for each of its prompts.

        Args:
            span: What to read.
            host_memory_bytes: About how much undecoded input may be held at a time.

        Raises:
            ShardError: The file is gone, changed, or damaged.
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
        """What was read last, if the span goes on there; otherwise it is closed."""
        kept, self._kept = self._kept, None
        if kept is None or kept.goes_on_with(span):
            return kept
        kept.close()
        return None

    @contextmanager
    def _opened(self, path: str) -> Iterator[ParquetRows | ArrowRows]:
        """A file's rows; it is closed at the end.

        Raises:
            OSError, pa.ArrowException: It cannot be read.
            ConfigError: It is an Arrow file elsewhere than on a local disk.
        """
        filesystem = self._listing.filesystem
        if not path.endswith(ARROW):
            with self._file(path) as file:
                footer = read_footer(file)
            with ExitStack() as stack:
                yield ParquetRows(
                    footer, lambda block_bytes: stack.enter_context(self._file(path, block_bytes))
                )
        elif isinstance(filesystem, LocalFileSystem):
            yield ArrowRows(path)
        else:
            raise ConfigError(
                f"recipe.input.uri: {path} is an Arrow file on remote storage, which cannot be "
                "read by rows; copy it to a local disk, or save it with dataset.to_parquet()"
            )

    def _file(self, path: str, block_bytes: int | None = None) -> RetryingFile:
        return RetryingFile(self._listing.filesystem, path, self._retry_policy, block_bytes)

    def _check_unchanged(self, path: str, span: Span) -> None:
        if self._fingerprint(path) != span.fingerprint:
            raise ShardError(f"{span.source} changed since the run was planned")

    def _fingerprint(self, path: str) -> str:
        """The store's ETag; without one, size, time of change and a digest of the footer.

        A weak ETag alone will not do: bytes may change under it.
        """
        info = self._info(path)
        tag = str(info.get("ETag") or "")
        if tag and not tag.startswith(WEAK):
            return f"etag:{tag}".replace('"', "")
        with self._file(path) as file:
            footer = digest(_end(file) if path.endswith(ARROW) else read_footer(file))[:16]
        changed = next((str(info[key]) for key in CHANGED if info.get(key)), "")
        told = f"{changed} {tag}".strip().replace('"', "")
        return f"size:{int(info['size'])} changed:{told} footer:{footer}"

    def _info(self, path: str) -> Mapping[str, Any]:
        """What the storage says of a file.

        Raises:
            OSError: There is none, or it cannot be read but from its beginning to its end.
        """
        filesystem = self._listing.filesystem
        info: Mapping[str, Any] = self._retry_policy.call(
            f"asking for {path}", lambda: filesystem.info(path)
        )
        if info.get("size") is None or info.get("partial") is False:
            raise OSError(
                errno.ESPIPE,
                "the server gives no size or serves no ranges, which Parquet needs; copy the file "
                "to a disk or a bucket",
                path,
            )
        return info


@dataclass(frozen=True)
class _Probed:
    """A file, the columns of it that are read, and the bytes of its largest row group."""

    file: SourceFile
    columns: pa.Schema
    largest_bytes: int


class _Reading:
    """A file that is being read, row after row.

    Args:
        opened: The file; closed by `close`.
        span: Where to begin, and which row groups to read to their end.
        columns: Those that are wanted.
        host_memory_bytes: About how much of them may be held at a time.

    Attributes:
        row: The next one.
        close: Lets go of the file.
    """

    def __init__(
        self,
        opened: AbstractContextManager[ParquetRows | ArrowRows],
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
            said = partition_values(span.source)
            self._said = {
                name: pa.scalar(said.get(name), pa.string())
                for name in columns
                if name not in self._columns
            }
            self._batches = rows.batches(span.first, span.stop, self._columns, host_memory_bytes)
            ends = itertools.accumulate(rows.groups())
            self._end = next((end for end in ends if end >= span.stop), span.stop)
            self.close = stack.pop_all().close

    def goes_on_with(self, span: Span) -> bool:
        """Whether its next rows are those of a span, to the last one."""
        same = (span.source, span.fingerprint) == (self._span.source, self._span.fingerprint)
        return same and span.first == self.row and span.stop <= self._end

    def records(self, stop: int) -> Iterator[tuple[int, dict[str, pa.Scalar]]]:
        """Rows with their numbers, up to `stop` or the end of what is at hand."""
        while self.row < stop and (batch := self._ahead()) is not None:
            taken = min(len(batch), stop - self.row)
            self._rest = batch.slice(taken)
            for index in range(taken):
                self.row += 1
                record = {name: batch.column(name)[index] for name in self._columns}
                yield self.row - 1, {**record, **self._said}

    def _ahead(self) -> pa.RecordBatch | None:
        """Rows from the next one on; None if none is at hand."""
        while self._rest is None or not len(self._rest):
            start, batch = next(self._batches, (0, None))
            if batch is None:
                return None
            self._rest = batch.slice(min(len(batch), max(0, self.row - start)))
        return self._rest


def _inside(rows: ParquetRows | ArrowRows, columns: Sequence[str]) -> tuple[str, ...]:
    """Those of some columns that are in a file; folders spell out the others."""
    return tuple(name for name in columns if name in rows.schema.names)


def _is_of_parquet(error: Exception) -> bool:
    """Whether an error is of pyarrow's reader, which raises plain ones, too."""
    return type(error) is OSError and error.errno is None


def _what_begins(begin: bytes) -> str:
    """What a file is that begins so."""
    if not begin:
        return "it is empty"
    return next((told for mark, told in BEGINNINGS if begin.startswith(mark)), "no Parquet file")


def _check_keys(sources: Sequence[str]) -> None:
    """Refuse sources of which two rows could have one key.

    Raises:
        ConfigError: One is called as another's row or prompt is.
    """
    known = {*sources}
    for source in sources:
        before, mark, number = source.rpartition("#")
        if mark and number.isdecimal() and before in known:
            raise ConfigError(
                f"{URI_KEY}: {source} is called as a row of {before} is, so that their answers "
                "would have the same row_key; rename one of them"
            )


def _warn_of_large_groups(looked: Sequence[_Probed]) -> None:
    large = [file for file in looked if file.largest_bytes > LARGE_GROUP_BYTES]
    if large:
        worst = max(large, key=lambda file: file.largest_bytes)
        log.warning(
            "%d input files have row groups above %d MB (%s: %d MB): a worker that gets a later "
            "part of one reads it from its beginning; groups of some MB can be shared out",
            len(large),
            LARGE_GROUP_BYTES >> 20,
            worst.file.source,
            worst.largest_bytes >> 20,
        )


def _end(handle: Readable) -> bytes:
    """The end of a file that has no footer."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, size - END_BYTES))
    return handle.read()
