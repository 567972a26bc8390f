"""The driver: assigns shards to workers, replaces workers that fail, and decides when to give up.

It reaches the workers through a `WorkerPool`, so that its decisions can be tested without Ray and
without waiting. What is committed is what the store lists, never what the driver remembers.

* Each worker has two shards in flight, so that its accelerator never idles between two shards. A
  shard that was lost before runs alone, so that it cannot take another shard with it; what a loss
  means for a shard is decided by the queue (`gc2ray.runner.shard_queue`).
* A worker that gives no answer for `stall_seconds` is killed. Placement and loading have time
  limits of their own.
* Workers are added while shards wait. When none wait, idle workers are dropped, except for one,
  which takes shards that are lost later. A worker on a draining node gets no more shards.
* When the run is stopped, or the output's storage refuses writes (it would refuse the next shard as
  well), no more shards are assigned, and those in flight have `drain_seconds` to end.

The cost of one turn depends on the events in it, not on the size of the plan; checks that look at
every worker run once a second.

Not covered: second copies of a slow shard at the end of a run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np

from gc2ray.core.config.job import Cluster, WorkerRange
from gc2ray.core.errors import (
    ConfigError,
    GivenUp,
    Interrupted,
    StorageRefused,
    UnwritableShard,
    first_line,
    storage_errors,
)
from gc2ray.core.shards import Shard, Shards, Span
from gc2ray.core.usage import Usage, UsageKind, UsageMeter
from gc2ray.data.store import Store
from gc2ray.output.parts import Commit
from gc2ray.output.plan import Plan
from gc2ray.output.planner import Committed, Judged, write_dead_letter
from gc2ray.runner import messages
from gc2ray.runner.messages import Display, Progress, Snapshot
from gc2ray.runner.shard_queue import Limits, Loss, ShardQueue
from gc2ray.runner.worker_table import IN_FLIGHT, SetupDeaths, WorkerState, WorkerTable

POLL_SECONDS = 0.5
CHECK_SECONDS = 1.0
"""Between two checks of every worker."""
BAD_ROWS_FROM = 200
"""Answers before the share of failed ones is judged; at the end of a run it always is."""

log = logging.getLogger(__name__)


class Driver:
    """Runs the shards of one plan.

    Args:
        cluster: Tries, time limits, number of workers.
        store: Where dead letters are written.
        pool: The workers.
        display: Called with the state about once a second.
        stop: Set when the run is to stop.

    Attributes:
        lost_races: Shards whose part another worker had already committed.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        pool: messages.WorkerPool,
        display: Display,
        stop: threading.Event | None = None,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._pool = pool
        self._display = display
        self._stop = stop or threading.Event()
        self._range = cluster.workers or WorkerRange(max=pool.default_workers())
        self._limits = Limits(cluster.tries, cluster.max_poison_rows)
        self._queue = ShardQueue(Shards.from_shards([]), np.zeros(0, np.bool_), self._limits)
        self._workers = WorkerTable()
        self._setup_deaths = SetupDeaths()
        self._meter = UsageMeter(cluster.gpus_per_worker or 1.0)
        self._usage = Usage()
        self._progress = Progress()  # of all workers, including those that are gone
        self._rows_before = 0
        self._total_rows = 0
        self._seconds_per_row: float | None = None
        self._phase = "starting"
        self._checked = float("-inf")
        self._dead_shards = 0
        self._refusal: str | None = None  # the storage's message, once it refuses writes
        self.lost_races = 0

    @property
    def most_workers(self) -> int:
        """The largest number of workers."""
        return self._range.max

    def usage(self) -> Usage:
        """How the workers' time was spent, as of the last second; callable from any thread.

        Shards in flight count as abandoned: they would be, if the driver died now.
        """
        return self._usage

    def calibrate(self, sample: Sequence[Span]) -> float:
        """Seconds per row on the first worker that has loaded; the others load meanwhile.

        Raises:
            GivenUp: No worker can be started, or the storage refuses writes.
            ConfigError: The model cannot be loaded.
            Interrupted: The run was stopped.
        """
        self._phase = "calibrating"
        rows = sum(span.rows for span in sample)
        while self._seconds_per_row is None:
            if self._stop.is_set():
                raise Interrupted("nothing was answered yet")
            if self._refusal is not None:
                raise GivenUp(f"{self._refusal}; nothing was answered yet")
            self._start_workers(rows)
            ready = self._workers.ready()
            if ready and not any(state.is_calibrating for _, state in self._workers.items()):
                state = self._workers[ready[0]]
                state.is_calibrating, state.active = True, self._pool.now()
                self._pool.calibrate(ready[0], sample)
            self._turn()
        return self._seconds_per_row

    def run(self, plan: Plan, committed: Committed) -> None:
        """Work until every shard is committed or given up.

        Raises:
            GivenUp: Too many answers failed, no worker can be started, or the storage refuses
                writes; in that case shards in flight had `drain_seconds` to end.
            ConfigError: The model cannot be loaded.
            Interrupted: The run was stopped; shards in flight had `drain_seconds` to end.
        """
        self._queue = ShardQueue(plan.shards, committed.shards, self._limits)
        self._total_rows, self._rows_before = plan.rows, committed.rows
        self._phase = "answering"
        try:
            while self._queue or self._workers.in_flight:
                if self._stop.is_set() or self._refusal is not None:
                    self._drain()
                self._assign_shards()
                self._start_workers(self._wanted())
                self._turn()
            if self._refusal is not None:  # of the last shard, or of its dead letter
                self._drain()
            self._display(self._snapshot())
        finally:
            self._stop_meter()

    def _drain(self) -> None:
        """Let shards in flight end until `drain_seconds` are over, then abandon the rest.

        Raises:
            GivenUp: The storage refuses writes.
            Interrupted: Otherwise.
        """
        self._phase = "stopping"
        deadline = self._pool.now() + self._cluster.drain_seconds
        while self._workers.in_flight and self._pool.now() < deadline:
            self._turn()
        in_flight = self._workers.in_flight
        abandoned = f"; {in_flight} in flight were abandoned" if in_flight else ""
        left = f"{len(self._queue) + in_flight} shards are left to answer{abandoned}"
        if self._refusal is None:
            raise Interrupted(left)
        raise GivenUp(
            f"{self._refusal}; {left}. Committed parts are safe: check the storage's permissions, "
            "credentials and free space, and run the same command again to resume"
        )

    def _stop_meter(self) -> None:
        for worker, state in self._workers.items():
            self._meter.stop(worker, state.usage(UsageKind.ABANDONED), self._pool.now())
        self._usage = self._meter.usage(self._pool.now(), {})

    def _turn(self) -> None:
        for event in self._pool.poll(POLL_SECONDS):
            if event.worker in self._workers:
                self._handle(event)
        if self._pool.now() - self._checked >= CHECK_SECONDS:
            self._checked = self._pool.now()
            self._check()

    def _check(self) -> None:
        """Whatever looks at every worker."""
        self._check_clocks()
        usage = {worker: s.usage(UsageKind.ABANDONED) for worker, s in self._workers.items()}
        self._usage = self._meter.usage(self._pool.now(), usage)
        self._display(self._snapshot())
        if self._refusal is None:
            self._judge_answers()

    def _start_workers(self, wanted: int) -> None:
        """Start workers up to the wanted number, at most the configured one.

        Workers that are being replaced do not count.
        """
        if self._pool.now() < self._setup_deaths.may_start_at:
            return
        for _ in range(min(self._range.max, wanted) - self._workers.staying):
            self._workers.add(self._pool.start(), self._pool.now())

    def _wanted(self) -> int:
        """Workers that stay, and one more for each shard that none of them is about to take."""
        workers = self._workers
        return workers.staying + len(self._queue) + workers.returning - workers.soon_free

    def _assign_shards(self) -> None:
        """Assign a shard to every worker that has none, then a second one to each."""
        for shards in range(IN_FLIGHT):
            for worker in self._workers.with_capacity(shards):
                if not self._assign(worker, self._workers[worker]):
                    break
        for worker in self._workers.idle()[max(1, self._workers.returning) :]:
            if not self._queue and len(self._workers) > self._range.min:
                self._drop(worker)

    def _assign(self, worker: int, state: WorkerState) -> bool:
        """Assign a shard to a worker; False if the queue has none for workers like it."""
        assignment = self._queue.take(worker, alone=not state.assignments)
        if assignment is None:
            return False
        if not state.assignments:
            state.active = self._pool.now()
            self._meter.spend(worker, UsageKind.IDLE, state.active)
        self._workers.assign(worker, assignment)
        self._pool.submit(worker, assignment)
        return True

    def _drop(self, worker: int) -> None:
        self._queue.leave(worker)
        state = self._workers.remove(worker)
        self._meter.stop(worker, state.usage(UsageKind.ABANDONED), self._pool.now())
        self._pool.drop(worker)

    def _handle(self, event: messages.Event) -> None:
        worker, state = event.worker, self._workers[event.worker]
        match event:
            case messages.WorkerPlaced() | messages.ModelLoaded() | messages.Calibrated():
                self._on_setup(state, event)
            case messages.Progressed():
                self._progress += state.note_progress(event.progress, self._pool.now())
            case messages.ShardFinished():
                self._on_finished(state, event)
            case messages.CallFailed():
                self._on_failed(state, event)
            case messages.WorkerDraining():
                self._on_draining(worker, state)
            case messages.WorkerExited():
                self._workers.end(worker)
                self._workers.replace(worker)
            case messages.WorkerDied():
                self._on_died(event)

    def _on_setup(self, state: WorkerState, event: messages.SetupEvent) -> None:
        """A worker has completed a step of its setup."""
        worker, now = event.worker, self._pool.now()
        state.active = now
        match event:
            case messages.WorkerPlaced():
                state.placed = now
                self._meter.start(worker, now)
                self._pool.load(worker)
            case messages.ModelLoaded():
                self._meter.spend(worker, UsageKind.LOADING, now)
                self._workers.load(worker, now)
            case messages.Calibrated():
                self._meter.spend(worker, UsageKind.CALIBRATING, now)
                state.is_calibrating, self._seconds_per_row = False, event.seconds_per_row

    def _on_finished(self, state: WorkerState, event: messages.ShardFinished) -> None:
        has_won = event.result.commit == Commit.WON
        usage = UsageKind.USEFUL if has_won else UsageKind.LOST_RACE
        self._end_try(event.worker, state, event.shard, usage)
        self._queue.done(event.shard)
        self._setup_deaths.clear()
        self.lost_races += not has_won

    def _on_failed(self, state: WorkerState, event: messages.CallFailed) -> None:
        worker, error = event.worker, event.error
        reason = f"{type(error).__name__}: {error}"
        is_refusal = isinstance(error, StorageRefused)
        if is_refusal:
            self._refuse(str(error))
        if event.shard is not None:
            self._end_try(worker, state, event.shard, UsageKind.FAILED)
            if is_refusal:
                self._queue.put_back(event.shard)
            else:
                is_final = isinstance(error, UnwritableShard)
                self._lose(event.shard, Loss(reason, is_final=is_final))
        elif isinstance(error, ConfigError):
            raise error
        else:
            self._pool.drop(worker)
            self._on_died(messages.WorkerDied(worker, reason))

    def _end_try(self, worker: int, state: WorkerState, shard: Shard, usage: UsageKind) -> None:
        """A shard has left a worker that lives."""
        state.active = self._pool.now()
        self._meter.spend(worker, usage, state.active)
        self._workers.release(worker, shard)
        if state.is_replaced and not state.assignments:
            self._drop(worker)

    def _refuse(self, reason: str) -> None:
        """The storage refuses writes; the run ends with the first message."""
        log.warning("%s", reason)
        self._refusal = self._refusal or reason

    def _on_draining(self, worker: int, state: WorkerState) -> None:
        """The worker ends its shards, and another starts."""
        log.warning("worker %d gets no more shards: its node is draining", worker)
        self._workers.replace(worker)
        if not state.is_busy:
            self._drop(worker)

    def _on_died(self, event: messages.WorkerDied) -> None:
        """A worker is gone; its shards are assigned again, each alone."""
        self._queue.leave(event.worker)
        state = self._workers.remove(event.worker)
        fields = {"worker": event.worker, "shards": list(state.assignments)}
        log.warning("worker %d is gone: %s", event.worker, event.reason, extra=fields)
        usage = state.usage(UsageKind.STALLED if state.is_stalled else UsageKind.DIED)
        now = self._pool.now()
        self._meter.stop(event.worker, usage, now if event.ended is None else event.ended)
        if state.is_setting_up and not event.node_lost:
            is_alone = not self._workers.in_flight
            self._setup_deaths.count(event.reason, now, is_alone=is_alone)
        for assignment in state.assignments.values():
            shard = assignment.shard
            self._lose(shard, Loss.from_death(event, shard, is_stall=state.is_stalled))

    def _lose(self, shard: Shard, loss: Loss) -> None:
        """A try of a shard has failed: the shard is tried again or given up."""
        fields = {"shard": shard.sid}
        log.info("shard %d is lost: %s", shard.index, loss.reason, extra=fields)
        reason = self._queue.lost(shard, loss)
        if reason is None:
            return
        log.warning("shard %d is given up: %s", shard.index, reason, extra=fields)
        try:
            write_dead_letter(self._store, shard, self._queue.tries(shard), reason)
        except storage_errors() as error:  # a shard without a dead letter is answered next time
            self._refuse(
                f"shard {shard.index} is given up ({reason}), and {self._store.uri} refused its "
                f"dead letter: {type(error).__name__}: {first_line(error)}"
            )
        self._dead_shards += 1

    def _check_clocks(self) -> None:
        """Kill workers that make no progress, and report those that find no room."""
        now = self._pool.now()
        for worker, state in list(self._workers.items()):
            if state.is_waiting_for_placement and now - state.started > self._cluster.place_seconds:
                self._on_unplaced(state)
            reason = state.overdue(now, self._cluster)
            if reason is not None:
                self._workers.end(worker, is_stalled=True)
                self._pool.kill(worker, reason)  # `WorkerDied` follows, with the rows in hand

    def _on_unplaced(self, state: WorkerState) -> None:
        """The cluster has no room for a worker: run with fewer, or give up below the minimum.

        The worker is not dropped: it starts when there is room, and an autoscaler sees its request.

        Raises:
            GivenUp: Fewer than the minimum have a place.
        """
        message = f"no room for a worker within {self._cluster.place_seconds:g} s"
        message += f": {self._pool.resource_summary()}"
        placed = sum(other.placed is not None for _, other in self._workers.items())
        if placed < self._range.min:
            raise GivenUp(message)
        state.is_unplaced = True
        log.warning("%s; the run continues with %d", message, placed)

    def _judge_answers(self) -> None:
        """Stop a run whose answers fail.

        Raises:
            GivenUp: More answers failed than `max_bad_rows` allows.
        """
        progress = self._progress
        judged = Judged(progress.answers, progress.bad_answers, self._cluster.max_bad_rows)
        if judged.answers < BAD_ROWS_FROM or not judged.is_too_many:
            return
        raise GivenUp(
            f"{judged}; fix the input or raise the limit, and run the same command again to "
            "resume; the first errors:\n  " + "\n  ".join(progress.errors)
        )

    def _snapshot(self) -> Snapshot:
        progress = self._progress
        return Snapshot(
            rows=min(self._rows_before + progress.rows, self._total_rows),
            total_rows=self._total_rows,
            bad_answers=progress.bad_answers,
            visual_tokens_full=progress.visual_tokens_full,
            visual_tokens_kept=progress.visual_tokens_kept,
            workers=self._workers.loaded,
            dead_shards=self._dead_shards,
            phase=self._phase,
        )
