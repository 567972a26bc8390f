"""Engines, workers and a pool for tests; picklable, so that Ray can ship them."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from gc2ray.core.config.job import Job
from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Request
from gc2ray.core.stats import RunStats
from gc2ray.engine.prefetch import Prefetcher
from gc2ray.models.shape import ModelShape
from gc2ray.runner.worker import Worker


def echo(request: Request, **changes: object) -> Answer:
    """The prompt as the answer."""
    ok = {
        "status": Status.OK,
        "answer": request.prompts[0] if request.prompts else None,
        "retention_requested": 1.0,
    }
    return Answer(request=request, method="none", device="fake", **{**ok, **changes})


class EchoEngine:
    """Answers with the prompt, a little later.

    Args:
        seconds: Per row.
        on_row: Called before each row is answered.
        buffered: Rows held back until more come or none are at hand, as a batch would be.
    """

    device = "fake"
    model_digest = "no model"
    model_shape: ModelShape | None = None

    def __init__(
        self,
        seconds: float = 0.0,
        on_row: Callable[[Request], None] | None = None,
        buffered: int = 0,
    ) -> None:
        self._seconds, self._on_row, self._buffered = seconds, on_row, buffered
        self.input_starved_ns = self.cache_clears = 0

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        held: list[Request] = []
        with Prefetcher(requests, lambda request: request, threads=1, ahead=9) as feed:
            self._feed = feed
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
                self.input_starved_ns = feed.waited_ns

    def _answer(self, row: Request) -> Answer:
        if self._on_row and row.fault is None:
            self._on_row(row)
        time.sleep(self._seconds)
        if row.fault is not None:
            return echo(row, status=row.fault.status, answer=None, error=row.fault.message)
        return echo(row)

    def requeue(self, request: Request) -> None:
        self._feed.add(request)

    def clear_cache(self) -> None:
        self.cache_clears += 1

    def totals(self) -> RunStats:
        return RunStats(input_starved_ns=self.input_starved_ns)


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a worker process, once or always.

    Attributes:
        kind: `kill`, `segfault`, `exit`, `hang`, `raise` or `kill_driver`.
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
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "segfault":
            ctypes.string_at(0)
        elif self.kind == "exit":
            os._exit(1)
        elif self.kind == "hang":
            time.sleep(3600)
        elif self.kind == "kill_driver":
            os.kill(self.driver_pid, signal.SIGKILL)
        else:
            raise RuntimeError("the engine breaks")


def _load_echo(fault: Fault | None, seconds: float, job: Job) -> EchoEngine:
    return EchoEngine(fault.seconds if fault else seconds, fault.on_row if fault else None)


def faulty_worker(
    job: Job, kept_columns: pa.Schema, fault: Fault | None = None, retry_round: int = 0
) -> Worker:
    """A worker with an echo engine and at most one fault."""
    return Worker(
        job,
        kept_columns,
        retry_round=retry_round,
        load=partial(_load_echo, fault, 0.002),
        on_step=fault.on_step if fault else None,
    )


@dataclass(frozen=True)
class Counted:
    """An engine that notes in files what it does when, and is killed by some rows, once each.

    Attributes:
        marks: Folder of `rows-<pid>`: a line for each row that it begins, which is the row's number
            and the time; the first line is `loaded`, the last of one that was killed is `killed`.
        kills: Row numbers that kill.
        row_seconds: Of answering.
        load_seconds: Of loading.
    """

    marks: Path
    kills: frozenset[int]
    row_seconds: float
    load_seconds: float

    def load(self, _job: Job) -> EchoEngine:
        time.sleep(self.load_seconds)
        self._note("loaded")
        return EchoEngine(self.row_seconds, self.on_row)

    def on_row(self, request: Request) -> None:
        if request.row in self.kills:
            killed = self.marks / f"killed-{request.row}"
            if not killed.exists():
                killed.write_text(str(os.getpid()))
                self._note("killed")
                os.kill(os.getpid(), signal.SIGKILL)
        self._note(str(request.row))

    def _note(self, what: str) -> None:
        with (self.marks / f"rows-{os.getpid()}").open("a") as file:
            file.write(f"{what} {time.monotonic()}\n")

    def loads(self) -> int:
        return len(list(self.marks.glob("rows-*")))

    def seconds(self) -> tuple[float, float]:
        """Of rows that were answered for good, and of those that were answered again."""
        tries = sorted(found for path in self.marks.glob("rows-*") for found in self._tries(path))
        last = {row: seconds for _, row, seconds in tries}
        useful = sum(last.values())
        return useful, sum(seconds for *_, seconds in tries) - useful

    def _tries(self, path: Path) -> Iterator[tuple[float, str, float]]:
        """When a process began each row, and how long it took until it began the next thing."""
        lines = [line.split() for line in path.read_text().splitlines()]
        whats, times = [what for what, _ in lines], [float(when) for _, when in lines]
        begun = [times[0], *times[2:]]  # reading is part of the first row
        ended = [*times[2:], times[-1] + self.row_seconds]
        for what, begin, end in zip(whats[1:], begun, ended, strict=True):
            if what.isdigit():
                yield begin, what, end - begin


def counted_worker(job: Job, kept_columns: pa.Schema, counted: Counted) -> Worker:
    """A worker with such an engine."""
    return Worker(job, kept_columns, load=counted.load)
