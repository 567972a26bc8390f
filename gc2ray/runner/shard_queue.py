"""`ShardQueue`: which shard is next, and what happens to a shard that was lost.

Shards that continue each other within a row group go to one worker, which need not find its place
in the file again. A worker that has none left takes half of another worker's. So the queue is a few
ranges, whatever the size of the plan, and remembers single shards only after they were lost.

A loss either narrows down which row is to blame, or costs a try:

* Rows that were in hand when a worker died are suspects. The next try answers them first, few at a
  time (`gc2ray.runner.messages`), so that the next death leaves fewer, until one is alone in hand
  when its worker dies. One such death may be chance, since workers are killed for other reasons,
  too. After two of them the row is poison: it is not tried again, and its answer says that it kills
  workers, or that no answer came.
* If all suspects are answered, none of them alone was to blame for the death before. The next death
  starts another search; every `SEARCHES_A_TRY`th of these costs a try. A stall takes minutes, and
  costs a try by itself.
* A shard that only waited beside another one when the worker died was not tried.
* A failure, or a death that names no rows, costs a try. A failure that every try would meet ends
  the shard.

After `tries` of those, or with more than `poison_rows` poison rows, a shard is given up. So every
shard ends.

Not covered: which worker asks for a shard, and how many it has (`gc2ray.runner.driver`).
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
    """Why a try of a shard failed.

    Attributes:
        reason: A message.
        in_hand: Rows of the shard that the worker had in hand, numbered within the shard; empty if
            the worker lives, or its journal could not be read.
        is_stall: The worker was killed because no answer came.
        is_shared: The worker had rows of another shard in hand, too.
        is_begun: A row of the shard may have been tried.
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
    """When a shard is given up: after so many tries, or with more poison rows than that."""

    tries: int
    poison_rows: int


DEATHS_ALONE = 2
"""Deaths of workers that had only this row in hand, after which the row is poison."""
SEARCHES_A_TRY = 4
"""Searches that found no poison row, and together cost a try."""


@dataclass(eq=False)
class _LossHistory:
    """What the losses of one shard have shown."""

    losses: int = 0
    tries: int = 0
    searches: int = 0  # that found no poison row
    suspects: frozenset[int] = frozenset()
    is_searching: bool = False
    alone: Counter[int] = field(default_factory=Counter)  # deaths with one row in hand, by row
    poison: dict[int, PoisonRow] = field(default_factory=dict)

    def add(self, loss: Loss) -> None:
        """Take a loss into account."""
        self.losses += 1
        in_hand = frozenset(loss.in_hand) - self.poison.keys()
        if not in_hand:
            only_waited = self.losses == 1 and not loss.is_begun
            self.tries += not only_waited
            return
        if len(in_hand) == 1 and not loss.is_shared:
            self.alone.update(in_hand)
        culprit = next((row for row in in_hand if self.alone[row] >= DEATHS_ALONE), None)
        if culprit is not None:
            status = Status.TIMEOUT if loss.is_stall else Status.KILLED_WORKER
            self.poison[culprit] = PoisonRow(status, loss.reason)
            self.suspects, self.is_searching = frozenset(), False
        elif in_hand < self.suspects:
            self.suspects = in_hand
        else:
            self._search(in_hand, is_stall=loss.is_stall)

    def _search(self, in_hand: frozenset[int], *, is_stall: bool) -> None:
        """Suspect these rows; earlier suspects were answered, so that their search failed."""
        if self.is_searching:
            self.searches += 1
            self.tries += is_stall or self.searches % SEARCHES_A_TRY == 0
        self.suspects, self.is_searching = in_hand, True

    def give_up_reason(self, limits: Limits, reason: str) -> str | None:
        """Why the shard is given up; None if it is not."""
        if len(self.poison) > limits.poison_rows:
            return f"more than {limits.poison_rows} of its rows kill or hang their worker: {reason}"
        if self.tries >= limits.tries:
            return reason
        return None


class ShardQueue:
    """The shards of a plan that wait for a worker.

    Args:
        shards: All shards of the plan.
        committed: Which of them are committed, (shards,).
        limits: When a shard is given up.
    """

    def __init__(self, shards: Shards, committed: Booleans, limits: Limits) -> None:
        self._shards = shards
        self._limits = limits
        self._wanted = np.flatnonzero(~committed).astype(np.int32)
        follows = (np.diff(self._wanted) == 1) & shards.continues[self._wanted[1:]]
        self._starts = np.flatnonzero(~follows).astype(np.int32) + 1  # of runs, except the first
        self._free: deque[range] = deque([range(len(self._wanted))])  # places in `_wanted`
        self._owned: dict[int, range] = {}
        self._lost: deque[int] = deque()
        self._history: dict[int, _LossHistory] = {}  # of shards that were lost
        self._waiting = len(self._wanted)

    def __len__(self) -> int:
        return self._waiting

    def take(self, worker: int, *, alone: bool) -> ShardAssignment | None:
        """The next shard for a worker; None if there is none.

        Args:
            worker: Number of the worker.
            alone: Whether the worker has no other shard. Only then it gets a shard that was lost
                before, which could take another shard with it.
        """
        if alone and self._lost:
            index = self._lost.popleft()
        else:
            place = self._next_place(worker)
            if place is None:
                return None
            index = int(self._wanted[place])
        self._waiting -= 1
        return self._assignment(self._shards[index])

    def leave(self, worker: int) -> None:
        """A worker takes no more shards: those that were meant for it are free."""
        owned = self._owned.pop(worker, None)
        if owned:
            self._free.appendleft(owned)

    def lost(self, shard: Shard, loss: Loss) -> str | None:
        """Queue a lost shard again; or give it up, and return why."""
        history = self._history.setdefault(shard.index, _LossHistory())
        history.add(loss)
        limits = self._limits
        reason = loss.reason if loss.is_final else history.give_up_reason(limits, loss.reason)
        if reason is None:
            self.put_back(shard)
        return reason

    def put_back(self, shard: Shard) -> None:
        """Queue a shard again that was not lost by its own fault."""
        self._lost.append(shard.index)
        self._waiting += 1

    def done(self, shard: Shard) -> None:
        """Forget the losses of a shard that is committed."""
        self._history.pop(shard.index, None)

    def tries(self, shard: Shard) -> int:
        """How often a shard was lost."""
        return self._history[shard.index].losses if shard.index in self._history else 0

    def _assignment(self, shard: Shard) -> ShardAssignment:
        history = self._history.get(shard.index)
        if history is None:
            return ShardAssignment(shard)
        suspects = tuple(sorted(history.suspects))
        return ShardAssignment(shard, history.losses + 1, suspects, dict(history.poison))

    def _next_place(self, worker: int) -> int | None:
        owned = self._owned.pop(worker, None) or self._next_run() or self._half_of_another()
        if not owned:
            return None
        if len(owned) > 1:
            self._owned[worker] = owned[1:]
        return owned[0]

    def _next_run(self) -> range | None:
        """Shards that continue each other, from the front of those that no worker owns."""
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
