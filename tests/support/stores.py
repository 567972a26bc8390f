"""Writers of one store at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

THREADS = 8


def race(work: Callable[[int], object]) -> list[object]:
    """The same work by several threads at the same moment."""
    barrier = threading.Barrier(THREADS)

    def start(number: int) -> object:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(start, range(THREADS)))
