"""`Prefetcher`: work done ahead of time, in order, on threads.

One thread reads an iterator, which may block for any time; several more process its items. The
owner takes results in the order of the items, as far as they are ready, and waits only when it has
nothing else to do. The time that it waited is counted.

The number of items read ahead is bounded, and memory with it. The owner may add items of its own,
whose results come before those of items still to be read.

Not covered: more than one owner; interrupting an item that is being processed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Generic, ParamSpec, Self, TypeVar

S = TypeVar("S")
T = TypeVar("T")
P = ParamSpec("P")


class InlineExecutor(Executor):
    """An executor that runs work at once, on the thread that submits it."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future that is done; its result raises the error of the work."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - raised where the result is read
            future.set_exception(error)
        return future


class Prefetcher(Generic[S, T]):
    """Results of `work` on `items`; threads run within its `with`.

    Args:
        items: Read on a thread of its own; an error of it is raised by `take`.
        work: Called on several threads at a time.
        threads: Number of threads that call `work`.
        ahead: Most items that are read and not yet taken.

    Attributes:
        waited_ns: Time that the owner spent in `wait`.
    """

    def __init__(
        self, items: Iterable[S], work: Callable[[S], T], *, threads: int, ahead: int
    ) -> None:
        self._items, self._work = items, work
        self._executor = ThreadPoolExecutor(threads, "gc2ray-prefetch")
        self._capacity = threading.Semaphore(ahead)
        self._futures: queue.SimpleQueue[Future[T] | None] = queue.SimpleQueue()
        self._next: Future[T] | None = None
        self._own: deque[Future[T]] = deque()
        self._closed = self._all_read = False
        self.waited_ns = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._read, daemon=True, name="gc2ray-read").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._capacity.release()
        self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def ended(self) -> bool:
        """Whether all results were taken, unless the owner adds an item."""
        return self._all_read and not self._own

    def add(self, item: S) -> None:
        """Process an item of the owner, too; their number is not bounded."""
        self._own.append(self._executor.submit(self._work, item))

    def take(self) -> T | None:
        """The next result if it is ready, else None; see `ended`."""
        if self._own and self._own[0].done():
            return self._own.popleft().result()
        if self._next is None and not self._futures.empty():
            self._advance()
        if self._next is None or not self._next.done():
            return None
        result, self._next = self._next.result(), None
        self._capacity.release()
        return result

    def wait(self) -> None:
        """Wait until the next result is ready, or all were taken."""
        started = time.perf_counter_ns()
        if self._next is None and not self._own and not self._all_read:
            self._advance()
        future = self._own[0] if self._own else self._next
        if future is not None:
            wait([future])
        self.waited_ns += time.perf_counter_ns() - started

    def _advance(self) -> None:
        self._next = self._futures.get()
        self._all_read = self._next is None

    def _read(self) -> None:
        """The reading thread: read one item after the other, `ahead` of them at most."""
        try:
            for item in self._items:
                self._capacity.acquire()
                if self._closed:
                    return
                self._futures.put(self._executor.submit(self._work, item))
        except Exception as error:  # noqa: BLE001 - raised where the owner takes it
            failed: Future[T] = Future()
            failed.set_exception(error)
            self._futures.put(failed)
        self._futures.put(None)
