"""`ShardStream`: shards become one endless stream of requests, and answers return to their shards.

Three kinds of threads meet here: callers, each of which waits for its shard; the thread that reads
requests for the engine; and the engine's thread, which brings the answers.

The shards' pages of the journal name the rows that the engine has in hand. Rows with which an
earlier try died come first, few at a time; rows that are known to kill a worker are not tried.

Not covered: rows that kill the process while they are read from their file: they take their shard
with them.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from gc2ray.core.errors import EngineDead, ShardError
from gc2ray.core.records import Answer, Request
from gc2ray.core.shards import Span
from gc2ray.runner.journal import Page
from gc2ray.runner.messages import ShardAssignment

log = logging.getLogger(__name__)

StepHook = Callable[[str, str], None]
"""Called with a step of a shard (`read`, `answered`, `written`, `committed`) and its sid."""


@dataclass(eq=False)
class ShardWork:
    """A shard that is being answered.

    Attributes:
        assignment: The shard, and what earlier tries have shown.
        page: Its page of the journal.
        expected: Keys of the requests that were read.
        answers: Answers so far, by key.
        all_read: Whether the last request was read.
        done: Ends when every request is answered, or with the error that the shard failed with.
    """

    assignment: ShardAssignment
    page: Page
    expected: set[str] = field(default_factory=set)
    answers: dict[str, Answer] = field(default_factory=dict)
    all_read: bool = False
    done: Future[None] = field(default_factory=Future)

    @property
    def sid(self) -> str:
        return self.assignment.shard.sid

    @property
    def is_idle(self) -> bool:
        """Whether none of its requests is in hand, or the shard has ended."""
        return len(self.answers) == len(self.expected) or self.done.done()

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it has ended."""
        if not self.done.done():
            self.done.set_exception(error)


class ShardStream:
    """The shards of one worker, from assignment to last answer.

    Args:
        read: Reads the requests of a span.
        on_step: Called with `read` and `answered` of each shard.
    """

    def __init__(self, read: Callable[[Span], Iterator[Request]], on_step: StepHook) -> None:
        self._read = read
        self._on_step = on_step
        self._queue: queue.Queue[ShardWork] = queue.Queue()
        self._changed = threading.Condition()  # guards all of the following, and the shards
        self._open: list[ShardWork] = []  # begun, and not ended
        self._in_hand: dict[str, tuple[ShardWork, int | None]] = {}  # shard and row, by row key
        self._dead: EngineDead | None = None

    def submit(self, assignment: ShardAssignment, page: Page) -> ShardWork:
        """Append a shard to the stream."""
        work = ShardWork(assignment, page)
        with self._changed:
            if self._dead is None:
                self._queue.put(work)
            else:
                work.fail(self._dead)
        return work

    def close(self, error: EngineDead) -> None:
        """Fail every shard, now and from now on: there is no engine."""
        with self._changed:
            self._dead = error
            for work in self._open:
                work.fail(error)
            while not self._queue.empty():
                self._queue.get().fail(error)
            self._changed.notify_all()

    def requests(self) -> Iterator[Request]:
        """The requests of shard after shard, without end."""
        while True:
            work = self._queue.get()
            with self._changed:
                if self._dead is not None:
                    work.fail(self._dead)
                    return
                work.page.open()
                self._open.append(work)
            yield from self._requests_of(work)

    def accept(self, answer: Answer) -> None:
        """Return an answer to its shard; an answer for a shard that has failed is discarded."""
        key = answer.request.row_key
        with self._changed:
            work, row = self._in_hand.pop(key, (None, None))
            if work is None or work.done.done():
                return
            if row is not None:
                work.page.end(row)
            if answer.is_retryable:
                self._fail(work, ShardError(f"{key}: {answer.error}"))
                return
            work.answers[key] = answer
            if work.is_idle:
                self._finish_if_answered(work)
                self._changed.notify_all()

    def _requests_of(self, work: ShardWork) -> Iterator[Request]:
        try:
            groups = list(work.assignment.suspect_groups())
            yield from self._suspects(work, groups)
            suspects = {row for group in groups for row in group}
            for row, request in self._numbered(work.assignment):
                if row not in suspects:
                    begun = self._begin(work, row, request)
                    if begun is None:
                        return
                    yield begun
        except ShardError as error:
            with self._changed:
                self._fail(work, error)
            log.warning("%s", error, extra={"shard": work.sid})
            return
        self._on_step("read", work.sid)
        with self._changed:
            work.all_read = True
            self._finish_if_answered(work)

    def _suspects(self, work: ShardWork, groups: Sequence[Sequence[int]]) -> Iterator[Request]:
        """Rows with which an earlier try died: a group once the one before it is answered."""
        group_of = {row: number for number, group in enumerate(groups) for row in group}
        current = 0
        for row, request in self._numbered(work.assignment) if group_of else ():
            number = group_of.get(row, current)
            if number != current:
                self._wait_until_idle(work)
                current = number
            begun = self._begin(work, row, request) if row in group_of else None
            if begun is not None:
                yield begun
        self._wait_until_idle(work)

    def _wait_until_idle(self, work: ShardWork) -> None:
        with self._changed:
            self._changed.wait_for(lambda: work.is_idle)

    def _begin(self, work: ShardWork, row: int, request: Request) -> Request | None:
        """Note that a request goes to the engine; None if its shard has failed meanwhile.

        A request that is known to have no answer is not noted in the journal: its row cannot be
        what kills the process.

        Raises:
            ShardError: The request was read before.
        """
        poison = work.assignment.skip_reason(row)
        if poison is not None:
            request = replace(request, images=(), prompts=(), fault=poison)
        key = request.row_key
        with self._changed:
            if work.done.done():
                return None
            if key in work.expected:
                raise ShardError(f"{key} was read twice")
            work.expected.add(key)
            if request.fault is None:
                work.page.begin(row)
            self._in_hand[key] = (work, row if request.fault is None else None)
        return request

    def _numbered(self, assignment: ShardAssignment) -> Iterator[tuple[int, Request]]:
        """The requests of a shard, each with the place of its row in the shard.

        Raises:
            ShardError: A row was read that is not planned.
        """
        before = 0
        for span in assignment.shard.spans:
            for request in self._read(span):
                if not span.first <= request.row < span.stop:
                    raise ShardError(f"{request.row_key} was read, but is not planned")
                yield before + request.row - span.first, request
            before += span.rows

    def _fail(self, work: ShardWork, error: ShardError) -> None:
        if work in self._open:
            self._open.remove(work)
        work.fail(error)
        self._changed.notify_all()

    def _finish_if_answered(self, work: ShardWork) -> None:
        if work in self._open and work.all_read and work.is_idle:
            self._open.remove(work)
            self._on_step("answered", work.sid)
            work.done.set_result(None)
