"""`RetryingFile`: a file on any storage, whose reads wait out temporary trouble of the storage.

By default it uses the storage's own read-ahead, which suits a single read such as a footer. With
`block_bytes` it reads blocks and caches the last ones. That suits several positions that are read
in turn, such as the columns of a row group, where the read-ahead of s3fs would fetch 50 MB at each
change of position.

Not covered: writing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self, TypeVar

from gc2ray.data.retries import RetryPolicy

T = TypeVar("T")

BLOCKS = 8
"""Blocks that are cached: one for each column that is read, and some to spare."""


class RetryingFile:
    """An open file; a context manager.

    Args:
        filesystem: The fsspec filesystem.
        path: Path of the file on it.
        retry_policy: How long temporary trouble of the storage is waited out.
        block_bytes: Size of the blocks to read; None uses the storage's read-ahead.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(
        self, filesystem: Any, path: str, retry_policy: RetryPolicy, block_bytes: int | None = None
    ) -> None:
        self._what, self._retry_policy = f"reading {path}", retry_policy
        options: dict[str, Any] = {} if block_bytes is None else _in_blocks(block_bytes)
        self._file: Any = self._call(lambda: filesystem.open(path, "rb", **options))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._file.closed)

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes from the current position; all remaining bytes if negative.

        Raises:
            OSError: The storage refused, or stayed in trouble for too long.
        """
        before = self._file.tell()

        def read() -> bytes:
            self._file.seek(before)  # an earlier attempt may have moved on
            content: bytes = self._file.read(size)
            return content

        return self._call(read)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position and return it, counted from the beginning."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The current position, counted from the beginning."""
        return int(self._file.tell())

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, work: Callable[[], T]) -> T:
        return self._retry_policy.call(self._what, work)


def _in_blocks(block_bytes: int) -> dict[str, Any]:
    return {
        "block_size": block_bytes,
        "cache_type": "blockcache",
        "cache_options": {"maxblocks": BLOCKS},
    }
