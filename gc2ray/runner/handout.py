"""`ShardAssignment`: a shard as a worker gets it, with what earlier attempts have taught."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import NamedTuple

from gc2ray.core.errors import BadRow, Status
from gc2ray.core.shards import Shard

GROUPED_FROM = 32
"""More suspects than this are answered in groups first: alone, each takes as long as a batch."""

_KILLED = {
    Status.KILLED_WORKER: "two worker processes ended with this row, and nothing else, in hand",
    Status.TIMEOUT: "no answer came from two workers with this row, and nothing else, in hand",
}


class PoisonRow(NamedTuple):
    """What is written for a row that kills or hangs: its status, and how its worker ended."""

    status: Status
    reason: str


@dataclass(frozen=True)
class ShardAssignment:
    """A shard to answer.

    Rows are named by their place in the shard, from 0.

    Attributes:
        shard: The shard.
        attempt: Which try it is, from 1.
        suspects: Rows that were in hand when an earlier try died, in order. They are answered
            first, so few at a time that another death tells more.
        poison: Rows that are known to kill or to hang, and what is written for them.
    """

    shard: Shard
    attempt: int = 1
    suspects: tuple[int, ...] = ()
    poison: Mapping[int, PoisonRow] = field(default_factory=dict)

    def suspect_groups(self) -> Iterator[tuple[int, ...]]:
        """The suspects, as many together as may be in hand at a time."""
        suspects = [row for row in self.suspects if row not in self.poison]
        size = isqrt(len(suspects)) if len(suspects) > GROUPED_FROM else 1
        for first in range(0, len(suspects), size):
            yield tuple(suspects[first : first + size])

    def fault(self, row: int) -> BadRow | None:
        """Why a row is not to be tried, if it is not."""
        poison = self.poison.get(row)
        if poison is None:
            return None
        return BadRow(poison.status, f"{_KILLED[poison.status]}: {poison.reason}")
