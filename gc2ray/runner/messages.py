"""Messages between the driver and its workers: assignments, results, progress and events.

The driver reaches its workers through a `WorkerPool`. A pool starts workers, gives them work and
reports events; it decides nothing. `RayPool` is the real one; tests have one with its own clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import NamedTuple, Protocol

from gc2ray.core.errors import BadRow, Status
from gc2ray.core.records import Answer
from gc2ray.core.shards import Shard, Span
from gc2ray.core.stats import RunStats
from gc2ray.output.parts import Commit
from gc2ray.output.planner import FIRST_ERRORS
from gc2ray.runner.journal import InHand

GROUPED_FROM = 32
"""With more suspects than this, groups of them are answered first: one alone takes as long as a
batch."""

_KILLED = {
    Status.KILLED_WORKER: "two worker processes died while they answered this row alone",
    Status.TIMEOUT: "two workers gave no answer while they answered this row alone",
}


class PoisonRow(NamedTuple):
    """A row that kills or hangs its worker: the status of its answer, and how the worker ended."""

    status: Status
    reason: str


@dataclass(frozen=True)
class ShardAssignment:
    """A shard to answer, with what earlier tries have shown.

    Rows are numbered within the shard, from 0.

    Attributes:
        shard: The shard.
        attempt: Number of the try, from 1.
        suspects: Rows that the worker had in hand when an earlier try died, in order. They are
            answered first, few at a time, so that another death narrows them down.
        poison: Rows that are known to kill or hang a worker; they are not tried.
    """

    shard: Shard
    attempt: int = 1
    suspects: tuple[int, ...] = ()
    poison: Mapping[int, PoisonRow] = field(default_factory=dict)

    def suspect_groups(self) -> Iterator[tuple[int, ...]]:
        """The suspects, in groups that may be in hand together."""
        suspects = [row for row in self.suspects if row not in self.poison]
        size = isqrt(len(suspects)) if len(suspects) > GROUPED_FROM else 1
        for first in range(0, len(suspects), size):
            yield tuple(suspects[first : first + size])

    def skip_reason(self, row: int) -> BadRow | None:
        """Why a row is not to be tried; None if it is."""
        poison = self.poison.get(row)
        if poison is None:
            return None
        return BadRow(poison.status, f"{_KILLED[poison.status]}: {poison.reason}")


@dataclass(frozen=True)
class ShardResult:
    """What a worker reports of a processed shard.

    Attributes:
        sid: Id of the shard.
        stats: Statistics of its answers.
        commit: Whether this worker's part is the committed one.
    """

    sid: str
    stats: RunStats
    commit: Commit


_COUNTERS = (
    "ticks",
    "rows",
    "answers",
    "bad_answers",
    "visual_tokens_full",
    "visual_tokens_kept",
)


@dataclass(frozen=True)
class Progress:
    """What a worker has done so far; counters only grow.

    Attributes:
        ticks: Grows while the model is loaded: a sign of life before the first answer.
        rows: Rows whose first prompt is answered, committed or not: every row has exactly one.
        answers: Answers, one for each prompt.
        bad_answers: Answers that failed.
        visual_tokens_full: Visual tokens of their images before compression.
        visual_tokens_kept: Visual tokens of their images after compression.
        errors: The first few errors, as `row_key: status: message`.
    """

    ticks: int = 0
    rows: int = 0
    answers: int = 0
    bad_answers: int = 0
    visual_tokens_full: int = 0
    visual_tokens_kept: int = 0
    errors: tuple[str, ...] = ()

    @staticmethod
    def from_answer(answer: Answer) -> Progress:
        """One more answer."""
        request = answer.request
        errors: tuple[str, ...] = ()
        if answer.error is not None:
            errors = (f"{request.row_key}: {answer.status}: {answer.error}",)
        return Progress(
            rows=int(request.prompt_index == 0),
            answers=1,
            bad_answers=int(answer.status != Status.OK),
            visual_tokens_full=answer.visual_tokens_full or 0,
            visual_tokens_kept=answer.visual_tokens_kept or 0,
            errors=errors,
        )

    def __add__(self, other: Progress) -> Progress:
        counts = {name: getattr(self, name) + getattr(other, name) for name in _COUNTERS}
        return Progress(**counts, errors=(self.errors + other.errors)[:FIRST_ERRORS])

    def since(self, before: Progress) -> Progress:
        """What a worker did after an earlier state of the same counters."""
        counts = {name: getattr(self, name) - getattr(before, name) for name in _COUNTERS}
        return Progress(**counts, errors=self.errors[len(before.errors) :])


@dataclass(frozen=True)
class WorkerPlaced:
    """A worker's process is up."""

    worker: int


@dataclass(frozen=True)
class ModelLoaded:
    """A worker's model is in memory."""

    worker: int


@dataclass(frozen=True)
class Calibrated:
    """A worker has measured its speed."""

    worker: int
    seconds_per_row: float


@dataclass(frozen=True)
class Progressed:
    """A worker reports what it has done so far."""

    worker: int
    progress: Progress


@dataclass(frozen=True)
class ShardFinished:
    """A shard is committed, by this worker or by a faster one."""

    worker: int
    shard: Shard
    result: ShardResult


@dataclass(frozen=True)
class CallFailed:
    """A call failed and the worker lives; `shard` is None for loading and calibration."""

    worker: int
    shard: Shard | None
    error: Exception


@dataclass(frozen=True)
class WorkerDraining:
    """A worker's node is about to be taken away."""

    worker: int


@dataclass(frozen=True)
class WorkerExited:
    """A worker is gone; `WorkerDied` follows once its journal has been read."""

    worker: int


@dataclass(frozen=True)
class WorkerDied:
    """A worker is gone, and so is everything that it had not committed.

    Attributes:
        worker: The worker's number.
        reason: Why it ended; the reason given to `kill`, if it was killed.
        in_hand: Rows that it had in hand; empty if its node is gone too.
        ended: When it ended, on the pool's clock; None means now.
        node_lost: Whether the cluster lost a node in the worker's time, perhaps the worker's own.
    """

    worker: int
    reason: str
    in_hand: InHand = field(default_factory=dict)
    ended: float | None = None
    node_lost: bool = False


SetupEvent = WorkerPlaced | ModelLoaded | Calibrated
Event = (
    SetupEvent
    | Progressed
    | ShardFinished
    | CallFailed
    | WorkerDraining
    | WorkerExited
    | WorkerDied
)


@dataclass(frozen=True)
class Snapshot:
    """The state of a run, for a display; `rows` are input rows."""

    rows: int
    total_rows: int
    bad_answers: int
    visual_tokens_full: int
    visual_tokens_kept: int
    workers: int
    dead_shards: int
    phase: str


Display = Callable[[Snapshot], None]


class WorkerPool(Protocol):
    """The workers of a cluster. Calls return at once; results come as events."""

    def default_workers(self) -> int:
        """How many workers to have where the configuration does not say."""

    def start(self) -> int:
        """Request a worker; returns its number, and `WorkerPlaced` follows."""

    def load(self, worker: int) -> None:
        """Make a worker load its model; `ModelLoaded` follows."""

    def calibrate(self, worker: int, spans: Sequence[Span]) -> None:
        """Make a worker measure its speed; `Calibrated` follows."""

    def submit(self, worker: int, assignment: ShardAssignment) -> None:
        """Give a worker a shard; `ShardFinished` or `CallFailed` follows."""

    def kill(self, worker: int, reason: str) -> None:
        """End a worker now; only `WorkerExited`, perhaps, and `WorkerDied` follow."""

    def drop(self, worker: int) -> None:
        """End a worker now; nothing follows."""

    def poll(self, seconds: float) -> list[Event]:
        """New events; waits at most so many seconds for the first."""

    def resource_summary(self) -> str:
        """What resources a worker needs and the cluster has, as a message."""

    def now(self) -> float:
        """Seconds on the pool's clock."""
