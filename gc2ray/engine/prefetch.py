"""`Prefetcher`: work done ahead of need, in order, on threads.

One thread reads an iterator, which may block as long as it likes; some more work on what it yields;
the owner takes results in the order of the items, as many as are at hand, and waits only when it
has nothing else to do. How long it waited is counted: that is time in which it starved.

How far the threads run ahead is bounded, so that memory is. The owner may add items of its own,
which come before those that are still to be read.

Not covered: more than one owner; interrupting an item that is being worked on.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, ParamSpec, Self, TypeVar

S = TypeVar("S")
T = TypeVar("T")
P = ParamSpec("P")


class Inline(Executor):
    """An executor that works at once, on the thread that submits."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future that is done; what the work raises, its result raises."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asks for the result
            future.set_exception(error)
        return future


class Prefetcher(Generic[S, T]):
    """Results of `work` on `items`.

    Args:
        items: Read on a thread of its own; what it raises is raised where its result is taken.
        work: Called on several threads at a time.
        threads: How many.
        ahead: Items read and not yet taken, at most.

    Attributes:
        waited_ns: Time that the owner spent in `wait`.
    """

    def __init__(
        self, items: Iterable[S], work: Callable[[S], T], *, threads: int, ahead: int
    ) -> None:
        self._items, self._work = items, work
        self._pool = ThreadPoolExecutor(threads, "gc2ray-feed")
        self._room = threading.Semaphore(ahead)
        self._made: queue.SimpleQueue[Future[T] | None] = queue.SimpleQueue()
        self._next: Future[T] | None = None
        self._own: deque[Future[T]] = deque()
        self._closed = self._all_read = False
        self.waited_ns = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._read, daemon=True, name="gc2ray-read").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        self._room.release()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def ended(self) -> bool:
        """There is nothing more to come, unless the owner adds it."""
        return self._all_read and not self._own

    def add(self, item: S) -> None:
        """Work on an item of the owner's, too; nothing bounds how many there are."""
        self._own.append(self._pool.submit(self._work, item))

    def take(self) -> T | None:
        """The next result if it is at hand, else None; see `ended`."""
        if self._own and self._own[0].done():
            return self._own.popleft().result()
        if self._next is None and not self._made.empty():
            self._advance()
        if self._next is None or not self._next.done():
            return None
        result, self._next = self._next.result(), None
        self._room.release()
        return result

    def wait(self) -> None:
        """Wait until the next result is at hand, or there will be none."""
        started = time.perf_counter_ns()
        if self._next is None and not self._own and not self._all_read:
            self._advance()
        coming = self._own[0] if self._own else self._next
        if coming is not None:
            wait([coming])
        self.waited_ns += time.perf_counter_ns() - started

    def _advance(self) -> None:
        self._next = self._made.get()
        self._all_read = self._next is None

    def _read(self) -> None:
        """The reading thread: one item after the other, while there is room."""
        try:
            for item in self._items:
                self._room.acquire()
                if self._closed:
                    return
                self._made.put(self._pool.submit(self._work, item))
        except Exception as error:  # noqa: BLE001 - it belongs to the owner, who takes it
            failed: Future[T] = Future()
            failed.set_exception(error)
            self._made.put(failed)
        self._made.put(None)
