"""Two drivers on one output: the second sees the first, and nothing depends on it."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gc2ray.core.usage import Usage, UsageKind
from gc2ray.data.store import Store
from gc2ray.output import heartbeats
from gc2ray.output.heartbeats import (
    ALIVE_SECONDS,
    DriverRecord,
    Heartbeat,
    WorkerRecord,
    driver_heartbeat,
    driver_records,
    warn_of_others,
)

USAGE = Usage({UsageKind.USEFUL: 12.5})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def test_a_second_driver_is_warned_of_the_first(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), driver_heartbeat(store, lambda: USAGE):
        assert warn_of_others(store) == 1
    (message,) = caplog.messages
    assert f"process {os.getpid()} on {socket.gethostname()}" in message
    assert "results stay correct" in message
    assert warn_of_others(store) == 0, "it has ended"
    (record,) = driver_records(store)
    assert (record.has_ended, record.usage, record.pid) == (True, USAGE, os.getpid())


def test_a_heartbeat_is_rewritten_while_the_driver_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "HEARTBEAT_SECONDS", 0.01)
    beats, seconds = threading.Semaphore(0), iter(range(1000))

    def device_time() -> Usage:
        beats.release()
        return Usage({UsageKind.USEFUL: float(next(seconds))})

    with driver_heartbeat(store, device_time):
        for _ in range(4):
            assert beats.acquire(timeout=60)
        (record,) = driver_records(store)
        assert record.usage.seconds_for(UsageKind.USEFUL) >= 1
        assert record.last_seen >= record.started
        assert not record.has_ended


def test_a_driver_that_ended_is_not_at_work(store: Store) -> None:
    now = datetime.now(UTC)
    record = DriverRecord.of_this_process()
    assert record.is_at_work(now)
    assert not replace(record, has_ended=True).is_at_work(now)
    assert not record.is_at_work(now + timedelta(seconds=ALIVE_SECONDS + 1))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert not replace(record, pid=dead.pid).is_at_work(now)
    assert replace(record, pid=dead.pid, host="elsewhere").is_at_work(now)


def test_a_heartbeat_that_cannot_be_written_stops_no_driver(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Store, "replace", full)
    with driver_heartbeat(store, Usage):
        pass
    assert "cannot be written: no space left" in caplog.messages[0]


def test_a_process_does_not_wait_for_its_first_record(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker answers rows while a slow storage takes its record."""
    answering, written = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        assert answering.wait(timeout=60)
        written.set()

    monkeypatch.setattr(Store, "replace", slow)
    Heartbeat(store, lambda has_ended: DriverRecord.of_this_process(), seconds=3600).start()
    assert not written.is_set()
    answering.set()
    assert written.wait(timeout=60)


def test_a_file_that_is_not_a_record_is_named_and_ignored(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in (("a", b"{}"), ("b", b"no json"), ("c", b"[]")):
        store.replace(f"drivers/{name}.json", content)
    assert list(driver_records(store)) == []
    assert len(caplog.messages) == 3


@pytest.mark.parametrize(("gpus", "devices"), [(None, 1.0), (0.0, 1.0), (0.5, 0.5), (2.0, 2.0)])
def test_a_workers_record_is_read_as_it_was_written(gpus: float | None, devices: float) -> None:
    now = datetime.now(UTC)
    record = WorkerRecord("w", "n", 7, "cpu", "d", {"itemsize": 2}, gpus, 1.5, now, None, now)
    data = record.to_bytes()
    assert list(json.loads(data)) == [
        "uuid", "node", "pid", "device", "model_digest", "model_shape", "gpus", "cpus", "started",
        "loaded", "last_seen",
    ]  # fmt: skip
    assert WorkerRecord.from_bytes(data) == record
    loaded = replace(record, loaded=now, model_shape=None)
    assert WorkerRecord.from_bytes(loaded.to_bytes()) == loaded
    assert (record.name, record.devices) == ("workers/w.json", devices)
