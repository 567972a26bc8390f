"""The driver: plans a run once, hands shards to workers, and knows when to give up on one.

It never trusts its memory for completion: what is committed is what the store lists. It talks to
workers through a `Pool`, so that its decisions can be tested without Ray and without waiting.

Rules: two shards in flight per worker, so that a border never drains an accelerator; a shard that
was lost once runs alone, so that it takes no other with it; `tries` losses make a dead letter; a
worker that gives no answer for `stall_seconds` is killed. Placement and loading have clocks of
their own.

Not covered: isolating the row that kills a worker, draining on signals.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from gc2ray import ray_pool
from gc2ray.config import Cluster, Job
from gc2ray.errors import ConfigError, GivenUp
from gc2ray.manifest import Plan
from gc2ray.planner import (
    CALIBRATION_ROWS,
    Committed,
    Outcome,
    committed_parts,
    outcome,
    shard_rows,
    store_plan,
    stored_plan,
)
from gc2ray.pool import Calibrated, Died, Done, Event, Failed, Loaded, Placed, Pool, Progressed
from gc2ray.shards import Shard, SourceFile, Span, first_spans
from gc2ray.sources.parquet import ParquetSource
from gc2ray.store import Commit, Store
from gc2ray.worker import Progress, Worker

IN_FLIGHT = 2
POLL_SECONDS = 1.0
SETUP_DEATHS = 3
"""Workers that die while setting up, with no shard done in between: then the run gives up."""
BAD_ROWS_FROM = 200
"""Answers before the share of bad ones is judged."""

log = logging.getLogger(__name__)


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


@dataclass(eq=False)
class _WorkerState:
    """What the driver knows of a worker; times are the pool's."""

    started: float
    placed: float | None = None
    loaded: float | None = None
    active: float = 0.0
    progress: Progress = field(default_factory=Progress)
    shards: dict[str, Shard] = field(default_factory=dict)


class Driver:
    """Runs the shards of one plan.

    Args:
        cluster: Tries, clocks, number of workers.
        store: Where dead letters go.
        pool: The workers.
        display: Shown the state about once a second.
    """

    def __init__(self, cluster: Cluster, store: Store, pool: Pool, display: Display) -> None:
        self._cluster = cluster
        self._store = store
        self._pool = pool
        self._display = display
        self.target = cluster.workers or pool.default_workers()
        self._workers: dict[int, _WorkerState] = {}
        self._queue: deque[Shard] = deque()
        self._tries: dict[str, int] = {}
        self._past: list[Progress] = []
        self._done_before = 0
        self._total_rows = 0
        self._setup_deaths = 0
        self._calibrator: int | None = None
        self._seconds_per_row: float | None = None
        self._phase = "starting"
        self.lost_races = 0
        self._dead_shards = 0

    def calibrate(self, sample: Sequence[Span]) -> float:
        """Seconds per row on the first worker that has loaded; the others load meanwhile.

        Raises:
            GivenUp: No worker can be had.
            ConfigError: The model cannot be loaded.
        """
        self._phase = "calibrating"
        while self._seconds_per_row is None:
            self._staff(min(self.target, sum(span.rows for span in sample)))
            loaded = [key for key, state in self._workers.items() if state.loaded is not None]
            if loaded and self._calibrator not in loaded:
                self._calibrator = loaded[0]
                self._workers[loaded[0]].active = self._pool.now()
                self._pool.calibrate(loaded[0], sample)
            self._turn()
        self._calibrator = None
        return self._seconds_per_row

    def run(self, plan: Plan, committed: Committed) -> None:
        """Work until every shard is committed or dead.

        Raises:
            GivenUp: Too many bad rows, or no worker can be had.
            ConfigError: The model cannot be loaded.
        """
        self._queue.extend(s for s in plan.shards if not committed.shards[s.index])
        self._total_rows, self._done_before = plan.rows, committed.rows
        self._phase = "answering"
        while self._queue or any(state.shards for state in self._workers.values()):
            flying = sum(len(state.shards) for state in self._workers.values())
            self._staff(min(self.target, len(self._queue) + flying))
            self._hand_out()
            self._turn()
            self._judge_rows()

    def _turn(self) -> None:
        for event in self._pool.poll(POLL_SECONDS):
            if event.worker in self._workers:
                self._handle(event)
        self._check_clocks()
        self._display(self._snapshot())

    def _staff(self, wanted: int) -> None:
        for _ in range(wanted - len(self._workers)):
            self._workers[self._pool.start()] = _WorkerState(started=self._pool.now())

    def _hand_out(self) -> None:
        for worker, state in self._workers.items():
            if state.loaded is None:
                continue
            while (shard := self._next_for(state)) is not None:
                if not state.shards:
                    state.active = self._pool.now()
                state.shards[shard.sid] = shard
                self._pool.submit(worker, shard, self._tries.get(shard.sid, 0) + 1)

    def _next_for(self, state: _WorkerState) -> Shard | None:
        """A shard that this worker may take now: suspects go alone."""
        if len(state.shards) >= IN_FLIGHT or any(sid in self._tries for sid in state.shards):
            return None
        for shard in self._queue:
            if shard.sid not in self._tries or not state.shards:
                self._queue.remove(shard)
                return shard
        return None

    def _handle(self, event: Event) -> None:
        state = self._workers[event.worker]
        match event:
            case Placed():
                state.placed = state.active = self._pool.now()
                self._pool.load(event.worker)
            case Loaded():
                state.loaded = state.active = self._pool.now()
            case Calibrated():
                self._seconds_per_row = event.seconds_per_row
            case Progressed():
                self._note(event.worker, state, event.progress)
            case Done():
                self._finished(state, event)
            case Failed():
                self._failed(event.worker, state, event)
            case Died():
                self._bury(event.worker, event.reason)

    def _note(self, worker: int, state: _WorkerState, progress: Progress) -> None:
        moved = progress.answers > state.progress.answers
        setting_up = state.loaded is None or worker == self._calibrator
        if moved or (setting_up and progress.ticks > state.progress.ticks):
            state.active = self._pool.now()
        state.progress = progress

    def _finished(self, state: _WorkerState, event: Done) -> None:
        state.shards.pop(event.shard.sid, None)
        state.active = self._pool.now()
        self._setup_deaths = 0
        if event.result.commit == Commit.LOST_RACE:
            self.lost_races += 1

    def _failed(self, worker: int, state: _WorkerState, event: Failed) -> None:
        if event.shard is None:
            if isinstance(event.error, ConfigError):
                raise event.error
            self._pool.kill(worker)
            self._bury(worker, f"{type(event.error).__name__}: {event.error}")
            return
        state.shards.pop(event.shard.sid, None)
        state.active = self._pool.now()
        self._lost(event.shard, f"{type(event.error).__name__}: {event.error}")

    def _bury(self, worker: int, reason: str) -> None:
        """A worker is gone; its shards are handed out again, each alone."""
        state = self._workers.pop(worker)
        self._past.append(state.progress)
        log.warning("worker %d is gone: %s", worker, reason)
        if state.loaded is None or worker == self._calibrator:
            self._setup_deaths += 1
            if self._setup_deaths >= SETUP_DEATHS:
                raise GivenUp(f"{SETUP_DEATHS} workers in a row died while starting: {reason}")
        for shard in state.shards.values():
            self._lost(shard, reason)

    def _lost(self, shard: Shard, reason: str) -> None:
        tries = self._tries[shard.sid] = self._tries.get(shard.sid, 0) + 1
        if tries < self._cluster.tries:
            self._queue.append(shard)
            return
        letter = {
            "sid": shard.sid,
            "shard": shard.index,
            "tries": tries,
            "reason": reason,
            "rows": shard.rows,
            "spans": [asdict(span) for span in shard.spans],
            "time": datetime.now(UTC).isoformat(),
        }
        data = (json.dumps(letter, indent=2) + "\n").encode()
        number = tries
        while not self._store.create(f"dead/{shard.sid}.{number}.json", data):
            number += 1  # of an earlier run of the same plan
        self._dead_shards += 1

    def _check_clocks(self) -> None:
        now, clocks = self._pool.now(), self._cluster
        for worker, state in list(self._workers.items()):
            if state.placed is None:
                if now - state.started > clocks.place_seconds:
                    self._unplaced(worker)
            elif state.loaded is None:
                if now - state.active > clocks.load_seconds:
                    self._stop(worker, f"no progress in loading for {clocks.load_seconds:g} s")
            elif self._is_busy(worker) and now - state.active > clocks.stall_seconds:
                self._stop(worker, f"stalled: no answer for {clocks.stall_seconds:g} s")

    def _is_busy(self, worker: int) -> bool:
        return bool(self._workers[worker].shards) or worker == self._calibrator

    def _stop(self, worker: int, reason: str) -> None:
        self._pool.kill(worker)
        self._bury(worker, reason)

    def _unplaced(self, worker: int) -> None:
        """No room for a worker: go on with fewer, or give up when there is none."""
        message = f"no room for a worker within {self._cluster.place_seconds:g} s: "
        self._pool.kill(worker)
        self._workers.pop(worker)
        if all(state.placed is None for state in self._workers.values()):
            raise GivenUp(message + self._pool.room())
        self.target = max(1, len(self._workers))
        log.warning("%s%s; going on with %d", message, self._pool.room(), self.target)

    def _judge_rows(self) -> None:
        seen = self._seen()
        answers, bad = sum(part.answers for part in seen), sum(part.bad_answers for part in seen)
        if answers < BAD_ROWS_FROM or bad <= self._cluster.max_bad_rows * answers:
            return
        errors = [error for part in seen for error in part.errors][:3]
        raise GivenUp(
            f"{bad} of {answers} answers failed, more than cluster.max_bad_rows = "
            f"{self._cluster.max_bad_rows:g} allows; the first:\n  " + "\n  ".join(errors)
        )

    def _seen(self) -> list[Progress]:
        return [*self._past, *(state.progress for state in self._workers.values())]

    def _snapshot(self) -> Snapshot:
        seen = self._seen()
        rows = self._done_before + sum(part.rows for part in seen)
        return Snapshot(
            rows=min(rows, self._total_rows),
            total_rows=self._total_rows,
            bad_answers=sum(part.bad_answers for part in seen),
            visual_tokens_full=sum(part.visual_tokens_full for part in seen),
            visual_tokens_kept=sum(part.visual_tokens_kept for part in seen),
            workers=sum(state.loaded is not None for state in self._workers.values()),
            dead_shards=self._dead_shards,
            phase=self._phase,
        )


def run_job(
    job: Job,
    *,
    address: str | None = None,
    display: Display | None = None,
    make_worker: Callable[..., Worker] = Worker,
) -> Outcome:
    """Run a job to its end, from wherever an earlier run left it.

    Args:
        job: What, how and where.
        address: Of a Ray cluster; None: `RAY_ADDRESS`, or a local Ray.
        display: Shown the state about once a second.
        make_worker: Makes the workers, in their processes, from the job and the carried schema.

    Raises:
        ConfigError: The configuration cannot be used, or the output belongs to another one.
        GivenUp: The run stopped before its end.
    """
    job = job.located()
    store = Store(job.output)
    store.check_usable(writing=False)
    plan = stored_plan(store, job)
    committed = committed_parts(store, plan) if plan else None
    if plan is not None and committed is not None and committed.whole:
        return outcome(store, plan, committed)
    job.recipe.model.check()
    store.check_usable(writing=True)
    files, carried = ([], plan.carried) if plan else ParquetSource(job.recipe.input).scan()
    with ray_pool.connected(address):
        # Workers write down what they cost, so they are told the share that they really get.
        share = {"gpus_per_worker": ray_pool.gpus_per_worker(job.cluster)}
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update=share)})
        pool = ray_pool.RayPool(job.cluster, make_worker, (job, carried))
        driver = Driver(job.cluster, store, pool, display or (lambda _: None))
        try:
            if plan is None:
                rows = _shard_rows(job, files, driver)
                plan = store_plan(store, job, Plan.cut(job.recipe, files, rows, carried))
            if committed is None:  # another driver may have been faster
                committed = committed_parts(store, plan)
            driver.run(plan, committed)
        finally:
            pool.close()
    if driver.lost_races:
        log.warning("%d parts were there already: is another driver at work?", driver.lost_races)
    return outcome(store, plan, committed_parts(store, plan, committed))


def _shard_rows(job: Job, files: Sequence[SourceFile], driver: Driver) -> int:
    """As configured, or measured on the first rows."""
    rows, seconds = sum(file.rows for file in files), 0.0
    if job.cluster.shard_rows is None and rows > 0:
        seconds = driver.calibrate(first_spans(files, CALIBRATION_ROWS))
    return shard_rows(job.cluster, rows, driver.target, seconds)
