"""`Journal`: which rows a worker has in hand; it outlives the worker, however the worker ends.

Each shard of the worker has a page: a file among the temporary files of the node, mapped into
memory. It holds a counter for each row, of its prompts that the engine has, and one that says
whether the shard was begun. Nothing is flushed: the pages belong to the kernel, so that they are
lost with the node, but not with the process. A page is written once before it is mapped, so that a
full disk is an error and not a signal.

Not covered: nodes that are lost; what the engine was doing with a row.
"""

from __future__ import annotations

import mmap
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from gc2ray.core.errors import EngineDead

PREFIX = "gc2ray-journal-"
STALE_SECONDS = 24 * 3600.0
"""Age at which files are deleted: nobody has read them since their process ended."""
_COUNTER = np.dtype(np.uint32)

InHand = Mapping[str, tuple[int, ...]]
"""Rows in hand by sid, numbered within the shard, from 0. A shard that was not begun has no rows; a
shard that was begun, and has no row in hand, is missing."""


class Page:
    """The counters of one shard."""

    def __init__(self, counters: mmap.mmap) -> None:
        self._counters = memoryview(counters).cast("I")

    def open(self) -> None:
        """Note that the shard is begun."""
        self._counters[-1] = 1

    def begin(self, row: int) -> None:
        """Note that a prompt of a row goes to the engine."""
        self._counters[row] += 1

    def end(self, row: int) -> None:
        """Note that a prompt of a row is answered."""
        self._counters[row] -= 1

    def close(self) -> None:
        """Release the memory."""
        self._counters.release()


class Journal:
    """The journal of one worker process.

    Args:
        folder: Where its files are; None means the node's folder for temporary files.

    Attributes:
        prefix: The beginning of their paths.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or Path(tempfile.gettempdir())
        _sweep(folder)
        self.prefix = folder / f"{PREFIX}{uuid.uuid4().hex}"

    @contextmanager
    def page(self, sid: str, rows: int) -> Iterator[Page]:
        """The page of a shard, while it is answered.

        If the engine dies, the page stays: it is read when the worker has ended.

        Raises:
            OSError: There is no room for it.
        """
        path = self.prefix.with_suffix(f".{sid}")
        with path.open("w+b") as file:
            try:
                file.write(bytes((rows + 1) * _COUNTER.itemsize))
                file.flush()
            except OSError:
                path.unlink()
                raise
            with mmap.mmap(file.fileno(), 0) as counters:
                page = Page(counters)
                is_over = True
                try:
                    yield page
                except EngineDead:
                    is_over = False
                    raise
                finally:
                    page.close()
                    if is_over:
                        path.unlink(missing_ok=True)  # it may have been cleaned up


def read_and_remove(prefix: Path) -> InHand:
    """The rows that the worker with this journal had in hand when it ended."""
    in_hand = {}
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        counters = np.fromfile(path, _COUNTER)
        rows = tuple(np.flatnonzero(counters[:-1]).tolist())
        if rows or not counters[-1:].any():
            in_hand[path.suffix[1:]] = rows
        path.unlink()
    return in_hand


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or gone meanwhile
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
