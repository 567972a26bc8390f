"""Workers as Ray actors.

Ray's own restarts and retries are off: the driver starts another worker and assigns the shard
again. The journal of a worker that has ended is read on its node, if the node is still there;
meanwhile another worker starts. An actor that finds no room waits for it, which Ray's autoscaler
sees.

Not covered: heterogeneous workers.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # no public API lists draining nodes
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import EngineDead
from gc2ray.core.logs import LogForm, set_up
from gc2ray.core.shards import Shard, Span
from gc2ray.output.parts import Commit
from gc2ray.runner import messages
from gc2ray.runner.journal import InHand, read_and_remove
from gc2ray.runner.messages import Progress, ShardAssignment, ShardResult
from gc2ray.runner.prometheus import RunMetrics
from gc2ray.runner.ray_session import MAX_MESSAGE, first_lines, gpus_per_worker
from gc2ray.runner.worker import Worker

PROGRESS_SECONDS = 2.0
"""Between two reports of a worker's progress."""
JOURNAL_SECONDS = 30.0
"""Time to read the journal of a worker that has ended; then its node is considered lost."""
DRAINING_SECONDS = 2.0
"""Between two checks for draining nodes."""
CONCURRENT_CALLS = 4
"""Two shards, one progress call, and one load or calibration."""

_FRAME = '\n  File "'
_DETAIL = re.compile(r"\w+: ")  # which actor it was: a line each

log = logging.getLogger(__name__)

MakeWorker = Callable[..., Worker]
"""Makes a worker, in its own process, from the job and the schema of the kept columns."""


class RayPool:
    """Workers as Ray actors; see `gc2ray.runner.messages.WorkerPool`.

    Args:
        cluster: Resources of a worker.
        make_worker: Called in the actor's process with `arguments`.
        arguments: Arguments of `make_worker`, sent to the actor.
    """

    def __init__(
        self, cluster: Cluster, make_worker: type[Worker] | MakeWorker, arguments: Sequence[object]
    ) -> None:
        self.cluster = cluster
        self._gpus = gpus_per_worker(cluster)
        self._make_worker = make_worker
        self._arguments = arguments
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, str, Shard | None]] = {}
        self._last_progress: dict[int, float] = {}  # when each worker last reported
        self._places: dict[int, _Placement] = {}
        self._exit_events: list[messages.Event] = []
        self._exited: dict[int, _ExitedWorker] = {}  # whose journals are being read
        self._lost_before: dict[int, int] = {}  # nodes lost before a worker was started
        self._gcs: Any = None
        self._draining_checked = 0.0
        self._started = 0

    def default_workers(self) -> int:
        """One per GPU share; without GPUs one."""
        gpus, share = ray.cluster_resources().get("GPU", 0), self._gpus
        return max(1, int(gpus // share)) if share else 1

    def start(self) -> int:
        actor: Any = ray.remote(_Actor)  # Ray's remote defeats the type checker
        self._started += 1
        handle = actor.options(
            num_cpus=self.cluster.cpus_per_worker,
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

    def submit(self, worker: int, assignment: ShardAssignment) -> None:
        reference = self._actors[worker].process.remote(assignment)
        self._call(worker, "shard", reference, assignment.shard)

    def drop(self, worker: int) -> None:
        self._last_progress.pop(worker, None)
        self._places.pop(worker, None)
        self._lost_before.pop(worker)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != worker}
        ray.kill(self._actors.pop(worker))

    def kill(self, worker: int, reason: str) -> None:
        place = self._places.get(worker)
        lost_before = self._lost_before[worker]
        self.drop(worker)
        self._exit_events.append(messages.WorkerExited(worker))
        wait = 0.0 if place is None else JOURNAL_SECONDS
        self._exited[worker] = _ExitedWorker(reason, self.now(), wait, lost_before)
        if place is None:  # it never had a process
            return
        read: Any = ray.remote(_read_journal)
        on_its_node = NodeAffinitySchedulingStrategy(place.node, soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": on_its_node}
        self._call(worker, "journal", read.options(**options).remote(place.journal))

    def close(self) -> None:
        """End every worker."""
        for worker in list(self._actors):
            self.drop(worker)

    def poll(self, seconds: float) -> list[messages.Event]:
        self._request_progress()
        events = [*self._draining(), *self._unread_journals()]
        events += self._returned(0 if events or self._exit_events else seconds)
        # At once, or the driver would assign shards to workers that are gone.
        exits, self._exit_events = self._exit_events, []
        return [*events, *exits]

    def resource_summary(self) -> str:
        request = {"CPU": self.cluster.cpus_per_worker, "GPU": self._gpus}
        return (
            f"a worker needs {_amounts(request)}; the cluster has "
            f"{_amounts(ray.cluster_resources())}, free {_amounts(ray.available_resources())}"
        )

    def now(self) -> float:
        return time.monotonic()

    def _call(self, worker: int, kind: str, reference: Any, shard: Shard | None = None) -> None:
        self._calls[reference] = (worker, kind, shard)

    def _returned(self, seconds: float) -> list[messages.Event]:
        """Events of the calls that have returned; waits for the first call."""
        references = list(self._calls)
        if not references:
            time.sleep(seconds)
            return []
        ray.wait(references, num_returns=1, timeout=seconds)
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        events = [self._event(reference) for reference in ready]
        return [event for event in events if event is not None]

    def _request_progress(self) -> None:
        for worker, reported in list(self._last_progress.items()):
            if time.monotonic() - reported >= PROGRESS_SECONDS:
                self._last_progress.pop(worker)
                self._call(worker, "progress", self._actors[worker].progress.remote())

    def _draining(self) -> list[messages.Event]:
        """One event for each worker whose node Ray is about to take away."""
        if time.monotonic() - self._draining_checked < DRAINING_SECONDS:
            return []
        self._draining_checked = time.monotonic()
        nodes = self._draining_nodes()
        places = self._places.items()
        workers = [w for w, place in places if place.node in nodes and not place.is_draining]
        for worker in workers:
            self._places[worker].is_draining = True
        return [messages.WorkerDraining(worker) for worker in workers]

    def _draining_nodes(self) -> set[str]:
        if self._gcs is None:
            self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        try:
            nodes = list(self._gcs.get_draining_nodes(timeout=1))
        except RayError as error:  # then a node goes without notice, and its shards are redone
            log.warning("cannot get the list of draining nodes from Ray: %s", first_lines(error))
            return set()
        return {node.hex() if isinstance(node, bytes) else node for node in nodes}

    def _unread_journals(self) -> list[messages.Event]:
        """Deaths of workers whose journals could not be read in time."""
        overdue = [w for w, exited in self._exited.items() if exited.is_overdue(self.now())]
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] not in overdue}
        return [self._exited.pop(worker).died(worker, {}) for worker in overdue]

    def _event(self, reference: Any) -> messages.Event | None:
        call = self._calls.pop(reference, None)
        if call is None:
            return None  # the worker was killed during this poll
        worker, kind, shard = call
        if kind == "journal":
            return self._exited.pop(worker).died(worker, _journal(reference))
        try:
            value = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, Exception):  # it could not be pickled
                cause = RuntimeError(_exception_of(str(error)))
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
            self._last_progress[worker] = time.monotonic()
        if kind == "place":
            self._places[worker] = _Placement(*value)
            return messages.WorkerPlaced(worker)
        if kind == "load":
            return messages.ModelLoaded(worker)
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
    """Where a worker is: its node, its journal on that node, and whether the node is draining."""

    node: str
    journal: str
    is_draining: bool = False


@dataclass(frozen=True)
class _ExitedWorker:
    """A worker that has ended.

    Attributes:
        reason: Why it ended.
        ended: When it ended.
        wait_seconds: Time to read its journal.
        lost_before: Nodes that the cluster had lost before the worker was started.
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
    """Read a journal; runs on the node of the worker that has ended."""
    return read_and_remove(Path(prefix))


def _journal(reference: Any) -> InHand:
    """The rows that a worker had in hand; none if its node is gone."""
    try:
        in_hand: InHand = ray.get(reference)
    except RayError as error:
        log.warning("cannot read the journal of a worker that has ended: %s", first_lines(error))
        return {}
    return in_hand


class _Actor:
    """A worker in its own process, with logs and metrics; `Worker` itself does not use Ray."""

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

    def process(self, assignment: ShardAssignment) -> ShardResult:
        result = self._worker.process(assignment)
        if result.commit == Commit.WON:
            self._metrics.count(result.stats)
        return result

    def progress(self) -> Progress:
        return self._worker.progress()


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _lost_nodes() -> int:
    """Nodes that the cluster has lost so far."""
    return sum(not node["Alive"] for node in ray.nodes())


def _cause(error: RayActorError) -> str:
    """Why an actor ended: Ray's message without the lines that identify the actor."""
    if _FRAME in str(error):
        return _exception_of(str(error))
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not _DETAIL.match(line)]
    return " ".join(reasons[1:] or reasons)[:300]


def _exception_of(trace: str) -> str:
    """The exception at the end of a traceback, in one line."""
    _, _, end = trace.rpartition(_FRAME)
    lines = end.splitlines()
    start = next((number for number, line in enumerate(lines[1:], 1) if line[:1].strip()), 0)
    return " ".join(" ".join(lines[start:]).split())[-MAX_MESSAGE:]
