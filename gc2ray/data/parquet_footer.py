"""Parquet files of ours opened; and the end of any, enough for its metadata and its version."""

from __future__ import annotations

import os
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

MAGIC = b"PAR1"
TAIL_BYTES = 1 << 16
"""Read at first; a footer is smaller, as a rule."""
_LENGTH_AND_MAGIC_BYTES = 8


class Readable(Protocol):
    """What is needed of an open file."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to so many bytes from where it stands."""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a place; where that is."""


def open_parquet(file: Any, *, check_pages: bool = False) -> pq.ParquetFile:
    """An open file or a buffer, for whoever reads it on the thread that asks.

    That takes `use_threads=False` in each read, too: a thread of pyarrow that lets a Python buffer
    go while the interpreter ends aborts the process.

    Args:
        file: A file in binary mode, or what pyarrow takes for one.
        check_pages: Whether checksums of pages are looked at.
    """
    return pq.ParquetFile(file, page_checksum_verification=check_pages, pre_buffer=False)


def read_footer(handle: Readable) -> bytes:
    """The footer of an open file, with its length and the magic number behind it.

    Of a file that is no Parquet some of the end is returned.
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
    """What a footer says of its file.

    Raises:
        OSError, pa.ArrowException: It is no Parquet file's.
    """
    return pq.read_metadata(pa.BufferReader(MAGIC + footer))
