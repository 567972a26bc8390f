"""`Usage`: device-seconds of workers, split into useful work and waste by cause.

Every second of a worker counts for exactly one kind of use, from the start of its process to its
end. Time that leads to a committed part is useful; the rest is waste. Workers answer their shards
almost one after the other, so the time since a worker's last part (or since its first assignment)
counts for the shard that ends.

Not covered: money (a price times these seconds), and idle time inside a useful shard, which the
footers of parts record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class UsageKind(StrEnum):
    """Kinds of use of a worker's time; everything but `USEFUL` is waste."""

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
    """Device-seconds by kind of use: a worker with two devices spends two each second.

    Attributes:
        seconds: Seconds by kind; missing kinds are 0.
    """

    seconds: Mapping[UsageKind, float] = field(default_factory=dict)

    def __add__(self, other: Usage) -> Usage:
        kinds = {*self.seconds, *other.seconds}
        return Usage(
            {
                kind: self.seconds_for(kind) + other.seconds_for(kind)
                for kind in UsageKind
                if kind in kinds
            }
        )

    def seconds_for(self, kind: UsageKind) -> float:
        """Device-seconds of one kind of use."""
        return self.seconds.get(kind, 0.0)

    @property
    def total_seconds(self) -> float:
        """Device-seconds of all kinds."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, float]:
        """The seconds by name of the kind, for JSON."""
        return {str(kind): round(seconds, 3) for kind, seconds in self.seconds.items()}

    @staticmethod
    def from_dict(data: Mapping[str, float]) -> Usage:
        """The inverse of `to_dict`.

        Raises:
            ValueError: This version does not have one of the kinds.
        """
        return Usage({UsageKind(name): float(seconds) for name, seconds in data.items()})


@dataclass(eq=False)
class UsageMeter:
    """Adds up the time of workers.

    Args:
        devices: Devices per worker: a fraction where workers share one, 1 for a worker without.
    """

    devices: float = 1.0
    _seconds: dict[UsageKind, float] = field(default_factory=dict)
    _since: dict[int, float] = field(default_factory=dict)

    def start(self, worker: int, now: float) -> None:
        """Note that a worker's process started."""
        self._since[worker] = now

    def spend(self, worker: int, kind: UsageKind, now: float) -> None:
        """Count a started worker's time since the last call for one kind of use."""
        since = self._since.get(worker)
        if since is not None:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + (now - since) * self.devices
            self._since[worker] = now

    def stop(self, worker: int, kind: UsageKind, now: float) -> None:
        """Count the last time of a worker that has ended."""
        self.spend(worker, kind, now)
        self._since.pop(worker, None)

    def usage(self, now: float, kinds: Mapping[int, UsageKind]) -> Usage:
        """The usage so far.

        Args:
            now: The time.
            kinds: What each worker that is still up spends its time on now.
        """
        spent = dict(self._seconds)
        for worker, since in self._since.items():
            spent[kinds[worker]] = spent.get(kinds[worker], 0.0) + (now - since) * self.devices
        return Usage({kind: spent[kind] for kind in UsageKind if kind in spent})
