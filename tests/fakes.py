"""Engines, workers and a pool for tests; picklable, so that Ray can ship them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from gc2ray.config import Job
from gc2ray.errors import Status
from gc2ray.feed import Feed
from gc2ray.handout import Handout
from gc2ray.pool import Calibrated, Died, Done, Event, Failed, Leaving, Loaded, Placed, Progressed
from gc2ray.progress import Progress
from gc2ray.records import Answer, Request
from gc2ray.shards import Shard, Span
from gc2ray.stats import RunStats
from gc2ray.store import Commit
from gc2ray.worker import ShardDone, Worker


def echo(request: Request, **changes: object) -> Answer:
    """The prompt as the answer."""
    ok = {"status": Status.OK, "answer": request.prompts[0] if request.prompts else None}
    return Answer(
        request=request, method="none", retention_requested=1.0, device="fake", **{**ok, **changes}
    )


class EchoEngine:
    """Answers with the prompt, a little later.

    Args:
        seconds: Per row.
        on_row: Called before each row is answered.
        buffered: Rows held back until more come or none are at hand, as a batch would be.
    """

    device = "fake"

    def __init__(
        self,
        seconds: float = 0.0,
        on_row: Callable[[Request], None] | None = None,
        buffered: int = 0,
    ) -> None:
        self._seconds, self._on_row, self._buffered = seconds, on_row, buffered
        self.starved_ns = self.forgot = 0

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        held: list[Request] = []
        with Feed(requests, lambda request: request, threads=1, ahead=9) as feed:
            while held or not feed.ended:
                request = feed.take()
                if request is None and self._buffered:
                    time.sleep(0.02)  # a batch gives the reader a moment
                    request = feed.take()
                if request is not None:
                    held.append(request)
                elif not held:
                    feed.wait()
                    continue
                while held and (request is None or len(held) > self._buffered):
                    yield self._answer(held.pop())
                self.starved_ns = feed.waited_ns

    def _answer(self, row: Request) -> Answer:
        if self._on_row and row.fault is None:
            self._on_row(row)
        time.sleep(self._seconds)
        if row.fault is not None:
            return echo(row, status=row.fault.status, answer=None, error=row.fault.message)
        return echo(row)

    def forget(self) -> None:
        self.forgot += 1

    def totals(self) -> RunStats:
        return RunStats(starved_ns=self.starved_ns)


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a worker process, once or always.

    Attributes:
        kind: `exit`, `hang`, `raise` or `kill_driver`.
        row: Row number of the row at which it happens, or None.
        prompt_index: Which of its prompts.
        step: Step of a shard (`read`, `answered`, `written`, `committed`) at which it happens.
        marks: Folder where each firing leaves a file `<kind>-<what>-<pid>`.
        once: Only the first time.
        driver_pid: For `kill_driver`.
        seconds: Per row, so that there is time to be in the middle of something.
    """

    kind: str
    marks: Path
    row: int | None = None
    step: str | None = None
    once: bool = True
    driver_pid: int = 0
    seconds: float = 0.002
    prompt_index: int = 0

    def on_row(self, request: Request) -> None:
        if (request.row, request.prompt_index) == (self.row, self.prompt_index):
            self.fire(f"row{request.row}")

    def on_step(self, step: str, sid: str) -> None:
        if step == self.step:
            self.fire(f"{step}-{sid}")

    def fire(self, what: str) -> None:
        if self.once:
            try:
                (self.marks / "fired").touch(exist_ok=False)
            except FileExistsError:
                return
        (self.marks / f"{self.kind}-{what}-{os.getpid()}-{time.monotonic_ns()}").touch()
        if self.kind == "exit":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "hang":
            time.sleep(3600)
        elif self.kind == "kill_driver":
            os.kill(self.driver_pid, signal.SIGKILL)
        else:
            raise RuntimeError("the engine breaks")


def _load_echo(fault: Fault | None, seconds: float, job: Job) -> EchoEngine:
    return EchoEngine(fault.seconds if fault else seconds, fault.on_row if fault else None)


def faulty_worker(job: Job, carried: pa.Schema, fault: Fault | None = None) -> Worker:
    """A worker with an echo engine and at most one fault."""
    return Worker(
        job,
        carried,
        load=partial(_load_echo, fault, 0.002),
        metrics=fault.on_step if fault else None,
    )


def done(shard: Shard, commit: Commit = Commit.WON) -> ShardDone:
    return ShardDone(shard.sid, RunStats(rows=shard.rows), commit)


@dataclass
class SimulatedPool:
    """A pool with a clock of its own: nothing waits.

    Attributes:
        behave: Given worker, shard and attempt, says how it goes: `done`, `die`, `hang`, `fail`.
        in_hand: Rows of a shard that a worker has in hand when it ends.
        seconds_per_row: Of answering.
        placed: Workers that find room.
        load: How loading goes: `done`, `die`, `hang`, `slow`.
        bad: Every row fails.
    """

    behave: Callable[[int, Shard, int], str] = lambda worker, shard, attempt: "done"
    in_hand: Callable[[Handout], tuple[int, ...]] = lambda handout: ()
    seconds_per_row: float = 1.0
    placed: int = 100
    load_goes: Callable[[int], str] = lambda worker: "done"
    bad: bool = False
    time: float = 0.0
    started: int = 0
    killed: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    calibrated: list[int] = field(default_factory=list)
    submitted: list[tuple[int, Shard, int]] = field(default_factory=list)
    handouts: list[Handout] = field(default_factory=list)
    most_in_flight: int = 0
    on_done: Callable[[Shard], None] = lambda shard: None
    _due: list[tuple[float, Event]] = field(default_factory=list)
    _busy_until: dict[int, float] = field(default_factory=dict)
    _rows: dict[int, int] = field(default_factory=dict)
    _flying: dict[int, dict[str, Handout]] = field(default_factory=dict)

    def default_workers(self) -> int:
        return 2

    def start(self) -> int:
        self.started += 1
        if self.started - len(self.killed) - len(self.dropped) <= self.placed:
            self._at(1.0, Placed(self.started))
        return self.started

    def load(self, worker: int) -> None:
        goes = self.load_goes(worker)
        if goes == "die":
            self._at(1.0, Died(worker, "died while loading"))
        elif goes == "slow":
            for step in range(1, 100):
                self._at(10.0 * step, Progressed(worker, Progress(ticks=step)))
            self._at(1000.0, Loaded(worker, "fake"))
        elif goes == "done":
            self._at(1.0, Loaded(worker, "fake"))
        elif goes != "hang":
            self._at(1.0, Failed(worker, None, RuntimeError(goes)))

    def calibrate(self, worker: int, spans: Sequence[Span]) -> None:
        self.calibrated.append(worker)
        self._at(1.0, Calibrated(worker, self.seconds_per_row))

    def submit(self, worker: int, handout: Handout) -> None:
        shard, attempt = handout.shard, handout.attempt
        self.submitted.append((worker, shard, attempt))
        self.handouts.append(handout)
        flying = self._flying.setdefault(worker, {})
        flying[shard.sid] = handout
        self.most_in_flight = max(self.most_in_flight, len(flying))
        start = max(self.time, self._busy_until.get(worker, 0.0))
        end = start + shard.rows * self.seconds_per_row
        goes = self.behave(worker, shard, attempt)
        if goes == "done":
            self._busy_until[worker] = end
            rows = self._rows[worker] = self._rows.get(worker, 0) + shard.rows
            bad = rows if self.bad else 0
            errors = ("a: failed: x", "b: failed: y", "c: failed: z") if self.bad else ()
            progress = Progress(rows=rows, answers=rows, bad_answers=bad, errors=errors)
            self._at(end - self.time, Progressed(worker, progress))
            self._at(end - self.time, Done(worker, shard, done(shard)))
        elif goes == "die":
            self._at(start - self.time + 0.5, Died(worker, "the process ended"))
        elif goes == "leave":
            self._at(start - self.time + 0.5, Leaving(worker))
            self._at(end - self.time, Done(worker, shard, done(shard)))
        elif goes == "fail":
            self._at(start - self.time + 0.5, Failed(worker, shard, OSError("no such file")))

    def kill(self, worker: int, reason: str) -> None:
        self.killed.append(worker)
        self._due = [due for due in self._due if due[1].worker != worker]
        self._at(0.1, Died(worker, reason))

    def drop(self, worker: int) -> None:
        self.dropped.append(worker)
        self._due = [due for due in self._due if due[1].worker != worker]

    def _died(self, event: Died) -> Died:
        flying = self._flying.get(event.worker, {})
        return replace(event, in_hand={sid: self.in_hand(h) for sid, h in flying.items()})

    def poll(self, seconds: float) -> list[Event]:
        due = sorted(self._due, key=lambda item: item[0])
        if not due or due[0][0] > self.time + seconds:
            self.time += seconds
            return []
        self.time = max(self.time, due[0][0])
        now = [event for at, event in due if at <= self.time]
        self._due = [item for item in due if item[0] > self.time]
        events = []
        dead: set[int] = set()
        for event in now:
            if event.worker in dead:
                continue
            if isinstance(event, Died):
                dead.add(event.worker)
                self._due = [item for item in self._due if item[1].worker != event.worker]
                event = self._died(event)
            if isinstance(event, Done):
                self.on_done(event.shard)
            if isinstance(event, Done | Failed) and event.shard is not None:
                self._flying[event.worker].pop(event.shard.sid, None)
            events.append(event)
        return events

    def room(self) -> str:
        return "a worker asks for 1 GPU; the cluster has 0 GPU"

    def now(self) -> float:
        return self.time

    def _at(self, delay: float, event: Event) -> None:
        self._due.append((self.time + delay, event))
