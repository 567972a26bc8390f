"""Kills on schedule: each hits a known window of a known shard, once, and leaves a mark.

A mark names what was killed, in which window, and by which pid, so that a test can show that the
kill hit what it was meant to, and that the process is gone.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa

from gc2ray.core.config.job import Job
from gc2ray.runner.worker import Worker
from tests.support.fakes import EchoEngine

WINDOWS = {
    "answered": "before write",
    "written": "between write and commit",
    "committed": "after commit, before reply",
}
"""Steps of a worker, and the windows that they open."""
VICTIMS = {"driver": "driver.pid", "store": "store.pid"}
"""Files that tell whom a worker kills, where that is not itself."""
ROW_SECONDS = 0.002
SLOW_ROW_SECONDS = 0.1
DOOMED_SECONDS = 60.0


@dataclass(frozen=True)
class Kill:
    """A kill that happened.

    Attributes:
        kind: What was killed.
        step: In which window, see `WINDOWS`.
        sid: Which shard was there.
        pid: Of the process that was killed; of a node, of the worker that was on it.
        node: Where the worker was.
    """

    kind: str
    step: str
    sid: str
    pid: int
    node: str

    @staticmethod
    def of(mark: Path) -> Kill:
        """The kill that left a mark."""
        kind, step, sid, pid, node = mark.name.split("-")
        return Kill(kind, step, sid, int(pid), node)


@dataclass(frozen=True)
class Schedule:
    """What to kill, and when.

    Attributes:
        kind: `worker`, `driver`, `store` or `node`; nodes are killed by whoever reads the marks.
        steps: Step by sid.
        marks: Where marks go.
    """

    kind: str
    steps: Mapping[str, str]
    marks: Path

    def on_step(self, step: str, sid: str) -> None:
        """A worker has done a step of a shard."""
        due, fired = self.steps.get(sid), self.marks / f"fired.{sid}"
        if due is None or fired.exists():
            return
        if self.kind == "store":
            if due == step:
                self._kill(fired, step, sid, self._next_store())
            return
        victim = self._victim()
        doomed = self.marks / f"doomed.{victim}"
        if doomed.exists():  # killed for another shard: this one's turn comes again
            time.sleep(DOOMED_SECONDS)
        if due != step:
            return
        try:
            doomed.touch(exist_ok=False)
        except FileExistsError:
            time.sleep(DOOMED_SECONDS)
        self._kill(fired, step, sid, victim)

    def _victim(self) -> int:
        """Whom a worker of ours kills."""
        name = VICTIMS.get(self.kind)
        return int((self.marks / name).read_text()) if name else os.getpid()

    def _next_store(self) -> int:
        """The store that is up; one that another shard has killed is up again in a moment."""
        while True:
            victim = self._victim()
            try:
                (self.marks / f"doomed.{victim}").touch(exist_ok=False)
            except FileExistsError:
                time.sleep(0.05)
            else:
                return victim

    def _kill(self, fired: Path, step: str, sid: str, victim: int) -> None:
        fired.touch()
        (self.marks / f"{self.kind}-{step}-{sid}-{victim}-{_node()}").touch()
        if self.kind == "node":
            time.sleep(DOOMED_SECONDS)
        else:
            os.kill(victim, signal.SIGKILL)

    def kills(self) -> list[Kill]:
        """Those that happened so far."""
        marks = sorted(self.marks.glob(f"{self.kind}-*"), key=lambda mark: mark.stat().st_mtime_ns)
        return [Kill.of(mark) for mark in marks]


@dataclass(frozen=True)
class Losses:
    """What a run under fire cost: of its rows those that were lost or doubled, and time."""

    rows: int
    lost: int
    doubled: int
    wasted_seconds: float


@dataclass
class Survived:
    """The kills that a suite survived, by kind and window, and what they cost."""

    windows: Counter[tuple[str, str]] = field(default_factory=Counter)
    losses: dict[str, Losses] = field(default_factory=dict)

    def note(self, kills: list[Kill], losses: Losses) -> None:
        """A run that came through its kills."""
        for kill in kills:
            self.windows[kill.kind, kill.step] += 1
        self.losses[kills[0].kind] = losses

    def table(self) -> list[str]:
        """As Markdown."""
        heads = [
            "killed",
            *WINDOWS.values(),
            "rows",
            "lost",
            "doubled",
            "device-seconds wasted a kill",
        ]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for kind, loss in self.losses.items():
            counts = [self.windows[kind, step] for step in WINDOWS]
            wasted = f"{loss.wasted_seconds / sum(counts):.1f}"
            cells = [kind, *counts, f"{loss.rows:,}", loss.lost, loss.doubled, wasted]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return lines


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _load(_job: Job) -> EchoEngine:
    return EchoEngine(ROW_SECONDS)


def chaotic_worker(job: Job, kept_columns: pa.Schema, schedule: Schedule | None = None) -> Worker:
    """A worker whose process may be killed on schedule."""
    return Worker(job, kept_columns, load=_load, on_step=schedule.on_step if schedule else None)


def _load_slow(_job: Job) -> EchoEngine:
    return EchoEngine(SLOW_ROW_SECONDS)


def slow_worker(job: Job, kept_columns: pa.Schema) -> Worker:
    """A worker that has time to be interrupted."""
    return Worker(job, kept_columns, load=_load_slow)


def worker_on(schedule: Schedule) -> partial[Worker]:
    """For `run_job`."""
    return partial(chaotic_worker, schedule=schedule)
