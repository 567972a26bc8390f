"""`RetryingFile`: a file on any storage, whose reads wait where the storage is in trouble.

Two ways of reading. With the storage's own read-ahead, which suits one look at one place, a footer
say. In blocks, of which the last ones are kept: that suits several places that are read in turn, as
the columns of a row group are, where the read-ahead of s3fs would fetch 50 MB anew at each change
of place.

Not covered: writing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Self, TypeVar

from gc2ray.data.retries import RetryPolicy

T = TypeVar("T")

BLOCKS = 8
"""Kept: one for each column that is read, and some to spare."""


class RetryingFile:
    """An open file; a context manager.

    Args:
        filesystem: Where it is, by fsspec.
        path: Of it, there.
        retry_policy: With the storage.
        block_bytes: Of the blocks in which it is read; None: with the storage's read-ahead.

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
        """Up to so many bytes from where it stands; all that follow where negative.

        Raises:
            OSError: They cannot be read, or could not for too long.
        """
        before = self._file.tell()

        def read() -> bytes:
            self._file.seek(before)  # where an earlier try of this very call has begun, too
            content: bytes = self._file.read(size)
            return content

        return self._call(read)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; where that is, from the beginning."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """Where it stands, from the beginning."""
        return int(self._file.tell())

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Let go of it."""
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
