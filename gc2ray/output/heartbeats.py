"""Records of drivers and workers in the output directory, rewritten while their processes live.

`Heartbeat` rewrites the record of either kind. A driver's says which process runs, and how its
workers have spent their time so far. A second driver on the same output sees that record and warns.
Nothing depends on it: parts are created, never overwritten, so two drivers produce correct results
at twice the cost.

Not covered: clocks of two hosts that differ by more than `ALIVE_SECONDS`. A second driver may then
miss the first one.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Protocol, Self

import psutil

from gc2ray.core.errors import storage_errors
from gc2ray.core.usage import Usage
from gc2ray.data.store import Store, json_bytes, read_records

HEARTBEAT_SECONDS = 10.0
"""Between two writes of a driver's record."""
ALIVE_SECONDS = 35.0
"""A driver whose record is older has ended: three heartbeats and a slow write."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DriverRecord:
    """What a driver reports about itself, `drivers/<uuid>.json`.

    Attributes:
        uuid: Identifies the process.
        host: The host it runs on.
        pid: Its process id there.
        started: When it started to work on the output.
        last_seen: When it last wrote this record.
        has_ended: Whether this is its last record.
        usage: How its workers spent their time.
    """

    uuid: str
    host: str
    pid: int
    started: datetime
    last_seen: datetime
    has_ended: bool = False
    usage: Usage = field(default_factory=Usage)

    @property
    def name(self) -> str:
        """Name of the object in the store."""
        return f"drivers/{self.uuid}.json"

    @staticmethod
    def of_this_process() -> DriverRecord:
        """The first record of a driver that begins now."""
        now = datetime.now(UTC)
        return DriverRecord(uuid.uuid4().hex, socket.gethostname(), os.getpid(), now, now)

    def to_bytes(self) -> bytes:
        """As JSON."""
        content = {
            "uuid": self.uuid,
            "host": self.host,
            "pid": self.pid,
            "started": self.started.isoformat(),
            "last_seen": self.last_seen.isoformat(),
            "has_ended": self.has_ended,
            "device_seconds": self.usage.to_dict(),
        }
        return json_bytes(content)

    @staticmethod
    def from_bytes(data: bytes) -> DriverRecord:
        """The inverse of `to_bytes`.

        Raises:
            ValueError, KeyError, TypeError: Not a record.
        """
        content = json.loads(data)
        return DriverRecord(
            uuid=content["uuid"],
            host=content["host"],
            pid=content["pid"],
            started=datetime.fromisoformat(content["started"]),
            last_seen=datetime.fromisoformat(content["last_seen"]),
            has_ended=content["has_ended"],
            usage=Usage.from_dict(content["device_seconds"]),
        )

    def is_at_work(self, now: datetime) -> bool:
        """Whether the driver seems to be alive, by its process on this host, else by the time."""
        if self.has_ended or (now - self.last_seen).total_seconds() > ALIVE_SECONDS:
            return False
        return self.host != socket.gethostname() or psutil.pid_exists(self.pid)


class Record(Protocol):
    """What a process reports about itself in an object of the output."""

    @property
    def name(self) -> str:
        """Name of the object in the store."""

    def to_bytes(self) -> bytes:
        """Content of the object."""


class MakeRecord(Protocol):
    """Makes the present record of a process."""

    def __call__(self, *, has_ended: bool) -> Record:
        """The record; the last one if the process's work has ended."""


class Heartbeat:
    """Rewrites the record of a process while it lives, on a thread of its own.

    As a context manager, it has tried to write the record when the block begins, and writes it a
    last time when the block ends.

    Args:
        store: The output.
        make_record: Called on the thread.
        seconds: Time between two writes.
        log_level: Level of the message about a write that failed; the next write tries again.
    """

    def __init__(
        self,
        store: Store,
        make_record: MakeRecord,
        seconds: float,
        log_level: int = logging.WARNING,
    ) -> None:
        self._store = store
        self._make_record = make_record
        self._seconds = seconds
        self._log_level = log_level
        self._has_tried, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="gc2ray-heartbeat")

    def start(self) -> None:
        """Write the record until the process ends; does not wait for the first write."""
        self._thread.start()

    def __enter__(self) -> Self:
        self.start()
        self._has_tried.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._write()

    def _beat(self) -> None:
        try:
            self._write()
        finally:
            self._has_tried.set()
        while not self._ended.wait(self._seconds):
            self._write()

    def _write(self) -> None:
        record = self._make_record(has_ended=self._ended.is_set())
        try:
            self._store.replace(record.name, record.to_bytes())
        except storage_errors() as error:
            log.log(self._log_level, "%s cannot be written: %s", record.name, error)


def driver_heartbeat(store: Store, usage: Callable[[], Usage]) -> Heartbeat:
    """The heartbeat of a driver in this process.

    Args:
        store: The output.
        usage: Returns how the workers have spent their time so far; called on another thread.
    """
    own = DriverRecord.of_this_process()

    def make_record(*, has_ended: bool) -> DriverRecord:
        return replace(own, last_seen=datetime.now(UTC), has_ended=has_ended, usage=usage())

    return Heartbeat(store, make_record, HEARTBEAT_SECONDS)


def driver_records(store: Store) -> Iterator[DriverRecord]:
    """The records of all drivers that ever worked on an output."""
    records = read_records(store, store.names("drivers"), DriverRecord.from_bytes)
    return (record for _, record in records)


def warn_of_others(store: Store) -> int:
    """Warn of other drivers that work on the output; return how many there are."""
    now = datetime.now(UTC)
    others = [record for record in driver_records(store) if record.is_at_work(now)]
    for record in others:
        log.warning(
            "another driver works on %s (process %d on %s, last seen %.0f s ago): results stay "
            "correct, but rows are computed twice; stop one of the two",
            store.uri,
            record.pid,
            record.host,
            (now - record.last_seen).total_seconds(),
        )
    return len(others)


@dataclass(frozen=True)
class WorkerRecord:
    """What a worker process reports about itself, `workers/<uuid>.json`.

    Attributes:
        uuid: Identifies the process.
        node: The host it runs on.
        pid: Its process id there.
        device: The device's name.
        model_digest: Digest of its model.
        model_shape: Sizes of its model, as `ModelShape.to_dict` has them; None in older records.
        gpus: GPUs of the worker, a fraction where workers share one.
        cpus: CPUs of the worker.
        started: When it started.
        loaded: When its model was in memory; None if it never was.
        last_seen: When it last wrote this record.
    """

    uuid: str
    node: str
    pid: int
    device: str
    model_digest: str
    model_shape: Mapping[str, Any] | None
    gpus: float | None
    cpus: float
    started: datetime
    loaded: datetime | None
    last_seen: datetime

    @property
    def name(self) -> str:
        """Name of the object in the store."""
        return f"workers/{self.uuid}.json"

    @property
    def devices(self) -> float:
        """Devices of the worker: a fraction where workers share one, 1 for a worker without."""
        return float(self.gpus or 1.0)

    def to_bytes(self) -> bytes:
        """As JSON."""
        content = {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "started": self.started.isoformat(),
            "loaded": self.loaded.isoformat() if self.loaded else None,
            "last_seen": self.last_seen.isoformat(),
        }
        return json_bytes(content)

    @staticmethod
    def from_bytes(data: bytes) -> WorkerRecord:
        """From JSON.

        Raises:
            ValueError, KeyError, TypeError: The data is not a record.
        """
        content = dict(json.loads(data))
        shape, gpus = content.get("model_shape"), content["gpus"]
        return WorkerRecord(
            uuid=str(content["uuid"]),
            node=str(content["node"]),
            pid=int(content["pid"]),
            device=str(content["device"]),
            model_digest=str(content["model_digest"]),
            model_shape=dict(shape) if shape else None,
            gpus=None if gpus is None else float(gpus),
            cpus=float(content["cpus"]),
            started=datetime.fromisoformat(content["started"]),
            loaded=datetime.fromisoformat(content["loaded"]) if content["loaded"] else None,
            last_seen=datetime.fromisoformat(content["last_seen"]),
        )


def worker_records(store: Store) -> Iterator[WorkerRecord]:
    """The records of all worker processes that ever worked on an output."""
    records = read_records(store, store.names("workers"), WorkerRecord.from_bytes)
    return (record for _, record in records)
