"""`ParquetRows`: a Parquet file, of which small batches of some columns are read.

Never a whole row group is held. What a reader must hold is one page of each column and its
dictionary. Files with pages of about a megabyte cost little, whatever their row groups; pyarrow's
defaults put up to 1,024 values into a page and images into a dictionary, and cost as much as such a
page (measured: 411 MiB for a group of 300 MB of 100 KB images, 12 to 63 MiB with pages of 1 MB:
`write_batch_size=8, use_dictionary=False`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.data.formats.base import InputFile, RowFormat
from gc2ray.data.parquet_footer import parse_footer, read_footer
from gc2ray.data.remote_file import RetryingFile

MAX_BATCH_ROWS = 256
MIN_BLOCK_BYTES, MAX_BLOCK_BYTES = 256 << 10, 4 << 20
"""Fetched at a time from a storage: the most takes some tens of milliseconds, so that latency costs
little beside it."""
READ_BUFFER_BYTES = 1 << 20


class ParquetRows:
    """The rows of a Parquet file.

    Args:
        footer: The footer, as `gc2ray.data.parquet_footer.read_footer` reads it.
        opened: Opens the file, when rows are read, to be read in blocks of so many bytes; the
            caller closes it.

    Attributes:
        schema: The file's columns.

    Raises:
        OSError, pa.ArrowException: The footer is not that of a Parquet file.
    """

    def __init__(self, footer: bytes, opened: Callable[[int], RetryingFile]) -> None:
        self._opened = opened
        self._metadata = parse_footer(footer)
        self.schema: pa.Schema = self._metadata.schema.to_arrow_schema()

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
        """As `gc2ray.data.formats.base.RowFile.batches`."""
        groups, row = self._holding(first, stop)
        file = pq.ParquetFile(
            self._opened(self._block_bytes(groups, columns)),
            metadata=self._metadata,
            pre_buffer=False,
            buffer_size=READ_BUFFER_BYTES,
        )
        # Arrow cannot make one batch of two groups that have dictionaries in lists.
        alone = any(_holds_dictionaries(self.schema.field(name).type) for name in columns)
        for some in [[group] for group in groups] if alone else [groups]:
            batches = file.iter_batches(
                batch_size=self._batch_rows(groups, columns, host_memory_bytes),
                row_groups=some,
                columns=list(columns),
                use_threads=False,
            )
            for batch in batches:
                yield row, batch
                row += len(batch)

    def _holding(self, first: int, stop: int) -> tuple[list[int], int]:
        """Row groups that hold some rows, and the first row of the first of them."""
        indices: list[int] = []
        start, begin = 0, 0
        for index, rows in enumerate(self.groups()):
            if start < stop and start + rows > first:
                begin = begin if indices else start
                indices.append(index)
            start += rows
        return indices, begin

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

    def _block_bytes(self, groups: Sequence[int], columns: Sequence[str]) -> int:
        """Bytes that are fetched at a time: so few that what is fetched in vain costs little."""
        stored = sum(self._bytes(index, columns)[0] for index in groups)
        return max(MIN_BLOCK_BYTES, min(MAX_BLOCK_BYTES, stored // 8))

    def _bytes(self, index: int, columns: Sequence[str]) -> tuple[int, int]:
        """Bytes of some columns of a row group: in the file, and uncompressed."""
        group, stored, uncompressed = self._metadata.row_group(index), 0, 0
        for number in range(group.num_columns):
            chunk = group.column(number)
            path = chunk.path_in_schema
            if any(path == name or path.startswith(f"{name}.") for name in columns):
                stored += chunk.total_compressed_size
                uncompressed += chunk.total_uncompressed_size
        return stored, uncompressed


def _holds_dictionaries(kind: pa.DataType) -> bool:
    """Whether lists, structs and the like have dictionaries in them."""
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return any(pa.types.is_dictionary(item) or _holds_dictionaries(item) for item in inner)


@contextmanager
def open_rows(file: InputFile) -> Iterator[ParquetRows]:
    """The rows of a file; see `gc2ray.data.formats.base.RowFormat`."""
    with file.open() as handle:
        footer = read_footer(handle)
    with ExitStack() as stack:
        yield ParquetRows(footer, lambda block_bytes: stack.enter_context(file.open(block_bytes)))


FORMAT = RowFormat(open_rows, read_footer)
