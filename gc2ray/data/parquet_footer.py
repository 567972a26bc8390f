"""Opens Parquet files, and reads the footer of any: its metadata and its version."""

from __future__ import annotations

import os
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

MAGIC = b"PAR1"
TAIL_BYTES = 1 << 16
"""Bytes that are read first; most footers are smaller."""
FOOTER_THREADS = 16
"""Threads that read footers: they wait for the storage most of the time."""
_LENGTH_AND_MAGIC_BYTES = 8


class Readable(Protocol):
    """The methods that an open file must have."""

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes from the current position."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a position and return it."""


def open_parquet(file: Any, *, check_pages: bool = False) -> pq.ParquetFile:
    """A Parquet file that is read on the calling thread.

    Each read must also pass `use_threads=False`: if a thread of pyarrow releases a Python buffer
    while the interpreter shuts down, the process aborts.

    Args:
        file: A file in binary mode, or another object that pyarrow accepts.
        check_pages: Whether the checksums of pages are verified.
    """
    return pq.ParquetFile(file, page_checksum_verification=check_pages, pre_buffer=False)


def read_footer(handle: Readable) -> bytes:
    """The footer of an open file, with its length and the magic number after it.

    If the file is not Parquet, the result is some bytes from its end.
    """
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, size - TAIL_BYTES))
    tail = handle.read()
    length = int.from_bytes(tail[-_LENGTH_AND_MAGIC_BYTES:-4], "little") + _LENGTH_AND_MAGIC_BYTES
    if len(tail) < length <= size:
        handle.seek(size - length)
        tail = handle.read()
    return tail[-length:]


def parse_footer(footer: bytes) -> pq.FileMetaData:
    """The metadata in a footer.

    Raises:
        OSError, pa.ArrowException: It is not the footer of a Parquet file.
    """
    return pq.read_metadata(pa.BufferReader(MAGIC + footer))
