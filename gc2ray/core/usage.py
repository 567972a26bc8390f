"""`Usage`: what became of the time of workers' devices.

Every second of a worker that has a place in the cluster is spent on one thing, from when its
process is up until it ends. What leads to a committed part is useful; the rest is waste, by cause.
A worker works on its shards one after the other, as good as; the time since its last part (or since
it was given a shard, if it had none) therefore belongs to the shard that ends, however it ends.

Not covered: money (a price times these seconds), and time that the accelerator starved within a
useful shard, which parts' footers tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class UsageKind(StrEnum):
    """What a worker's time is spent on; everything but `USEFUL` is waste."""

    USEFUL = "useful"
    LOADING = "loading"
    CALIBRATING = "calibrating"
    IDLE = "idle"
    FAILED = "failed tries"
    DIED = "died"
    STALLED = "stalled"
    LOST_RACE = "lost races"
    ABANDONED = "abandoned"


@dataclass(frozen=True)
class Usage:
    """Device-seconds by use: a worker with two devices spends two each second.

    Attributes:
        seconds: By use; what is not there is 0.
    """

    seconds: Mapping[UsageKind, float] = field(default_factory=dict)

    def __add__(self, other: Usage) -> Usage:
        uses = {*self.seconds, *other.seconds}
        return Usage({use: self.of(use) + other.of(use) for use in UsageKind if use in uses})

    def of(self, use: UsageKind) -> float:
        """Device-seconds of one use."""
        return self.seconds.get(use, 0.0)

    @property
    def total_seconds(self) -> float:
        """Of all uses."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {str(use): round(seconds, 3) for use, seconds in self.seconds.items()}

    @staticmethod
    def from_dict(data: Mapping[str, float]) -> Usage:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A use that this version does not know.
        """
        return Usage({UsageKind(name): float(seconds) for name, seconds in data.items()})


@dataclass(eq=False)
class UsageMeter:
    """Adds up what workers spend.

    Args:
        devices: Of a worker; a share of one where workers share it, 1 where they have none.
    """

    devices: float = 1.0
    _seconds: dict[UsageKind, float] = field(default_factory=dict)
    _since: dict[int, float] = field(default_factory=dict)

    def start(self, worker: int, now: float) -> None:
        """A worker's process is up."""
        self._since[worker] = now

    def spend(self, worker: int, use: UsageKind, now: float) -> None:
        """What a worker did since it was last asked; nothing before it is up."""
        since = self._since.get(worker)
        if since is not None:
            self._seconds[use] = self._seconds.get(use, 0.0) + (now - since) * self.devices
            self._since[worker] = now

    def stop(self, worker: int, use: UsageKind, now: float) -> None:
        """A worker has ended; so it spent its last."""
        self.spend(worker, use, now)
        self._since.pop(worker, None)

    def usage(self, now: float, uses: Mapping[int, UsageKind]) -> Usage:
        """The usage so far.

        Args:
            now: The time.
            uses: What each worker that is still up spends its time on now.
        """
        spent = dict(self._seconds)
        for worker, since in self._since.items():
            spent[uses[worker]] = spent.get(uses[worker], 0.0) + (now - since) * self.devices
        return Usage({use: spent[use] for use in UsageKind if use in spent})
