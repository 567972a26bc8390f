"""The interface of a format of input files: `RowFile`, an open file; `RowFormat`, which opens it.

A format is given an `InputFile`, so that it knows neither the input nor how its storage is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from gc2ray.data.parquet_footer import Readable
from gc2ray.data.remote_file import RetryingFile
from gc2ray.data.retries import RetryPolicy


class RowFile(Protocol):
    """The rows of an open file.

    Attributes:
        schema: The file's columns.
    """

    schema: pa.Schema

    def groups(self) -> tuple[int, ...]:
        """Rows of each row group."""

    def group_bytes(self, columns: Sequence[str]) -> tuple[int, ...]:
        """Bytes that some columns of each row group have in the file."""

    def batches(
        self, first: int, stop: int, columns: Sequence[str], host_memory_bytes: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches with their first row, from row `first` to the end of the row group of `stop`.

        Args:
            first: Number of the first row that is wanted.
            stop: Number of the row after the last one that is wanted.
            columns: Names of the columns that are wanted.
            host_memory_bytes: Approximate limit of what is in memory at a time.
        """


@dataclass(frozen=True)
class InputFile:
    """A file of an input, which is not open.

    Attributes:
        filesystem: The fsspec filesystem that it lies on.
        path: The file's path there.
        retry_policy: How long temporary trouble of the storage is waited out.
    """

    filesystem: Any
    path: str
    retry_policy: RetryPolicy

    def open(self, block_bytes: int | None = None) -> RetryingFile:
        """Open it to be read, in blocks of so many bytes if that is given.

        Raises:
            OSError: It cannot be opened.
        """
        return RetryingFile(self.filesystem, self.path, self.retry_policy, block_bytes)


@dataclass(frozen=True)
class RowFormat:
    """A format of input files.

    Attributes:
        open_rows: Opens a file and closes it at the end of a `with` block. It raises `OSError` or
            `pa.ArrowException` where the file cannot be read, and `ConfigError` where files of the
            format cannot be read from such a storage.
        read_end: Reads the last bytes of an open file; they differ where its rows differ.
    """

    open_rows: Callable[[InputFile], AbstractContextManager[RowFile]]
    read_end: Callable[[Readable], bytes]
