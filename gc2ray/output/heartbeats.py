"""`Heartbeat`: a driver's record in the output directory, rewritten while it lives.

It says who is at work and what became of the workers' time so far. A second driver on the same
output sees it and says so. Nothing depends on it: parts are created, never overwritten, so two
drivers are never wrong, only twice as expensive.

Not covered: clocks of two hosts that differ by more than the lease; then a second driver may not
notice.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from gc2ray.core.errors import STORAGE_ERRORS
from gc2ray.core.usage import Usage
from gc2ray.data.store import Store

HEARTBEAT_SECONDS = 10.0
ALIVE_SECONDS = 35.0
"""A driver that was not seen for so long is gone: three heartbeats and a slow write."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DriverRecord:
    """What a driver says of itself.

    Attributes:
        uuid: Of the process.
        host: Where it runs.
        pid: Its process there.
        started: When it took the output up.
        last_seen: When it last wrote this.
        has_ended: It will write no more.
        bill: What became of its workers' time.
    """

    uuid: str
    host: str
    pid: int
    started: datetime
    last_seen: datetime
    has_ended: bool = False
    bill: Usage = field(default_factory=Usage)

    @property
    def name(self) -> str:
        """Where it is stored."""
        return f"drivers/{self.uuid}.json"

    def to_bytes(self) -> bytes:
        """As JSON."""
        content = {
            "uuid": self.uuid,
            "host": self.host,
            "pid": self.pid,
            "started": self.started.isoformat(),
            "last_seen": self.last_seen.isoformat(),
            "has_ended": self.has_ended,
            "device_seconds": self.bill.to_dict(),
        }
        return (json.dumps(content, indent=2) + "\n").encode()

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
            bill=Usage.from_dict(content["device_seconds"]),
        )

    def is_at_work(self, now: datetime) -> bool:
        """Whether it seems to live: on this host its process tells, elsewhere the time."""
        if self.has_ended or (now - self.last_seen).total_seconds() > ALIVE_SECONDS:
            return False
        return self.host != socket.gethostname() or _is_alive(self.pid)


class Heartbeat:
    """Keeps a driver's record; a context manager.

    Args:
        store: The output.
        bill: What became of the workers' time so far; called on another thread.
    """

    def __init__(self, store: Store, bill: Callable[[], Usage]) -> None:
        now = datetime.now(UTC)
        self._store = store
        self._bill = bill
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="gc2ray-lease")
        self.record = DriverRecord(uuid.uuid4().hex, socket.gethostname(), os.getpid(), now, now)

    def __enter__(self) -> Self:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._write()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        record = replace(
            self.record,
            last_seen=datetime.now(UTC),
            has_ended=self._ended.is_set(),
            bill=self._bill(),
        )
        try:
            self._store.replace(record.name, record.to_bytes())
        except STORAGE_ERRORS as error:  # answers do not wait for it; the next may get through
            log.warning("%s cannot be written: %s", record.name, error)


def driver_records(store: Store) -> Iterator[DriverRecord]:
    """The records of all drivers that ever worked on an output."""
    for name in store.names("drivers"):
        try:
            yield DriverRecord.from_bytes(store.read(name) or b"")
        except (ValueError, KeyError, TypeError):
            log.warning("%s: %s is not a record that gc2ray wrote", store.uri, name)


def warn_of_others(store: Store) -> int:
    """Say so where another driver is at work on the output; how many there are."""
    now = datetime.now(UTC)
    others = [record for record in driver_records(store) if record.is_at_work(now)]
    for record in others:
        log.warning(
            "another driver is at work on %s (process %d on %s, seen %.0f s ago): nothing will be "
            "wrong or doubled, but rows are answered twice; stop one of the two",
            store.uri,
            record.pid,
            record.host,
            (now - record.last_seen).total_seconds(),
        )
    return len(others)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, but there
    return True


@dataclass(frozen=True)
class WorkerRecord:
    """What a worker process says of itself.

    Attributes:
        device: What its device calls itself.
        devices: Of them; a share of one where workers share it, 1 where it has none.
        started: When.
        loaded: When its model was; None where it never was.
        last_seen: When it last wrote this.
        model_shape: Of its model, as `ModelShape.to_dict` has it; None in older records.
    """

    device: str
    devices: float
    started: datetime
    loaded: datetime | None
    last_seen: datetime
    model_shape: Mapping[str, Any] | None

    @staticmethod
    def from_bytes(data: bytes) -> WorkerRecord:
        """From JSON.

        Raises:
            ValueError, KeyError, TypeError: Not a record.
        """
        content = dict(json.loads(data))
        shape = content.get("model_shape")
        return WorkerRecord(
            device=str(content["device"]),
            devices=float(content["gpus"] or 1.0),
            started=datetime.fromisoformat(content["started"]),
            loaded=datetime.fromisoformat(content["loaded"]) if content["loaded"] else None,
            last_seen=datetime.fromisoformat(content["last_seen"]),
            model_shape=dict(shape) if shape else None,
        )
