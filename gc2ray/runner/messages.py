"""What the driver and the workers tell each other: assignments, results, progress and events.

`WorkerPool` is how the driver reaches its workers. A pool starts workers, hands them work and
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
from gc2ray.data.store import Commit
from gc2ray.output.planner import FIRST_ERRORS
from gc2ray.runner.journal import InHand

GROUPED_FROM = 32
"""More suspects than this are answered in groups first: alone, each takes as long as a batch."""

_KILLED = {
    Status.KILLED_WORKER: "two worker processes ended with this row, and nothing else, in hand",
    Status.TIMEOUT: "no answer came from two workers with this row, and nothing else, in hand",
}


class PoisonRow(NamedTuple):
    """What is written for a row that kills or hangs: its status, and how its worker ended."""

    status: Status
    reason: str


@dataclass(frozen=True)
class ShardAssignment:
    """A shard to answer.

    Rows are named by their place in the shard, from 0.

    Attributes:
        shard: The shard.
        attempt: Which try it is, from 1.
        suspects: Rows that were in hand when an earlier try died, in order. They are answered
            first, so few at a time that another death tells more.
        poison: Rows that are known to kill or to hang, and what is written for them.
    """

    shard: Shard
    attempt: int = 1
    suspects: tuple[int, ...] = ()
    poison: Mapping[int, PoisonRow] = field(default_factory=dict)

    def suspect_groups(self) -> Iterator[tuple[int, ...]]:
        """The suspects, as many together as may be in hand at a time."""
        suspects = [row for row in self.suspects if row not in self.poison]
        size = isqrt(len(suspects)) if len(suspects) > GROUPED_FROM else 1
        for first in range(0, len(suspects), size):
            yield tuple(suspects[first : first + size])

    def fault(self, row: int) -> BadRow | None:
        """Why a row is not to be tried, if it is not."""
        poison = self.poison.get(row)
        if poison is None:
            return None
        return BadRow(poison.status, f"{_KILLED[poison.status]}: {poison.reason}")


@dataclass(frozen=True)
class ShardResult:
    """What a worker reports of a processed shard.

    Attributes:
        sid: The shard's.
        stats: Of its answers.
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
        error = f"{request.row_key}: {answer.status}: {answer.error}"
        return Progress(
            rows=int(request.prompt_index == 0),
            answers=1,
            bad_answers=int(answer.status != Status.OK),
            visual_tokens_full=answer.visual_tokens_full or 0,
            visual_tokens_kept=answer.visual_tokens_kept or 0,
            errors=() if answer.error is None else (error,),
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
    device: str


@dataclass(frozen=True)
class Calibrated:
    """A worker has measured its speed."""

    worker: int
    seconds_per_row: float


@dataclass(frozen=True)
class Progressed:
    """What a worker has done so far."""

    worker: int
    progress: Progress


@dataclass(frozen=True)
class ShardFinished:
    """A shard is committed, by this worker or by another that was faster."""

    worker: int
    shard: Shard
    result: ShardResult


@dataclass(frozen=True)
class CallFailed:
    """A call failed, the worker lives; `shard` is None for loading and calibration."""

    worker: int
    shard: Shard | None
    error: Exception


@dataclass(frozen=True)
class WorkerDraining:
    """A worker's node is about to be taken away."""

    worker: int


@dataclass(frozen=True)
class WorkerExited:
    """A worker is gone; `WorkerDied` follows when it is known what it had in hand."""

    worker: int


@dataclass(frozen=True)
class WorkerDied:
    """A worker is gone, and with it all that it was doing.

    Attributes:
        worker: Which.
        reason: Why; as told to `kill`, if it was killed.
        in_hand: Rows that it had in hand; empty where its node is gone too.
        ended: When, on the pool's clock, if that was before it is told.
        node_lost: A node was lost in its time, perhaps its own: it may not be to blame.
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
    """What the driver needs of a cluster. Calls return at once; results come as events."""

    def default_workers(self) -> int:
        """How many workers make sense when nobody says."""

    def start(self) -> int:
        """Ask for a worker; its number is returned, `WorkerPlaced` follows."""

    def load(self, worker: int) -> None:
        """Let it load its model; `ModelLoaded` follows."""

    def calibrate(self, worker: int, spans: Sequence[Span]) -> None:
        """Let it measure its speed; `Calibrated` follows."""

    def submit(self, worker: int, assignment: ShardAssignment) -> None:
        """Hand it a shard; `ShardFinished` or `CallFailed` follows."""

    def kill(self, worker: int, reason: str) -> None:
        """End it now; `WorkerDied` follows, perhaps after `WorkerExited`, and nothing else."""

    def drop(self, worker: int) -> None:
        """End it now; nothing follows."""

    def poll(self, seconds: float) -> list[Event]:
        """Events, waiting at most so long for the first."""

    def room(self) -> str:
        """The resources that a worker needs and that the cluster has, for people."""

    def now(self) -> float:
        """Seconds on the clock of the stall detector."""
