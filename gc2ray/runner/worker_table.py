"""`WorkerTable`: what the driver knows about each worker, and which workers can take a shard.

The driver asks after every event who is loading, who is to be replaced and who can take a shard.
The table keeps these groups up to date as workers change, so that an answer does not scan all
workers.
"""

from __future__ import annotations

from collections.abc import ItemsView
from dataclasses import dataclass, field

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import GivenUp
from gc2ray.core.shards import Shard
from gc2ray.core.usage import UsageKind
from gc2ray.runner.messages import Progress, ShardAssignment

IN_FLIGHT = 2
"""Shards of one worker at a time: the next one is there when the first ends."""
SETUP_DEATHS = 3
"""Workers that die during setup, with no shard done in between, before the run gives up.

A death does not count if the worker's node may have been lost, or while another worker answers,
whose row may have taken the memory: neither says anything about the other workers.
"""
SETUP_PAUSE_SECONDS = 5.0
"""Pause before the next start after a worker died during setup, times the deaths that count.

The memory of a process comes back to its host some seconds after its end; a worker that starts
before that is killed for the lack of it.
"""


@dataclass(eq=False)
class WorkerState:
    """What the driver knows about one worker; times are on the pool's clock.

    Attributes:
        started: When it was requested.
        placed: When its process was up.
        loaded: When its model was in memory.
        active: When it last did anything.
        progress: Its progress, as last reported.
        assignments: The shards that it has, by sid.
        is_calibrating: Whether it measures its speed.
        is_replaced: Whether it gets no more shards, so that another worker may start in its place.
        has_ended: Whether its process is gone or was killed; `WorkerDied` has not come yet.
        is_stalled: Whether it was killed because it made no progress.
        is_unplaced: Whether a warning was logged that it found no room.
    """

    started: float
    placed: float | None = None
    loaded: float | None = None
    active: float = 0.0
    progress: Progress = field(default_factory=Progress)
    assignments: dict[str, ShardAssignment] = field(default_factory=dict)
    is_calibrating: bool = False
    is_replaced: bool = False
    has_ended: bool = False
    is_stalled: bool = False
    is_unplaced: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether it can be given something to do."""
        return self.loaded is not None and not (self.is_replaced or self.has_ended)

    @property
    def has_capacity(self) -> bool:
        """Whether it can take another shard: two at a time, or one that was lost before."""
        if not self.is_ready:
            return False
        is_retrying = any(assignment.attempt > 1 for assignment in self.assignments.values())
        return not is_retrying and len(self.assignments) < IN_FLIGHT

    @property
    def is_busy(self) -> bool:
        return bool(self.assignments) or self.is_calibrating

    @property
    def is_setting_up(self) -> bool:
        """Whether it has not loaded, or measures its speed."""
        return self.loaded is None or self.is_calibrating

    @property
    def is_waiting_for_placement(self) -> bool:
        """Whether its process is not up, and no warning was logged yet."""
        return self.placed is None and not (self.is_unplaced or self.has_ended)

    def usage(self, answering: UsageKind) -> UsageKind:
        """What its time is spent on; `answering` while it has a shard."""
        if self.loaded is None:
            return UsageKind.LOADING
        if self.is_calibrating:
            return UsageKind.CALIBRATING
        return answering if self.assignments else UsageKind.IDLE

    def note_progress(self, progress: Progress, now: float) -> Progress:
        """Take a report into account; returns what is new in it."""
        new = progress.since(self.progress)
        if new.answers > 0 or (self.is_setting_up and new.ticks > 0):
            self.active = now
        self.progress = progress
        return new

    def overdue(self, now: float, cluster: Cluster) -> str | None:
        """Why the worker is to be killed, if it made no progress for too long."""
        if self.has_ended or self.placed is None:
            return None
        if self.loaded is None:
            limit, reason = cluster.load_seconds, "no progress in loading"
        elif self.is_busy:
            limit, reason = cluster.stall_seconds, "stalled: no answer"
        else:
            return None
        return f"{reason} for {limit:g} s" if now - self.active > limit else None


class WorkerTable:
    """The workers of a run by number.

    Attributes:
        in_flight: Shards that are assigned, of all workers.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._states: dict[int, WorkerState] = {}
        self._loading: set[int] = set()  # not loaded yet
        self._replaced: set[int] = set()
        self._with_capacity: set[int] = set()

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, worker: int) -> bool:
        return worker in self._states

    def __getitem__(self, worker: int) -> WorkerState:
        return self._states[worker]

    def items(self) -> ItemsView[int, WorkerState]:
        """Numbers and states."""
        return self._states.items()

    @property
    def loaded(self) -> int:
        """How many workers have loaded their model."""
        return len(self._states) - len(self._loading)

    @property
    def staying(self) -> int:
        """How many workers are not to be replaced."""
        return len(self._states) - len(self._replaced)

    @property
    def soon_free(self) -> int:
        """How many workers that stay are about to take a shard: they load, or are idle."""
        return len(self._loading - self._replaced) + len(self.idle())

    @property
    def returning(self) -> int:
        """How many shards will be assigned again: their worker has ended, its journal is read."""
        states = (self._states[worker] for worker in self._replaced)
        return sum(len(state.assignments) for state in states if state.has_ended)

    def idle(self) -> list[int]:
        """Workers that can take a shard and have none."""
        return self.with_capacity(0)

    def ready(self) -> list[int]:
        """Workers that can be given something to do."""
        return [worker for worker, state in self._states.items() if state.is_ready]

    def with_capacity(self, shards: int) -> list[int]:
        """Workers that have so many shards and can take another, in order."""
        workers = sorted(self._with_capacity)
        return [worker for worker in workers if len(self._states[worker].assignments) == shards]

    def add(self, worker: int, now: float) -> None:
        """A worker was requested."""
        self._states[worker] = WorkerState(started=now)
        self._loading.add(worker)

    def load(self, worker: int, now: float) -> None:
        """A worker has loaded its model."""
        self._states[worker].loaded = now
        self._loading.discard(worker)
        self._update(worker)

    def assign(self, worker: int, assignment: ShardAssignment) -> None:
        """A worker gets a shard."""
        self._states[worker].assignments[assignment.shard.sid] = assignment
        self.in_flight += 1
        self._update(worker)

    def release(self, worker: int, shard: Shard) -> None:
        """A shard has left a worker that lives."""
        self.in_flight -= self._states[worker].assignments.pop(shard.sid, None) is not None
        self._update(worker)

    def replace(self, worker: int) -> None:
        """A worker gets no more shards, and another may start."""
        self._states[worker].is_replaced = True
        self._replaced.add(worker)
        self._update(worker)

    def end(self, worker: int, *, is_stalled: bool = False) -> None:
        """A worker's process has ended, or was killed because it made no progress."""
        state = self._states[worker]
        state.has_ended, state.is_stalled = True, state.is_stalled or is_stalled
        self._update(worker)

    def remove(self, worker: int) -> WorkerState:
        """A worker is gone, and its shards with it."""
        for group in (self._with_capacity, self._loading, self._replaced):
            group.discard(worker)
        state = self._states.pop(worker)
        self.in_flight -= len(state.assignments)
        return state

    def _update(self, worker: int) -> None:
        if self._states[worker].has_capacity:
            self._with_capacity.add(worker)
        else:
            self._with_capacity.discard(worker)


@dataclass(eq=False)
class SetupDeaths:
    """Workers that died during setup: when the next may start, and when the run gives up."""

    may_start_at: float = float("-inf")
    _in_a_row: int = 0

    def clear(self) -> None:
        """A worker has done a shard."""
        self._in_a_row = 0

    def count(self, reason: str, now: float, *, is_alone: bool) -> None:
        """A worker died during setup, on a node that is there.

        Args:
            reason: Why it died.
            now: The time on the pool's clock.
            is_alone: Whether no other worker answers.

        Raises:
            GivenUp: `SETUP_DEATHS` of them in a row.
        """
        self._in_a_row += is_alone
        if self._in_a_row >= SETUP_DEATHS:
            raise GivenUp(f"{SETUP_DEATHS} workers in a row died while starting: {reason}")
        self.may_start_at = now + SETUP_PAUSE_SECONDS * max(1, self._in_a_row)
