"""`ShardQueue`: which shard is next, and what becomes of one that was lost.

Shards that continue each other within a row group go to one worker, which need not find its place
in the file again; a worker without any takes half of what another has before it. So the queue is a
few ranges, whatever the size of the plan, and remembers single shards only while they are in
trouble.

A loss teaches something, or it costs a try:

* Rows that were in hand when a worker died are suspects. The next try answers them first, few at a
  time (`gc2ray.runner.messages`), so the next death leaves fewer, until one is alone in hand when
  its worker dies. Once is chance: workers are killed from outside, too. A row with which two
  workers died, each with nothing else in hand, is named: what is written for it is that it kills,
  or that no answer comes.
* Suspects that all pass did no harm: the death before was somebody else's doing, or that of rows in
  company. So `SEARCHES_A_TRY` deaths of that kind cost a try, each of them is looked into; a stall,
  which costs minutes, costs one by itself.
* A shard that waited beside another in a worker that died was not tried.
* A failure, or a death that names no rows, costs a try; one that every try would meet gives up.

After `tries` of those, or more than `poison_rows` named rows, a shard is given up. Every way ends.

Not covered: which worker asks, and how many shards it may have (`gc2ray.runner.driver`).
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from gc2ray.core.errors import Status
from gc2ray.core.shards import Booleans, Shard, Shards
from gc2ray.runner.messages import PoisonRow, ShardAssignment, WorkerDied


@dataclass(frozen=True)
class Loss:
    """Why a try of a shard came to nothing.

    Attributes:
        reason: For people.
        in_hand: Rows of the shard that the worker had in hand, by place; empty where the worker
            lives, or nobody can tell.
        is_stall: It was ended because no answer came.
        is_shared: The worker had rows of another shard in hand, too.
        is_begun: Something of the shard was tried, as far as anybody can tell.
        is_final: Another try would end the same way.
    """

    reason: str
    in_hand: tuple[int, ...] = ()
    is_stall: bool = False
    is_shared: bool = False
    is_begun: bool = True
    is_final: bool = False

    @staticmethod
    def from_death(event: WorkerDied, shard: Shard, *, is_stall: bool) -> Loss:
        """What the death of a worker means for one of its shards."""
        rows = event.in_hand.get(shard.sid)
        return Loss(
            event.reason,
            rows or (),
            is_shared=any(rows for sid, rows in event.in_hand.items() if sid != shard.sid),
            is_begun=rows != (),
            is_stall=is_stall,
        )


@dataclass(frozen=True)
class Limits:
    """When a shard is given up: losses that taught nothing, and rows that kill."""

    tries: int
    poison_rows: int


DEATHS_ALONE = 2
"""Of workers with one and the same row in hand and nothing else, before it is named."""
SEARCHES_A_TRY = 4
"""Deaths that cost a try together, where those before them have found no row that kills."""


@dataclass(eq=False)
class _Trouble:
    """What the losses of one shard have taught."""

    losses: int = 0
    tries: int = 0
    searches: int = 0  # that found nothing
    suspects: frozenset[int] = frozenset()
    is_searching: bool = False
    alone: Counter[int] = field(default_factory=Counter)  # deaths by row that was alone in hand
    poison: dict[int, PoisonRow] = field(default_factory=dict)

    def learn(self, loss: Loss) -> None:
        """Take a loss into account."""
        self.losses += 1
        in_hand = frozenset(loss.in_hand) - self.poison.keys()
        if not in_hand:
            waited = self.losses == 1 and not loss.is_begun
            self.tries += not waited
            return
        if len(in_hand) == 1 and not loss.is_shared:
            self.alone.update(in_hand)
        guilty = next((row for row in in_hand if self.alone[row] >= DEATHS_ALONE), None)
        if guilty is not None:
            status = Status.TIMEOUT if loss.is_stall else Status.KILLED_WORKER
            self.poison[guilty] = PoisonRow(status, loss.reason)
            self.suspects, self.is_searching = frozenset(), False
        elif in_hand < self.suspects:
            self.suspects = in_hand
        else:
            self._search(in_hand, is_stall=loss.is_stall)

    def _search(self, in_hand: frozenset[int], *, is_stall: bool) -> None:
        """Suspect other rows; if others were suspected before, they have passed."""
        if self.is_searching:
            self.searches += 1
            self.tries += is_stall or self.searches % SEARCHES_A_TRY == 0
        self.suspects, self.is_searching = in_hand, True

    def verdict(self, limits: Limits, reason: str) -> str | None:
        """Why the shard is given up, if it is."""
        if len(self.poison) > limits.poison_rows:
            return f"more than {limits.poison_rows} of its rows end the worker process: {reason}"
        if self.tries >= limits.tries:
            return reason
        return None


class ShardQueue:
    """The shards of a plan that wait.

    Args:
        shards: All of the plan.
        committed: Which of them are not wanted any more, (shards,).
        limits: When one is given up.
    """

    def __init__(self, shards: Shards, committed: Booleans, limits: Limits) -> None:
        self._shards = shards
        self._limits = limits
        self._wanted = np.flatnonzero(~committed).astype(np.int32)
        follows = (np.diff(self._wanted) == 1) & shards.continues[self._wanted[1:]]
        self._starts = np.flatnonzero(~follows).astype(np.int32) + 1  # of runs, but the first
        self._free: deque[range] = deque([range(len(self._wanted))])  # places in `_wanted`
        self._owned: dict[int, range] = {}
        self._again: deque[int] = deque()
        self._trouble: dict[int, _Trouble] = {}
        self._waiting = len(self._wanted)

    def __len__(self) -> int:
        return self._waiting

    def take(self, worker: int, *, alone: bool) -> ShardAssignment | None:
        """The next shard for a worker, which has no other if it is `alone`; None if none fits.

        A shard that was lost goes to a worker that is alone, and so takes no other with it.
        """
        if alone and self._again:
            index = self._again.popleft()
        else:
            place = self._next_place(worker)
            if place is None:
                return None
            index = int(self._wanted[place])
        self._waiting -= 1
        return self._assignment(self._shards[index])

    def leave(self, worker: int) -> None:
        """A worker takes no more: what it would have taken is free."""
        owned = self._owned.pop(worker, None)
        if owned:
            self._free.appendleft(owned)

    def lost(self, shard: Shard, loss: Loss) -> str | None:
        """A shard is to be tried again; or the reason why it is not, then it is given up."""
        trouble = self._trouble.setdefault(shard.index, _Trouble())
        trouble.learn(loss)
        reason = loss.reason if loss.is_final else trouble.verdict(self._limits, loss.reason)
        if reason is None:
            self.put_back(shard)
        return reason

    def put_back(self, shard: Shard) -> None:
        """A shard waits again, and nothing was learned of it."""
        self._again.append(shard.index)
        self._waiting += 1

    def done(self, shard: Shard) -> None:
        """A shard is committed: what it did before does not matter any more."""
        self._trouble.pop(shard.index, None)

    def tries(self, shard: Shard) -> int:
        """Times that a shard was lost."""
        return self._trouble[shard.index].losses if shard.index in self._trouble else 0

    def _assignment(self, shard: Shard) -> ShardAssignment:
        trouble = self._trouble.get(shard.index)
        if trouble is None:
            return ShardAssignment(shard)
        suspects = tuple(sorted(trouble.suspects))
        return ShardAssignment(shard, trouble.losses + 1, suspects, dict(trouble.poison))

    def _next_place(self, worker: int) -> int | None:
        owned = self._owned.pop(worker, None) or self._next_run() or self._half_of_another()
        if not owned:
            return None
        if len(owned) > 1:
            self._owned[worker] = owned[1:]
        return owned[0]

    def _next_run(self) -> range | None:
        """Shards that continue each other, off the front of what nobody owns."""
        if not self._free:
            return None
        free = self._free.popleft()
        # Of the same type, or numpy converts all of `_starts`.
        following = np.searchsorted(self._starts, np.int32(free.start), side="right")
        end = int(self._starts[following]) if following < len(self._starts) else free.stop
        if end < free.stop:
            self._free.appendleft(range(end, free.stop))
        return range(free.start, min(end, free.stop))

    def _half_of_another(self) -> range | None:
        longest = max(self._owned, key=lambda worker: len(self._owned[worker]), default=None)
        if longest is None:
            return None
        owned = self._owned[longest]
        kept = len(owned) // 2
        if kept:
            self._owned[longest] = owned[:kept]
        else:
            del self._owned[longest]
        return owned[kept:]
