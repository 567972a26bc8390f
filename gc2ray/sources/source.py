"""`Source`: the input of a recipe, planned by its footers and read span by span.

Planning lists once and reads footers only. A file that changed since it was planned is an error,
not a mixture. A span that begins where the one before it ended is read on from there, so that a row
group that is cut into many shards is read once, if the same worker has them.

Not covered: reading from several threads at a time.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from gc2ray.config import InputConfig
from gc2ray.errors import STORAGE_ERRORS, ConfigError, ShardError
from gc2ray.footer import Readable, read_footer
from gc2ray.patience import PATIENCE, Patience
from gc2ray.patient_file import PatientFile
from gc2ray.records import Request
from gc2ray.shards import SourceFile, Span, digest
from gc2ray.sources.arrow import ArrowRows
from gc2ray.sources.listing import ARROW, Listing
from gc2ray.sources.parquet import ParquetRows
from gc2ray.sources.row_reader import RowReader

FOOTER_THREADS = 16
LARGE_GROUP_BYTES = 256 << 20
END_BYTES = 64 << 10
READ_ERRORS: tuple[type[Exception], ...] = (*STORAGE_ERRORS, pa.ArrowException)

log = logging.getLogger(__name__)


class Source:
    """The input of a recipe.

    Args:
        config: Where it is and which columns it has.
        patience: With a storage in trouble.
    """

    def __init__(self, config: InputConfig, patience: Patience = PATIENCE) -> None:
        self.config = config
        self._patience = patience
        self._rows = RowReader(config)
        self._kept: _Reading | None = None

    @cached_property
    def _listing(self) -> Listing:
        """Where the input is: asking which entries are files costs a call each."""
        return Listing.of(self.config.uris(), self._patience)

    def scan(self) -> tuple[list[SourceFile], pa.Schema]:
        """Every file in order, and the schema of the columns that are written back.

        Raises:
            ConfigError: There are no files, one cannot be read, or columns are missing.
        """
        with self._listing.listed() as found:
            if not found:
                raise ConfigError(
                    f"recipe.input.uri: no Parquet files at {', '.join(self.config.uris())}"
                )
            try:
                with self._opened(found[0]) as rows:
                    schema = self._rows.check(rows.schema)
            except READ_ERRORS as error:
                raise ConfigError(
                    f"recipe.input.uri: {found[0]} cannot be read: {error}"
                ) from error
            looked = self._looked(found, schema)
        _warn_of_large_groups(looked)
        return [file.file for file in looked], self._rows.carried(schema)

    def _looked(self, paths: Sequence[str], schema: pa.Schema) -> list[_Looked]:
        """A look at every file.

        Args:
            paths: Of them.
            schema: Of the first one's columns.

        Raises:
            ConfigError: One cannot be read, or has other columns.
        """

        def look(path: str) -> _Looked:
            source = self._listing.source(path)
            with self._opened(path) as rows:
                self._rows.check_same(schema, rows.schema, source)
                largest = max(rows.group_bytes(self._rows.columns), default=0)
                return _Looked(SourceFile(source, self._fingerprint(path), rows.groups()), largest)

        try:
            with ThreadPoolExecutor(FOOTER_THREADS, "gc2ray-footer") as pool:
                return list(pool.map(look, paths))
        except READ_ERRORS as error:
            raise ConfigError(f"recipe.input.uri: an input file cannot be read: {error}") from error

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
                reading = _Reading(opened, span, self._rows.columns, host_memory_bytes)
            for row, record in reading.records(span.stop):
                yield from self._rows.requests(span.source, row, record)
            if reading.row < span.stop:
                raise ShardError(f"{span.source} ends at row {reading.row}, planned to {span.stop}")
            self._check_unchanged(path, span)  # or two files may have been read
            self._kept, reading = reading, None
        except READ_ERRORS as error:
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

    def _file(self, path: str, block_bytes: int | None = None) -> PatientFile:
        return PatientFile(self._listing.filesystem, path, self._patience, block_bytes)

    def _check_unchanged(self, path: str, span: Span) -> None:
        if self._fingerprint(path) != span.fingerprint:
            raise ShardError(f"{span.source} changed since the run was planned")

    def _fingerprint(self, path: str) -> str:
        """The store's ETag; without one, size, time of change and a digest of the footer."""
        filesystem = self._listing.filesystem
        info = self._patience.call(f"asking for {path}", lambda: filesystem.info(path))
        if info.get("ETag"):
            return f"etag:{info['ETag']}".replace('"', "")
        with self._file(path) as file:
            footer = digest(_end(file) if path.endswith(ARROW) else read_footer(file))[:16]
        changed = info.get("mtime") or info.get("LastModified") or info.get("created") or ""
        return f"size:{int(info['size'])} changed:{changed} footer:{footer}"


@dataclass(frozen=True)
class _Looked:
    """A file, and the bytes of its largest row group."""

    file: SourceFile
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
        self._span, self._columns = span, columns
        self._rest: pa.RecordBatch | None = None
        with ExitStack() as stack:
            rows = stack.enter_context(opened)
            self._batches = rows.batches(span.first, span.stop, columns, host_memory_bytes)
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
                yield self.row - 1, {name: batch.column(name)[index] for name in self._columns}

    def _ahead(self) -> pa.RecordBatch | None:
        """Rows from the next one on; None if none is at hand."""
        while self._rest is None or not len(self._rest):
            start, batch = next(self._batches, (0, None))
            if batch is None:
                return None
            self._rest = batch.slice(min(len(batch), max(0, self.row - start)))
        return self._rest


def _warn_of_large_groups(looked: Sequence[_Looked]) -> None:
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
