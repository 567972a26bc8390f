"""Workers as Ray actors: the only code that knows Ray.

Ray's own restarts and retries stay 0: the driver starts another worker and hands the shard out
again.

Not covered: autoscaling, heterogeneous workers, job submission.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from gc2ray.config import Cluster
from gc2ray.errors import ConfigError, EngineDead
from gc2ray.pool import Calibrated, Died, Done, Event, Failed, Loaded, Placed, Progressed
from gc2ray.shards import Shard, Span
from gc2ray.worker import Progress, ShardDone, Worker

PROGRESS_SECONDS = 2.0
OBJECT_STORE_BYTES = 200 * 1024 * 1024
"""Shards and answers travel as files; the object store carries a few small messages."""
KNOCK_SECONDS = 10.0
CONCURRENT_CALLS = 4
"""Two shards, one progress call, and one load or calibration."""


MakeWorker = Callable[..., Worker]


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be in the cluster at an address, or at `RAY_ADDRESS`; without either in a local Ray.

    A Ray that this process has joined already is used, and not left.

    Raises:
        ConfigError: There is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    _join(address or os.environ.get("RAY_ADDRESS") or None)
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str | None) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            _knock(address)
        ray.init(**options, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot join a Ray cluster at {address}: {error}; if it asks for a token, set "
            "RAY_AUTH_MODE=token; to run on this machine, leave out --address and RAY_ADDRESS"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in its place


def _knock(address: str) -> None:
    """Open and close a connection: Ray itself waits minutes for a head that is not there.

    Raises:
        OSError: Nobody answers.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def gpus_per_worker(cluster: Cluster) -> float:
    """As configured; else one where the cluster has GPUs."""
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


class RayPool:
    """Workers as Ray actors; see `gc2ray.pool.Pool`.

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
        self._call(self._started, "place", handle.ready.remote())
        return self._started

    def load(self, worker: int) -> None:
        self._call(worker, "load", self._actors[worker].load.remote())

    def calibrate(self, worker: int, spans: Sequence[Span]) -> None:
        self._call(worker, "calibrate", self._actors[worker].calibrate.remote(tuple(spans)))

    def submit(self, worker: int, shard: Shard, attempt: int) -> None:
        self._call(worker, "shard", self._actors[worker].process.remote(shard, attempt), shard)

    def kill(self, worker: int) -> None:
        self._asked.pop(worker, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] != worker}
        ray.kill(self._actors.pop(worker))

    def close(self) -> None:
        """End every worker."""
        for worker in list(self._actors):
            self.kill(worker)

    def poll(self, seconds: float) -> list[Event]:
        self._ask_progress()
        references = list(self._calls)
        if not references:
            time.sleep(seconds)
            return []
        ray.wait(references, num_returns=1, timeout=seconds)
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        events = [self._event(reference) for reference in ready]
        return [event for event in events if event is not None]

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

    def _ask_progress(self) -> None:
        for worker, asked in list(self._asked.items()):
            if time.monotonic() - asked >= PROGRESS_SECONDS:
                self._asked.pop(worker)
                self._call(worker, "progress", self._actors[worker].progress.remote())

    def _event(self, reference: Any) -> Event | None:
        call = self._calls.pop(reference, None)
        if call is None or call[0] not in self._actors:
            return None  # of a worker that this very poll found dead
        worker, kind, shard = call
        try:
            value = ray.get(reference)
        except RayTaskError as error:
            return self._failure(worker, shard, error.cause or error)
        except RayActorError as error:
            return self._death(worker, f"the worker process ended: {_first_line(error)}")
        except RayError as error:
            return self._death(worker, f"Ray lost the worker: {_first_line(error)}")
        return self._success(worker, kind, shard, value)

    def _success(self, worker: int, kind: str, shard: Shard | None, value: Any) -> Event:
        if kind in ("place", "progress"):
            self._asked[worker] = time.monotonic()
        if kind == "place":
            return Placed(worker)
        if kind == "load":
            return Loaded(worker, value)
        if kind == "calibrate":
            return Calibrated(worker, value)
        if shard is not None:
            return Done(worker, shard, value)
        return Progressed(worker, value)

    def _failure(self, worker: int, shard: Shard | None, error: Exception) -> Event:
        if isinstance(error, EngineDead):
            return self._death(worker, f"the engine died: {error}")
        return Failed(worker, shard, error)

    def _death(self, worker: int, reason: str) -> Died:
        self.kill(worker)
        return Died(worker, reason)


class _Actor:
    """A worker in its own process; `Worker` itself stays free of Ray."""

    def __init__(self, make_worker: MakeWorker, arguments: tuple[Any, ...]) -> None:
        self._worker = make_worker(*arguments)

    def ready(self) -> None:
        """Returns once the process is up."""

    def load(self) -> str:
        return self._worker.load()

    def calibrate(self, spans: Sequence[Span]) -> float:
        return self._worker.calibrate(spans)

    def process(self, shard: Shard, attempt: int) -> ShardDone:
        return self._worker.process(shard, attempt)

    def progress(self) -> Progress:
        return self._worker.progress()


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__
