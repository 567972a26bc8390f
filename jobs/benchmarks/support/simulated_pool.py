"""`SimulatedPool`: workers of a cluster that does not exist, on a clock of its own.

It is a `gc2ray.runner.messages.WorkerPool`, so the driver that runs on it is the real one. Nothing
waits: time is what the next event says. How each shard goes is the caller's to say; the tests use
it for single decisions, the benchmark for a million shards.

Not covered: what workers really do; events that come late.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from gc2ray.core.errors import StorageRefused
from gc2ray.core.shards import Shard, Span
from gc2ray.core.stats import RunStats
from gc2ray.output.parts import Commit
from gc2ray.runner.messages import (
    Calibrated,
    CallFailed,
    Event,
    ModelLoaded,
    Progress,
    Progressed,
    ShardAssignment,
    ShardFinished,
    ShardResult,
    WorkerDied,
    WorkerDraining,
    WorkerExited,
    WorkerPlaced,
)

STEP_SECONDS = 1.0
"""Placing, loading and calibrating, unless told otherwise."""
FAULT_SECONDS = 0.5
"""Into a shard until what goes wrong does."""
EXIT_SECONDS = 0.1


def done(shard: Shard, commit: Commit = Commit.WON) -> ShardResult:
    """What a worker tells of a committed shard."""
    return ShardResult(shard.sid, RunStats(rows=shard.rows), commit)


@dataclass
class SimulatedPool:
    """A pool with a clock of its own.

    Attributes:
        behave: Given worker, shard and attempt, says how it goes: `done`, `die`, `hang`, `fail`,
            `refuse`, or `leave`, which is done too.
        in_hand: Rows of a shard that a worker has in hand when it ends; none where nobody can tell.
        service_seconds: Seconds of an assignment; None is `seconds_per_row` for each of its rows.
        death_seconds: Into a shard, when it dies.
        seconds_per_row: Seconds to answer a row.
        load_seconds: Seconds of loading, where it goes well.
        placed: Workers that find room.
        load_goes: How loading goes: `done`, `die`, `hang`, `slow`.
        bad: Every row fails.
        remembers: Whether `submitted` and `assignments` are kept.
    """

    behave: Callable[[int, Shard, int], str] = lambda *_: "done"
    in_hand: Callable[[ShardAssignment], tuple[int, ...]] = lambda *_: ()
    service_seconds: Callable[[ShardAssignment], float] | None = None
    death_seconds: Callable[[ShardAssignment], float] = lambda *_: FAULT_SECONDS
    seconds_per_row: float = 1.0
    load_seconds: float = STEP_SECONDS
    placed: int = 100
    load_goes: Callable[[int], str] = lambda *_: "done"
    bad: bool = False
    remembers: bool = True
    time: float = 0.0
    started: int = 0
    killed: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    calibrated: list[int] = field(default_factory=list)
    submitted: list[tuple[int, Shard, int]] = field(default_factory=list)
    assignments: list[ShardAssignment] = field(default_factory=list)
    most_in_flight: int = 0
    on_done: Callable[[Shard], None] = lambda *_: None
    _due: list[tuple[float, int, Event]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _gone: set[int] = field(default_factory=set)
    _busy_until: dict[int, float] = field(default_factory=dict)
    _rows: dict[int, int] = field(default_factory=dict)
    _flying: dict[int, dict[str, ShardAssignment]] = field(default_factory=dict)

    def default_workers(self) -> int:
        return 2

    def start(self) -> int:
        self.started += 1
        if self.started - len(self._gone) <= self.placed:
            self.at(STEP_SECONDS, WorkerPlaced(self.started))
        return self.started

    def load(self, worker: int) -> None:
        self._check_alive(worker)
        goes = self.load_goes(worker)
        if goes == "die":
            self.at(STEP_SECONDS, WorkerDied(worker, "died while loading"))
        elif goes == "slow":
            for step in range(1, 100):
                self.at(10.0 * step, Progressed(worker, Progress(ticks=step)))
            self.at(1000.0, ModelLoaded(worker))
        elif goes == "done":
            self.at(self.load_seconds, ModelLoaded(worker))
        elif goes != "hang":
            self.at(STEP_SECONDS, CallFailed(worker, None, RuntimeError(goes)))

    def calibrate(self, worker: int, spans: Sequence[Span]) -> None:  # noqa: ARG002 - a Pool's
        self._check_alive(worker)
        self.calibrated.append(worker)
        self.at(STEP_SECONDS, Calibrated(worker, self.seconds_per_row))

    def submit(self, worker: int, assignment: ShardAssignment) -> None:
        self._check_alive(worker)
        shard = assignment.shard
        if self.remembers:
            self.submitted.append((worker, shard, assignment.attempt))
            self.assignments.append(assignment)
        flying = self._flying.setdefault(worker, {})
        flying[shard.sid] = assignment
        self.most_in_flight = max(self.most_in_flight, len(flying))
        start = max(self.time, self._busy_until.get(worker, 0.0)) - self.time
        took = self.service_seconds(assignment) if self.service_seconds else None
        end = start + (shard.rows * self.seconds_per_row if took is None else took)
        goes = self.behave(worker, shard, assignment.attempt)
        if goes in ("done", "leave"):
            if goes == "leave":
                self.at(start + FAULT_SECONDS, WorkerDraining(worker))
            self._busy_until[worker] = self.time + end
            self.at(end, Progressed(worker, self._progress(worker, shard)))
            self.at(end, ShardFinished(worker, shard, done(shard)))
        elif goes == "die":
            self.at(start + self.death_seconds(assignment), WorkerDied(worker, "the process ended"))
        elif goes == "fail":
            self.at(start + FAULT_SECONDS, CallFailed(worker, shard, OSError("no such file")))
        elif goes == "refuse":  # when all is answered
            self.at(end, CallFailed(worker, shard, StorageRefused("s3://out refused data/part")))

    def kill(self, worker: int, reason: str) -> None:
        self._check_alive(worker)
        self.killed.append(worker)
        self._gone.add(worker)
        self.at(EXIT_SECONDS, self._died(WorkerDied(worker, reason)))

    def drop(self, worker: int) -> None:
        self._check_alive(worker)
        self.dropped.append(worker)
        self._remove(worker)

    def poll(self, seconds: float) -> list[Event]:
        until = self.time + seconds
        self._skip_gone()
        if not self._due or self._due[0][0] > until:
            self.time = until
            return []
        self.time = max(self.time, self._due[0][0])
        events: list[Event] = []
        while self._due and self._due[0][0] <= self.time:
            event = self._delivered(heapq.heappop(self._due)[2])
            if event is not None:
                events.append(event)
        return events

    def resource_summary(self) -> str:
        return "a worker needs 1 GPU; the cluster has 0 GPU"

    def now(self) -> float:
        return self.time

    def at(self, delay: float, event: Event) -> None:
        """An event, so many seconds from now."""
        heapq.heappush(self._due, (self.time + delay, next(self._order), event))

    def _check_alive(self, worker: int) -> None:
        """As in earnest: nothing can be done with a worker that has ended, and it was told so."""
        if worker in self._gone:
            raise KeyError(f"worker {worker} has ended")

    def _skip_gone(self) -> None:
        """Nothing happens to workers that are gone, not even time."""
        while self._due and self._is_void(self._due[0][2]):
            heapq.heappop(self._due)

    def _is_void(self, event: Event) -> bool:
        return event.worker in self._gone and not isinstance(event, WorkerDied)

    def _delivered(self, event: Event) -> Event | None:
        if self._is_void(event):
            return None
        if isinstance(event, WorkerDied):
            died = event if event.worker in self._gone else self._died(event)
            self._remove(event.worker)
            return died
        if isinstance(event, WorkerExited):
            self._gone.add(event.worker)
        if isinstance(event, ShardFinished):
            self.on_done(event.shard)
        if isinstance(event, ShardFinished | CallFailed) and event.shard is not None:
            self._flying[event.worker].pop(event.shard.sid, None)
        return event

    def _died(self, event: WorkerDied) -> WorkerDied:
        flying = self._flying.get(event.worker, {})
        rows = {sid: self.in_hand(assignment) for sid, assignment in flying.items()}
        return replace(event, in_hand={sid: found for sid, found in rows.items() if found})

    def _remove(self, worker: int) -> None:
        self._gone.add(worker)
        for known in (self._flying, self._busy_until, self._rows):
            known.pop(worker, None)

    def _progress(self, worker: int, shard: Shard) -> Progress:
        rows = self._rows[worker] = self._rows.get(worker, 0) + shard.rows
        errors = ("a: failed: x", "b: failed: y", "c: failed: z") if self.bad else ()
        return Progress(rows=rows, answers=rows, bad_answers=rows if self.bad else 0, errors=errors)
