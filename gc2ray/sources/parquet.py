"""`ParquetRows`: an open Parquet file, of which small batches of some columns are read.

Never a whole row group is held. What a reader must hold is one page of each column and its
dictionary. Files with pages of about a megabyte cost little, whatever their row groups; pyarrow's
defaults put up to 1,024 values into a page and images into a dictionary, and cost as much as such a
page (measured: 411 MiB for a group of 300 MB of 100 KB images, 12 to 63 MiB with pages of 1 MB:
`write_batch_size=8, use_dictionary=False`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

MAX_BATCH_ROWS = 256
READ_BUFFER_BYTES = 1 << 20


class ParquetRows:
    """The rows of an open Parquet file.

    Args:
        handle: The file; whoever opened it closes it.

    Raises:
        pa.ArrowException: It is none.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        self._file = pq.ParquetFile(handle, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
        self._metadata = self._file.metadata

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return self._file.schema_arrow

    def groups(self) -> tuple[int, ...]:
        """Rows of each row group."""
        count = self._metadata.num_row_groups
        return tuple(self._metadata.row_group(index).num_rows for index in range(count))

    def group_bytes(self, columns: Sequence[str]) -> tuple[int, ...]:
        """Bytes that some columns of each row group have in the file."""
        count = self._metadata.num_row_groups
        return tuple(self._bytes(index, columns)[0] for index in range(count))

    def batches(
        self, first: int, stop: int, columns: Sequence[str], host_memory_bytes: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches with their first row, from row `first` to the end of the row group of `stop`.

        Args:
            first: A row.
            stop: The row after another one.
            columns: Those that are wanted.
            host_memory_bytes: About how much of them may be held at a time.
        """
        groups, row = self._holding(first, stop)
        found = self._file.iter_batches(
            batch_size=self._batch_rows(groups, columns, host_memory_bytes),
            row_groups=groups,
            columns=list(columns),
            use_threads=False,
        )
        for batch in found:
            yield row, batch
            row += len(batch)

    def _holding(self, first: int, stop: int) -> tuple[list[int], int]:
        """Row groups that hold some rows, and the first row of the first of them."""
        found: list[int] = []
        start, begin = 0, 0
        for index, rows in enumerate(self.groups()):
            if start < stop and start + rows > first:
                begin = begin if found else start
                found.append(index)
            start += rows
        return found, begin

    def _batch_rows(
        self, groups: Sequence[int], columns: Sequence[str], host_memory_bytes: int
    ) -> int:
        """Rows whose columns fill an eighth of the budget.

        Arrow holds two batches while one follows the other, its buffers grow by doubling, and
        Python and the engine hold copies of rows.
        """
        total = sum(self._bytes(index, columns)[1] for index in groups)
        rows = sum(self._metadata.row_group(index).num_rows for index in groups)
        per_row = max(1, total // max(1, rows))
        return int(max(1, min(MAX_BATCH_ROWS, host_memory_bytes // 8 // per_row)))

    def _bytes(self, index: int, columns: Sequence[str]) -> tuple[int, int]:
        """Of some columns of a row group: bytes in the file, and uncompressed."""
        group, stored, uncompressed = self._metadata.row_group(index), 0, 0
        for number in range(group.num_columns):
            chunk = group.column(number)
            path = chunk.path_in_schema
            if any(path == name or path.startswith(f"{name}.") for name in columns):
                stored += chunk.total_compressed_size
                uncompressed += chunk.total_uncompressed_size
        return stored, uncompressed
