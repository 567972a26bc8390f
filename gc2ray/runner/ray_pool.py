"""Workers as Ray actors.

Ray's own restarts and retries stay 0: the driver starts another worker and hands the shard out
again. Of a worker that has ended the journal is read on its node, if that is still there; another
starts meanwhile. An actor that finds no room waits for it, which Ray's autoscaler sees.

Not covered: heterogeneous workers.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # nothing public tells of leavers
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import EngineDead
from gc2ray.core.logs import LogForm, set_up
from gc2ray.core.shards import Shard, Span
from gc2ray.output.parts import Commit
from gc2ray.runner import messages
from gc2ray.runner.journal import InHand, taken_over
from gc2ray.runner.messages import Progress, ShardAssignment, ShardResult
from gc2ray.runner.prometheus import RunMetrics
from gc2ray.runner.ray_session import MAX_MESSAGE, first_lines, gpus_per_worker
from gc2ray.runner.worker import Worker

PROGRESS_SECONDS = 2.0
JOURNAL_SECONDS = 30.0
"""Time to read the journal of a worker that has ended; after that its node is taken for lost."""
LEAVING_SECONDS = 2.0
"""Between two looks at which nodes are about to go."""
CONCURRENT_CALLS = 4
"""Two shards, one progress call, and one load or calibration."""

_FRAME = '\n  File "'
_DETAIL = re.compile(r"\w+: ")  # which actor it was: a line each

log = logging.getLogger(__name__)

MakeWorker = Callable[..., Worker]


class RayPool:
    """Workers as Ray actors; see `gc2ray.runner.messages.WorkerPool`.

    Args:
        cluster: Resources of a worker.
        make_worker: Called in the actor's process with `arguments`.
        arguments: Of `make_worker`; they travel to the actor.
    """

    def __init__(
        self, cluster: Cluster, make_worker: type[Worker] | MakeWorker, arguments: Sequence[object]
    ) -> None:
        self._cluster = cluster
        self._gpus = gpus_per_worker(cluster)
        self._make_worker = make_worker
        self._arguments = arguments
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, str, Shard | None]] = {}
        self._asked: dict[int, float] = {}
        self._places: dict[int, _Placement] = {}
        self._ended: list[messages.Event] = []
        self._buried: dict[int, _ExitedWorker] = {}
        self._lost_before: dict[int, int] = {}  # nodes that were lost when a worker was started
        self._gcs: Any = None
        self._looked = 0.0
        self._started = 0

    def default_workers(self) -> int:
        """One per GPU share; without GPUs one."""
        gpus, share = ray.cluster_resources().get("GPU", 0), self._gpus
        return max(1, int(gpus // share)) if share else 1

    def start(self) -> int:
        actor: Any = ray.remote(_Actor)  # Ray's remote defeats the type checker
        self._started += 1
        handle = actor.options(
            num_cpus=self._cluster.cpus_per_worker,
            num_gpus=self._gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=CONCURRENT_CALLS,
            scheduling_strategy="SPREAD",
        ).remote(self._make_worker, tuple(self._arguments))
        self._actors[self._started] = handle
        self._lost_before[self._started] = _lost_nodes()
        self._call(self._started, "place", handle.ready.remote())
        return self._started

    def load(self, worker: int) -> None:
        self._call(worker, "load", self._actors[worker].load.remote())

    def calibrate(self, worker: int, spans: Sequence[Span]) -> None:
        self._call(worker, "calibrate", self._actors[worker].calibrate.remote(tuple(spans)))

    def submit(self, worker: int, handout: ShardAssignment) -> None:
        reference = self._actors[worker].process.remote(handout)
        self._call(worker, "shard", reference, handout.shard)

    def drop(self, worker: int) -> None:
        self._asked.pop(worker, None)
        self._places.pop(worker, None)
        self._lost_before.pop(worker)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != worker}
        ray.kill(self._actors.pop(worker))

    def kill(self, worker: int, reason: str) -> None:
        place = self._places.get(worker)
        lost_before = self._lost_before[worker]
        self.drop(worker)
        self._ended.append(messages.WorkerExited(worker))
        wait = 0.0 if place is None else JOURNAL_SECONDS
        self._buried[worker] = _ExitedWorker(reason, self.now(), wait, lost_before)
        if place is None:  # it never was anywhere
            return
        read: Any = ray.remote(_read_journal)
        there = NodeAffinitySchedulingStrategy(place.node, soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
        self._call(worker, "journal", read.options(**options).remote(place.journal))

    def close(self) -> None:
        """End every worker."""
        for worker in list(self._actors):
            self.drop(worker)

    def poll(self, seconds: float) -> list[messages.Event]:
        self._ask_progress()
        told = [*self._leaving(), *self._overdue_burials()]
        told += self._returned(0 if told or self._ended else seconds)
        ended, self._ended = self._ended, []  # at once: nothing may be handed to who is gone
        return [*told, *ended]

    def room(self) -> str:
        asked = {"CPU": self._cluster.cpus_per_worker, "GPU": self._gpus}
        return (
            f"a worker asks for {_amounts(asked)}; the cluster has "
            f"{_amounts(ray.cluster_resources())}, free {_amounts(ray.available_resources())}"
        )

    def now(self) -> float:
        return time.monotonic()

    def _call(self, worker: int, kind: str, reference: Any, shard: Shard | None = None) -> None:
        self._calls[reference] = (worker, kind, shard)

    def _returned(self, seconds: float) -> list[messages.Event]:
        """What the calls that have ended tell; the first of them is waited for."""
        references = list(self._calls)
        if not references:
            time.sleep(seconds)
            return []
        ray.wait(references, num_returns=1, timeout=seconds)
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        events = [self._event(reference) for reference in ready]
        return [event for event in events if event is not None]

    def _ask_progress(self) -> None:
        for worker, asked in list(self._asked.items()):
            if time.monotonic() - asked >= PROGRESS_SECONDS:
                self._asked.pop(worker)
                self._call(worker, "progress", self._actors[worker].progress.remote())

    def _leaving(self) -> list[messages.Event]:
        """Workers on nodes that Ray is about to take away: each is told once."""
        if time.monotonic() - self._looked < LEAVING_SECONDS:
            return []
        self._looked = time.monotonic()
        if self._gcs is None:
            self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        nodes = {node.hex() if isinstance(node, bytes) else node for node in self._draining()}
        told = [w for w, place in self._places.items() if place.node in nodes and not place.leaves]
        for worker in told:
            self._places[worker].leaves = True
        return [messages.WorkerDraining(worker) for worker in told]

    def _draining(self) -> Iterable[bytes | str]:
        try:
            return list(self._gcs.get_draining_nodes(timeout=1))
        except RayError as error:  # then a node goes without notice, and its shards are redone
            log.warning("cannot ask Ray which nodes are about to go: %s", first_lines(error))
            return ()

    def _overdue_burials(self) -> list[messages.Event]:
        overdue = [w for w, burial in self._buried.items() if burial.is_overdue(self.now())]
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] not in overdue}
        return [self._buried.pop(worker).died(worker, {}) for worker in overdue]

    def _event(self, reference: Any) -> messages.Event | None:
        call = self._calls.pop(reference, None)
        if call is None:
            return None  # of a worker that this very poll found dead
        worker, kind, shard = call
        if kind == "journal":
            return self._buried.pop(worker).died(worker, _journal(reference))
        try:
            value = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, Exception):  # one that could not travel
                cause = RuntimeError(_point(str(error)))
            return self._failure(worker, shard, cause)
        except RayActorError as error:
            self.kill(worker, f"the worker process ended: {_cause(error)}")
        except RayError as error:
            self.kill(worker, f"Ray lost the worker: {first_lines(error)}")
        else:
            return self._success(worker, kind, shard, value)
        return None

    def _success(self, worker: int, kind: str, shard: Shard | None, value: Any) -> messages.Event:
        if kind in ("place", "progress"):
            self._asked[worker] = time.monotonic()
        if kind == "place":
            self._places[worker] = _Placement(*value)
            return messages.WorkerPlaced(worker)
        if kind == "load":
            return messages.ModelLoaded(worker, value)
        if kind == "calibrate":
            return messages.Calibrated(worker, value)
        if shard is not None:
            return messages.ShardFinished(worker, shard, value)
        return messages.Progressed(worker, value)

    def _failure(self, worker: int, shard: Shard | None, error: Exception) -> messages.Event | None:
        if isinstance(error, EngineDead):
            self.kill(worker, f"the engine died: {error}")
            return None
        return messages.CallFailed(worker, shard, error)


@dataclass
class _Placement:
    """Where a worker is: node, journal on that node; whether the node is known to go."""

    node: str
    journal: str
    leaves: bool = False


@dataclass(frozen=True)
class _ExitedWorker:
    """A worker that has ended.

    Attributes:
        reason: Why.
        ended: When.
        wait_seconds: How long its journal is waited for.
        lost_before: Nodes that had been lost when it was started.
    """

    reason: str
    ended: float
    wait_seconds: float
    lost_before: int

    def is_overdue(self, now: float) -> bool:
        return now - self.ended >= self.wait_seconds

    def died(self, worker: int, in_hand: InHand) -> messages.WorkerDied:
        node_lost = _lost_nodes() > self.lost_before
        return messages.WorkerDied(worker, self.reason, in_hand, self.ended, node_lost)


def _read_journal(prefix: str) -> InHand:
    """On the node of a worker that has ended."""
    return taken_over(Path(prefix))


def _journal(reference: Any) -> InHand:
    """What a worker had in hand; nothing is known if its node is gone."""
    try:
        in_hand: InHand = ray.get(reference)
    except RayError as error:
        log.warning("its journal cannot be read: %s", first_lines(error))
        return {}
    return in_hand


class _Actor:
    """A worker in its own process, its logs and metrics; `Worker` itself stays free of Ray."""

    def __init__(self, make_worker: MakeWorker, arguments: tuple[Any, ...]) -> None:
        self._worker = make_worker(*arguments)
        set_up(LogForm.JSON, run=self._worker.run, worker=self._worker.uuid)
        self._metrics = RunMetrics(self._worker.run)

    def ready(self) -> tuple[str, str]:
        """Node and journal, once the process is up."""
        return ray.get_runtime_context().get_node_id(), str(self._worker.journal)

    def load(self) -> str:
        return self._worker.load()

    def calibrate(self, spans: Sequence[Span]) -> float:
        return self._worker.calibrate(spans)

    def process(self, handout: ShardAssignment) -> ShardResult:
        done = self._worker.process(handout)
        if done.commit == Commit.WON:
            self._metrics.count(done.stats)
        return done

    def progress(self) -> Progress:
        return self._worker.progress()


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _lost_nodes() -> int:
    """Nodes that the cluster has lost so far."""
    return sum(not node["Alive"] for node in ray.nodes())


def _cause(error: RayActorError) -> str:
    """Why an actor ended: what Ray says of it without the lines that say which it was."""
    if _FRAME in str(error):
        return _point(str(error))
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not _DETAIL.match(line)]
    return " ".join(said[1:] or said)[:300]


def _point(trace: str) -> str:
    """What a traceback comes to: the exception below its last frame."""
    _, _, end = trace.rpartition(_FRAME)
    lines = end.splitlines()
    said = next((at for at, line in enumerate(lines[1:], 1) if line[:1].strip()), 0)
    return " ".join(" ".join(lines[said:]).split())[-MAX_MESSAGE:]
