"""`Journal`: which rows a worker has in hand; it outlives the worker, however that ends.

A file for each of its shards among the temporary files of its node, mapped into memory: a counter
per row, of its prompts that the engine has, and one that says if the shard was begun. Nothing is
flushed, because the pages belong to the kernel: they are lost with the node, not with the process.
They are written once before they are mapped, so that a full disk is an error and not a signal.

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
"""Files of that age are of processes that nobody asked about."""
_COUNTER = np.dtype(np.uint32)

InHand = Mapping[str, tuple[int, ...]]
"""Rows by shard: sid to places in the shard, from 0. A shard that was not begun has none; one that
was, and has none in hand, is left out."""


class Page:
    """The counters of one shard."""

    def __init__(self, counters: mmap.mmap) -> None:
        self._counters = memoryview(counters).cast("I")

    def open(self) -> None:
        """The shard is begun."""
        self._counters[-1] = 1

    def begin(self, row: int) -> None:
        """A prompt of a row goes to the engine."""
        self._counters[row] += 1

    def end(self, row: int) -> None:
        """It is answered."""
        self._counters[row] -= 1

    def close(self) -> None:
        """Let go of the memory."""
        self._counters.release()


class Journal:
    """The journal of one worker process.

    Args:
        folder: Where its files are; None is the node's place for temporary files.

    Attributes:
        prefix: What their paths begin with.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or Path(tempfile.gettempdir())
        _sweep(folder)
        self.prefix = folder / f"{PREFIX}{uuid.uuid4().hex}"

    @contextmanager
    def page(self, sid: str, rows: int) -> Iterator[Page]:
        """The page of a shard, while it is answered.

        If the engine dies it stays: whoever buries the worker reads it.

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
                        path.unlink(missing_ok=True)  # somebody may clean up there


def taken_over(prefix: Path) -> InHand:
    """What the worker with this journal had in hand when it ended; the journal is removed."""
    found = {}
    for path in prefix.parent.glob(f"{prefix.name}.*"):
        counters = np.fromfile(path, _COUNTER)
        rows = tuple(np.flatnonzero(counters[:-1]).tolist())
        if rows or not counters[-1:].any():
            found[path.suffix[1:]] = rows
        path.unlink()
    return found


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # somebody else's, or gone meanwhile
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
