"""A driver that is stopped, or whose storage refuses what is written."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from gc2ray.core.errors import (
    GivenUp,
    Interrupted,
    StorageRefused,
)
from gc2ray.core.shards import SourceFile, first_spans
from gc2ray.runner.messages import (
    CallFailed,
    Event,
)
from jobs.benchmarks.support.simulated_pool import SimulatedPool
from tests.support.drivers import DriverHarness, make_plan


def stopped_at(pool: SimulatedPool, seconds: float) -> threading.Event:
    """Set when the pool's clock says so."""
    stop, poll = threading.Event(), pool.poll

    def poll_and_stop(wait: float) -> list[Event]:
        events = poll(wait)
        if pool.time >= seconds:
            stop.set()
        return events

    pool.poll = poll_and_stop
    return stop


@pytest.mark.parametrize(("drain_seconds", "abandoned"), [(30.0, 0), (2.0, 4)])
def test_a_stopped_run_commits_what_ends_in_time(
    tmp_path: Path, drain_seconds: float, abandoned: int
) -> None:
    pool = SimulatedPool()
    harness = DriverHarness(tmp_path, pool, drain_seconds=drain_seconds)
    harness.driver._stop = stopped_at(pool, 14.0)
    left = f"; {abandoned} in flight were abandoned" if abandoned else ""
    finished = 2 if abandoned else 6
    with pytest.raises(Interrupted, match=rf"^{20 - finished} shards are left to answer{left}$"):
        harness.run(make_plan(rows=200))
    assert len(harness.finished) == finished
    assert len(pool.submitted) == 6
    assert harness.seen[-1].phase == "stopping"


def test_a_run_is_stopped_while_calibrating(tmp_path: Path) -> None:
    pool = SimulatedPool(load_goes=lambda worker: "hang")
    harness = DriverHarness(tmp_path, pool)
    harness.driver._stop = stopped_at(pool, 10.0)
    with pytest.raises(Interrupted, match="nothing was answered yet"):
        harness.driver.calibrate(first_spans([SourceFile("a.parquet", "f", (1000,))], 24))


@pytest.mark.parametrize(("drain_seconds", "finished"), [(60.0, 7), (0.0, 6)])
def test_a_storage_that_refuses_ends_the_run_at_once(
    tmp_path: Path, drain_seconds: float, finished: int
) -> None:
    """Nothing more is handed out; what others have in flight is committed if it ends in time."""
    pool = SimulatedPool(lambda w, shard, attempt: "refuse" if shard.index == 2 else "done")
    harness = DriverHarness(tmp_path, pool, drain_seconds=drain_seconds)
    with pytest.raises(GivenUp) as ended:
        harness.run(make_plan(rows=2000))
    left = f"; {200 - finished} shards are left to answer"
    assert str(ended.value).startswith(f"s3://out refused data/part{left}")
    assert "run the same command again" in str(ended.value)
    answered = [assignment.shard.index for assignment in pool.assignments]
    assert len(answered) == len({*answered}) == 8, "what two workers had at most"
    assert len(harness.finished) == finished
    assert harness.dead_letters() == []


def test_a_last_shard_that_is_refused_is_reported_too(tmp_path: Path) -> None:
    pool = SimulatedPool(lambda w, shard, attempt: "refuse")
    with pytest.raises(GivenUp, match=r"refused data/part; 1 shards are left to answer\. "):
        DriverHarness(tmp_path, pool, workers=1).run(make_plan(rows=10))
    assert len(pool.assignments) == 1


def test_a_model_record_that_is_refused_is_not_retried(tmp_path: Path) -> None:
    pool = SimulatedPool(load_goes=lambda w: "hang")
    load = pool.load
    refused = CallFailed(1, None, StorageRefused("s3://out refused model.json"))
    pool.load = lambda worker: (load(worker), pool.at(1.0, replace(refused, worker=worker)))
    harness = DriverHarness(tmp_path, pool, workers=1)
    with pytest.raises(GivenUp, match=r"refused model\.json; nothing was answered yet"):
        harness.driver.calibrate(first_spans([SourceFile("a.parquet", "f", (1000,))], 24))
    assert pool.started == 1
    with pytest.raises(GivenUp, match=r"refused model\.json; 10 shards are left"):
        DriverHarness(tmp_path, pool, workers=1).run(make_plan())
    assert pool.started == 2


def test_a_dead_letter_that_is_refused_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        raise PermissionError(13, "ExpiredToken")

    pool = SimulatedPool(lambda w, shard, attempt: "fail" if shard.index == 0 else "done")
    harness = DriverHarness(tmp_path, pool, workers=1, tries=1)
    monkeypatch.setattr(harness.store, "create", refuse)
    with pytest.raises(GivenUp) as ended:
        harness.run(make_plan(rows=2000))
    assert "shard 0 is given up (OSError: no such file), and " in str(ended.value)
    assert "refused its dead letter: PermissionError: [Errno 13] ExpiredToken; " in str(ended.value)
    assert len(pool.assignments) <= 3
