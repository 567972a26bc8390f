"""The workers of a run as the driver sees them: the `WorkerPool` protocol and its events.

A pool starts workers, hands them work and reports events; it decides nothing. `RayPool` is the real
one; tests have one with a clock of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gc2ray.core.shards import Shard, Span
from gc2ray.runner.handout import ShardAssignment
from gc2ray.runner.journal import InHand
from gc2ray.runner.progress import Progress
from gc2ray.runner.worker import ShardDone


@dataclass(frozen=True)
class WorkerPlaced:
    """A worker's process is up."""

    worker: int


@dataclass(frozen=True)
class ModelLoaded:
    """A worker's model is in memory."""

    worker: int
    device: str


@dataclass(frozen=True)
class Calibrated:
    """A worker has measured its speed."""

    worker: int
    seconds_per_row: float


@dataclass(frozen=True)
class Progressed:
    """What a worker has done so far."""

    worker: int
    progress: Progress


@dataclass(frozen=True)
class ShardFinished:
    """A shard is committed, by this worker or by another that was faster."""

    worker: int
    shard: Shard
    result: ShardDone


@dataclass(frozen=True)
class CallFailed:
    """A call failed, the worker lives; `shard` is None for loading and calibration."""

    worker: int
    shard: Shard | None
    error: Exception


@dataclass(frozen=True)
class WorkerDraining:
    """A worker's node is about to be taken away."""

    worker: int


@dataclass(frozen=True)
class WorkerExited:
    """A worker is gone; `WorkerDied` follows when it is known what it had in hand."""

    worker: int


@dataclass(frozen=True)
class WorkerDied:
    """A worker is gone, and with it all that it was doing.

    Attributes:
        worker: Which.
        reason: Why; as told to `kill`, if it was killed.
        in_hand: Rows that it had in hand; empty where its node is gone too.
        ended: When, on the pool's clock, if that was before it is told.
        node_lost: A node was lost in its time, perhaps its own: it may not be to blame.
    """

    worker: int
    reason: str
    in_hand: InHand = field(default_factory=dict)
    ended: float | None = None
    node_lost: bool = False


Event = (
    WorkerPlaced
    | ModelLoaded
    | Calibrated
    | Progressed
    | ShardFinished
    | CallFailed
    | WorkerDraining
    | WorkerExited
    | WorkerDied
)


class WorkerPool(Protocol):
    """What the driver needs of a cluster. Calls return at once; results come as events."""

    def default_workers(self) -> int:
        """How many workers make sense when nobody says."""

    def start(self) -> int:
        """Ask for a worker; its number is returned, `WorkerPlaced` follows."""

    def load(self, worker: int) -> None:
        """Let it load its model; `ModelLoaded` follows."""

    def calibrate(self, worker: int, spans: Sequence[Span]) -> None:
        """Let it measure its speed; `Calibrated` follows."""

    def submit(self, worker: int, handout: ShardAssignment) -> None:
        """Hand it a shard; `ShardFinished` or `CallFailed` follows."""

    def kill(self, worker: int, reason: str) -> None:
        """End it now; `WorkerDied` follows, perhaps after `WorkerExited`, and nothing else."""

    def drop(self, worker: int) -> None:
        """End it now; nothing follows."""

    def poll(self, seconds: float) -> list[Event]:
        """Events, waiting at most so long for the first."""

    def room(self) -> str:
        """What a worker asks for and what the cluster has, for people."""

    def now(self) -> float:
        """Seconds on the clock of the stall detector."""
