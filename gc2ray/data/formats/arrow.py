"""`ArrowRows`: an Arrow file on a local disk, as `datasets` saves them, mapped into memory.

Nothing is copied before a row is read. A record batch counts as a row group.

Not covered: Arrow files on remote storage, which would have to be read whole to find a row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from gc2ray.core.errors import ConfigError
from gc2ray.data.formats.base import InputFile, RowFormat
from gc2ray.data.input_entries import URI_KEY
from gc2ray.data.parquet_footer import Readable

END_BYTES = 64 << 10
MAGIC = b"ARROW1"
"""Files with an index begin so; streams, as `datasets` writes them, do not."""


class ArrowRows:
    """The rows of an Arrow file, streamed or with an index.

    Args:
        path: Path of the file on a local disk.

    Attributes:
        schema: The file's columns.

    Raises:
        OSError: There is no such file.
        pa.ArrowException: It is not an Arrow file.
    """

    def __init__(self, path: str) -> None:
        self._mapped = pa.memory_map(path, "rb")
        self._indexed = self._mapped.read(len(MAGIC)) == MAGIC
        self.schema = self._opened().schema

    def groups(self) -> tuple[int, ...]:
        """Rows of each record batch."""
        return tuple(len(batch) for batch in self._batches())

    def group_bytes(self, columns: Sequence[str]) -> tuple[int, ...]:
        """Bytes that some columns of each record batch have in the file."""
        return tuple(batch.select(list(columns)).nbytes for batch in self._batches())

    def batches(
        self,
        first: int,
        stop: int,
        columns: Sequence[str],
        host_memory_bytes: int,  # noqa: ARG002 - nothing is held
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """As `gc2ray.data.formats.base.RowFile.batches`; whole record batches."""
        row = 0
        for batch in self._batches():
            if row >= stop:
                return
            if row + len(batch) > first:
                yield row, batch.select(list(columns))
            row += len(batch)

    def _opened(self) -> pa.RecordBatchReader | pa.ipc.RecordBatchFileReader:
        self._mapped.seek(0)
        opened = pa.ipc.open_file if self._indexed else pa.ipc.open_stream
        return opened(self._mapped)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """All of them, from the first one on."""
        reader = self._opened()
        if self._indexed:
            yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            yield from reader


def read_end(handle: Readable) -> bytes:
    """The last bytes of a file, which say what it holds where there is no footer to read."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, size - END_BYTES))
    return handle.read()


@contextmanager
def open_rows(file: InputFile) -> Iterator[ArrowRows]:
    """The rows of a file; see `gc2ray.data.formats.base.RowFormat`.

    Raises:
        ConfigError: It is not on a local disk.
    """
    if not isinstance(file.filesystem, LocalFileSystem):
        raise ConfigError(
            f"{URI_KEY}: {file.path} is an Arrow file on remote storage, where single rows cannot "
            "be read; copy it to a local disk, or save it with dataset.to_parquet()"
        )
    yield ArrowRows(file.path)


FORMAT = RowFormat(open_rows, read_end)
