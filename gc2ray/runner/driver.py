"""The driver: hands shards to workers, and knows when to give up on one.

It talks to workers through a `WorkerPool`, so that its decisions can be tested without Ray and
without waiting. What is committed is what the store lists, never what the driver remembers.

Rules: two shards in flight per worker, so that a border never drains an accelerator; a shard that
was lost runs alone, so that it takes no other with it; what a loss means for the shard is the
queue's business (`gc2ray.runner.shard_queue`). A worker that gives no answer for `stall_seconds` is
killed. Placement and loading have clocks of their own. Workers are added while shards wait; when
none do, those without any are dropped, but one, which takes what gets lost. One whose node is about
to go gets no more. Told to stop, or refused by the output's storage, which would refuse the next
shard as well, it hands out nothing more and waits `drain_seconds` for what is in flight.

What a turn costs depends on what happened in it, not on the size of the plan; what looks at every
worker is done once a second.

Not covered: second copies of a slow shard at the end of a run.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import numpy as np

from gc2ray.core.config.job import Cluster, WorkerRange
from gc2ray.core.errors import (
    STORAGE_ERRORS,
    ConfigError,
    GivenUp,
    Interrupted,
    StorageRefused,
    UnwritableShard,
    first_line,
)
from gc2ray.core.shards import Shard, Shards, Span
from gc2ray.core.usage import Usage, UsageKind, UsageMeter
from gc2ray.data.store import Store
from gc2ray.output.parts import Commit
from gc2ray.output.plan import Plan
from gc2ray.output.planner import Committed
from gc2ray.runner import messages
from gc2ray.runner.messages import Progress, ShardAssignment
from gc2ray.runner.shard_queue import Limits, Loss, ShardQueue

IN_FLIGHT = 2
POLL_SECONDS = 0.5
LOOK_SECONDS = 1.0
"""Between two looks at every worker."""
SETUP_DEATHS = 3
"""Workers that die while setting up, with no shard done in between: then the run gives up.

Those do not count that may have gone with their node, or while another answers, whose row may have
taken the memory: that says nothing about the others.
"""
SETUP_PAUSE_SECONDS = 5.0
"""Until another worker starts after one died while starting, times the number of those that count.

What a process held comes back to the host some seconds after its end; whoever starts meanwhile is
killed for it.
"""
BAD_ROWS_FROM = 200
"""Answers before the share of bad ones is judged; at the end of a run it always is."""

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
    handouts: dict[str, ShardAssignment] = field(default_factory=dict)
    is_calibrating: bool = False
    is_leaving: bool = False
    has_ended: bool = False
    is_stalled: bool = False
    is_unplaced: bool = False

    @property
    def is_at_hand(self) -> bool:
        """Whether it may be given something to do."""
        return self.loaded is not None and not (self.is_leaving or self.has_ended)

    @property
    def has_room(self) -> bool:
        """Whether it may take another shard: two at a time, and one that was lost alone."""
        if not self.is_at_hand:
            return False
        lost = any(handout.attempt > 1 for handout in self.handouts.values())
        return not lost and len(self.handouts) < IN_FLIGHT

    @property
    def is_busy(self) -> bool:
        return bool(self.handouts) or self.is_calibrating


class Driver:
    """Runs the shards of one plan.

    Args:
        cluster: Tries, clocks, number of workers.
        store: Where dead letters go.
        pool: The workers.
        display: Shown the state about once a second.
        stop: Set when the run is to stop.

    Attributes:
        lost_races: Shards that somebody else had committed first.
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
        self._workers: dict[int, _WorkerState] = {}
        self._setting_up: set[int] = set()  # of the workers those that are not loaded
        self._leaving: set[int] = set()  # those whose node is about to go
        self._hungry: set[int] = set()  # those that may have room
        self._meter = UsageMeter(cluster.gpus_per_worker or 1.0)
        self._flying = 0  # shards that are handed out
        self._seen = Progress()  # of all workers, those that are gone too
        self._done_before = 0
        self._total_rows = 0
        self._bill = Usage()
        self._setup_deaths = 0
        self._start_from = float("-inf")
        self._seconds_per_row: float | None = None
        self._phase = "starting"
        self._looked = float("-inf")
        self._dead_shards = 0
        self._refusal: str | None = None  # what the storage said, once it takes nothing more
        self.lost_races = 0

    @property
    def most_workers(self) -> int:
        """As many as there may be."""
        return self._range.max

    def bill(self) -> Usage:
        """What became of the workers' time, as of the last second; callable from any thread.

        What is in flight counts as abandoned: it would be, if the driver died now.
        """
        return self._bill

    def calibrate(self, sample: Sequence[Span]) -> float:
        """Seconds per row on the first worker that has loaded; the others load meanwhile.

        Raises:
            GivenUp: No worker can be had, or the storage refuses.
            ConfigError: The model cannot be loaded.
            Interrupted: It was told to stop.
        """
        self._phase = "calibrating"
        rows = sum(span.rows for span in sample)
        while self._seconds_per_row is None:
            if self._stop.is_set():
                raise Interrupted("nothing was answered yet")
            if self._refusal is not None:
                raise GivenUp(f"{self._refusal}; nothing was answered yet")
            self._staff(rows)
            at_hand = [key for key, state in self._workers.items() if state.is_at_hand]
            if at_hand and not any(state.is_calibrating for state in self._workers.values()):
                state = self._workers[at_hand[0]]
                state.is_calibrating, state.active = True, self._pool.now()
                self._pool.calibrate(at_hand[0], sample)
            self._turn()
        return self._seconds_per_row

    def run(self, plan: Plan, committed: Committed) -> None:
        """Work until every shard is committed or dead.

        Raises:
            GivenUp: Too many bad rows, no worker can be had, or the storage refuses.
            ConfigError: The model cannot be loaded.
            Interrupted: It was told to stop; what was in flight had `drain_seconds`, and so it has
                where the storage refuses.
        """
        self._queue = ShardQueue(plan.shards, committed.shards, self._limits)
        self._total_rows, self._done_before = plan.rows, committed.rows
        self._phase = "answering"
        try:
            while self._queue or self._flying:
                if self._stop.is_set() or self._refusal is not None:
                    self._drain()
                self._hand_out()
                self._staff(self._wanted())
                self._turn()
            if self._refusal is not None:  # of the last shard, or of its dead letter
                self._drain()
            self._display(self._snapshot())
        finally:
            self._settle()

    def _drain(self) -> None:
        """Commit what ends in time, abandon the rest.

        Raises:
            GivenUp: The storage refuses.
            Interrupted: Otherwise.
        """
        self._phase = "stopping"
        deadline = self._pool.now() + self._cluster.drain_seconds
        while self._flying and self._pool.now() < deadline:
            self._turn()
        left = f"; {self._flying} in flight were abandoned" if self._flying else ""
        left = f"{len(self._queue) + self._flying} shards are left to answer{left}"
        if self._refusal is None:
            raise Interrupted(left)
        raise GivenUp(
            f"{self._refusal}; {left}. Nothing that is committed is lost: see to the storage "
            "(permission, credentials, room), and run the same command again to go on"
        )

    def _settle(self) -> None:
        """What the workers did last."""
        for worker, state in self._workers.items():
            self._meter.stop(worker, self._use(state, UsageKind.ABANDONED), self._pool.now())
        self._bill = self._meter.usage(self._pool.now(), {})

    def _use(self, state: _WorkerState, busy: UsageKind) -> UsageKind:
        """What a worker's time is spent on: `busy` if it has something to answer."""
        if state.loaded is None:
            return UsageKind.LOADING
        if state.is_calibrating:
            return UsageKind.CALIBRATING
        return busy if state.handouts else UsageKind.IDLE

    def _turn(self) -> None:
        for event in self._pool.poll(POLL_SECONDS):
            if event.worker in self._workers:
                self._handle(event)
        if self._pool.now() - self._looked >= LOOK_SECONDS:
            self._looked = self._pool.now()
            self._look()

    def _look(self) -> None:
        """Whatever looks at every worker."""
        self._check_clocks()
        uses = {worker: self._use(s, UsageKind.ABANDONED) for worker, s in self._workers.items()}
        self._bill = self._meter.usage(self._pool.now(), uses)
        self._display(self._snapshot())
        if self._refusal is None:
            self._judge_rows()

    def _staff(self, wanted: int) -> None:
        """Start workers up to as many as are wanted, and may be; those that leave are extra."""
        if self._pool.now() < self._start_from:
            return
        staying = len(self._workers) - len(self._leaving)
        for _ in range(min(self._range.max, wanted) - staying):
            worker = self._pool.start()
            self._workers[worker] = _WorkerState(started=self._pool.now())
            self._setting_up.add(worker)

    def _hand_out(self) -> None:
        """A shard to every worker that has none, then a second one to each."""
        for shards in range(IN_FLIGHT):
            for worker in sorted(self._hungry):
                state = self._workers[worker]
                if len(state.handouts) == shards and not self._hand(worker, state):
                    break
        for worker in self._idle()[max(1, self._returning()) :] if not self._queue else ():
            if len(self._workers) > self._range.min:
                self._drop(worker)

    def _idle(self) -> list[int]:
        """Workers that have nothing to do."""
        return [worker for worker in sorted(self._hungry) if not self._workers[worker].handouts]

    def _returning(self) -> int:
        """Shards that will be handed out again: their worker has ended, and is looked into."""
        gone = (self._workers[worker] for worker in self._leaving)
        return sum(len(state.handouts) for state in gone if state.has_ended)

    def _wanted(self) -> int:
        """Workers that stay, and one more for each shard that none of them is about to take."""
        staying = len(self._workers) - len(self._leaving)
        about_to = len(self._setting_up - self._leaving) + len(self._idle())
        return staying + len(self._queue) + self._returning() - about_to

    def _hand(self, worker: int, state: _WorkerState) -> bool:
        """Give a worker a shard if it has room; False if there is none for anybody like it."""
        if state.has_room:
            handout = self._queue.take(worker, alone=not state.handouts)
            if handout is None:
                return False
            if not state.handouts:
                state.active = self._pool.now()
                self._meter.spend(worker, UsageKind.IDLE, state.active)
            state.handouts[handout.shard.sid] = handout
            self._flying += 1
            self._pool.submit(worker, handout)
        if not state.has_room:
            self._hungry.discard(worker)
        return True

    def _drop(self, worker: int) -> None:
        state = self._remove(worker)
        self._meter.stop(worker, self._use(state, UsageKind.ABANDONED), self._pool.now())
        self._pool.drop(worker)

    def _remove(self, worker: int) -> _WorkerState:
        state = self._workers.pop(worker)
        for group in (self._hungry, self._setting_up, self._leaving):
            group.discard(worker)
        self._queue.leave(worker)
        return state

    def _handle(self, event: messages.Event) -> None:
        worker, state = event.worker, self._workers[event.worker]
        match event:
            case messages.WorkerPlaced() | messages.ModelLoaded() | messages.Calibrated():
                self._get_on(worker, state, event)
            case messages.Progressed():
                self._note(state, event.progress)
            case messages.ShardFinished():
                self._finished(worker, state, event)
            case messages.CallFailed():
                self._failed(worker, state, event)
            case messages.WorkerDraining():
                self._leave(worker, state)
            case messages.WorkerExited():
                state.has_ended = True
                self._replace(worker, state)
            case messages.WorkerDied():
                self._bury(worker, event)

    def _get_on(
        self,
        worker: int,
        state: _WorkerState,
        event: messages.WorkerPlaced | messages.ModelLoaded | messages.Calibrated,
    ) -> None:
        """A worker has done a step of its setting up."""
        state.active = self._pool.now()
        match event:
            case messages.WorkerPlaced():
                state.placed = state.active
                self._meter.start(worker, state.active)
                self._pool.load(worker)
            case messages.ModelLoaded():
                self._meter.spend(worker, UsageKind.LOADING, state.active)
                state.loaded = state.active
                self._setting_up.discard(worker)
                self._hungry.add(worker)
            case messages.Calibrated():
                self._meter.spend(worker, UsageKind.CALIBRATING, state.active)
                state.is_calibrating, self._seconds_per_row = False, event.seconds_per_row

    def _note(self, state: _WorkerState, progress: Progress) -> None:
        moved = progress.answers > state.progress.answers
        setting_up = state.loaded is None or state.is_calibrating
        if moved or (setting_up and progress.ticks > state.progress.ticks):
            state.active = self._pool.now()
        self._seen += progress.since(state.progress)
        state.progress = progress

    def _finished(self, worker: int, state: _WorkerState, event: messages.ShardFinished) -> None:
        has_won = event.result.commit == Commit.WON
        self._end_try(
            worker, state, event.shard, UsageKind.USEFUL if has_won else UsageKind.LOST_RACE
        )
        self._queue.done(event.shard)
        self._setup_deaths = 0
        self.lost_races += not has_won

    def _end_try(self, worker: int, state: _WorkerState, shard: Shard, use: UsageKind) -> None:
        """A shard has left a worker that lives."""
        state.active = self._pool.now()
        self._meter.spend(worker, use, state.active)
        self._flying -= state.handouts.pop(shard.sid, None) is not None
        self._hungry.add(worker)
        if state.is_leaving and not state.handouts:
            self._drop(worker)

    def _failed(self, worker: int, state: _WorkerState, event: messages.CallFailed) -> None:
        reason = f"{type(event.error).__name__}: {event.error}"
        refused = isinstance(event.error, StorageRefused)
        if refused:
            self._refuse(str(event.error))
        if event.shard is not None:
            self._end_try(worker, state, event.shard, UsageKind.FAILED)
            if refused:
                self._queue.put_back(event.shard)
            else:
                is_final = isinstance(event.error, UnwritableShard)
                self._lost(event.shard, Loss(reason, is_final=is_final))
        elif isinstance(event.error, ConfigError):
            raise event.error
        else:
            self._pool.drop(worker)
            self._bury(worker, messages.WorkerDied(worker, reason))

    def _refuse(self, reason: str) -> None:
        """The storage takes nothing more: the first reason is the run's."""
        log.warning("%s", reason)
        self._refusal = self._refusal or reason

    def _leave(self, worker: int, state: _WorkerState) -> None:
        """It ends what it has, and another starts."""
        log.warning("worker %d gets no more shards: its node is about to go", worker)
        self._replace(worker, state)
        if not state.is_busy:
            self._drop(worker)

    def _replace(self, worker: int, state: _WorkerState) -> None:
        """It gets no more, and another may start."""
        state.is_leaving = True
        self._leaving.add(worker)
        self._hungry.discard(worker)

    def _bury(self, worker: int, event: messages.WorkerDied) -> None:
        """A worker is gone; its shards are handed out again, each alone."""
        state = self._remove(worker)
        told = {"worker": worker, "shards": list(state.handouts)}
        log.warning("worker %d is gone: %s", worker, event.reason, extra=told)
        died = UsageKind.STALLED if state.is_stalled else UsageKind.DIED
        ended = self._pool.now() if event.ended is None else event.ended
        self._meter.stop(worker, self._use(state, died), ended)
        if (state.loaded is None or state.is_calibrating) and not event.node_lost:
            self._setup_death(event.reason)
        self._flying -= len(state.handouts)
        for handout in state.handouts.values():
            self._lost(handout.shard, _death(event, handout.shard, is_stall=state.is_stalled))

    def _setup_death(self, reason: str) -> None:
        """A worker died while starting, on a node that is there.

        Raises:
            GivenUp: As the ones before it did, and no other worker answers.
        """
        self._setup_deaths += not self._flying
        if self._setup_deaths >= SETUP_DEATHS:
            raise GivenUp(f"{SETUP_DEATHS} workers in a row died while starting: {reason}")
        self._start_from = self._pool.now() + SETUP_PAUSE_SECONDS * max(1, self._setup_deaths)

    def _lost(self, shard: Shard, loss: Loss) -> None:
        told = {"shard": shard.sid}
        log.info("shard %d is lost: %s", shard.index, loss.reason, extra=told)
        reason = self._queue.lost(shard, loss)
        if reason is None:
            return
        log.warning("shard %d is given up: %s", shard.index, reason, extra=told)
        try:
            self._write_letter(shard, reason)
        except STORAGE_ERRORS as error:  # a shard without a letter is answered again, next time
            said = f"{type(error).__name__}: {first_line(error)}"
            self._refuse(
                f"shard {shard.index} is given up ({reason}), and {self._store.uri} refused its "
                f"dead letter: {said}"
            )
        self._dead_shards += 1

    def _write_letter(self, shard: Shard, reason: str) -> None:
        """Leave behind why a shard is given up.

        Raises:
            OSError, or another of `STORAGE_ERRORS`: It could not be written.
        """
        letter = {
            "sid": shard.sid,
            "shard": shard.index,
            "tries": self._queue.tries(shard),
            "reason": reason,
            "rows": shard.rows,
            "spans": [asdict(span) for span in shard.spans],
            "time": datetime.now(UTC).isoformat(),
        }
        data = (json.dumps(letter, indent=2) + "\n").encode()
        number = self._queue.tries(shard)
        while not self._store.create(f"dead/{shard.sid}.{number}.json", data):
            number += 1  # of an earlier run of the same plan

    def _check_clocks(self) -> None:
        now, clocks = self._pool.now(), self._cluster
        for worker, state in list(self._workers.items()):
            if state.has_ended:
                continue
            if state.placed is None:
                if now - state.started > clocks.place_seconds and not state.is_unplaced:
                    self._unplaced(state)
            elif state.loaded is None:
                if now - state.active > clocks.load_seconds:
                    self._kill(worker, f"no progress in loading for {clocks.load_seconds:g} s")
            elif state.is_busy and now - state.active > clocks.stall_seconds:
                self._kill(worker, f"stalled: no answer for {clocks.stall_seconds:g} s")

    def _kill(self, worker: int, reason: str) -> None:
        """End a worker that does not get on; `WorkerDied` tells what it had in hand."""
        state = self._workers[worker]
        state.is_stalled = state.has_ended = True
        self._pool.kill(worker, reason)

    def _unplaced(self, state: _WorkerState) -> None:
        """No room for a worker: go on with fewer, or give up when there are too few.

        It is not dropped: it starts when there is room, and an autoscaler sees that it waits.
        """
        message = f"no room for a worker within {self._cluster.place_seconds:g} s: "
        placed = sum(state.placed is not None for state in self._workers.values())
        if placed < self._range.min:
            raise GivenUp(message + self._pool.room())
        state.is_unplaced = True
        log.warning("%s%s; going on with %d", message, self._pool.room(), placed)

    def _judge_rows(self) -> None:
        answers, bad = self._seen.answers, self._seen.bad_answers
        if answers < BAD_ROWS_FROM or bad <= self._cluster.max_bad_rows * answers:
            return
        raise GivenUp(
            f"{bad} of {answers} answers failed, more than cluster.max_bad_rows = "
            f"{self._cluster.max_bad_rows:g} allows; see to the input, or raise that, and run the "
            "same command again to go on; the first:\n  " + "\n  ".join(self._seen.errors)
        )

    def _snapshot(self) -> Snapshot:
        seen = self._seen
        return Snapshot(
            rows=min(self._done_before + seen.rows, self._total_rows),
            total_rows=self._total_rows,
            bad_answers=seen.bad_answers,
            visual_tokens_full=seen.visual_tokens_full,
            visual_tokens_kept=seen.visual_tokens_kept,
            workers=len(self._workers) - len(self._setting_up),
            dead_shards=self._dead_shards,
            phase=self._phase,
        )


def _death(event: messages.WorkerDied, shard: Shard, *, is_stall: bool) -> Loss:
    """What the end of a worker means for one of its shards."""
    own = event.in_hand.get(shard.sid)
    return Loss(
        event.reason,
        own or (),
        is_shared=any(rows for sid, rows in event.in_hand.items() if sid != shard.sid),
        is_begun=own != (),
        is_stall=is_stall,
    )
