"""The table of workers: its groups are those that a look at every worker would find."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import GivenUp
from gc2ray.core.shards import Shard
from gc2ray.core.usage import UsageKind
from gc2ray.runner.messages import Progress, ShardAssignment
from gc2ray.runner.worker_table import (
    IN_FLIGHT,
    SETUP_DEATHS,
    SETUP_PAUSE_SECONDS,
    SetupDeaths,
    WorkerState,
    WorkerTable,
)

CLOCKS = Cluster(load_seconds=60.0, stall_seconds=100.0)


def assignment(number: int, attempt: int = 1) -> ShardAssignment:
    return ShardAssignment(Shard(number, f"{number:016x}", ()), attempt)


def assert_consistent(table: WorkerTable) -> None:
    states = dict(table.items())
    for shards in range(IN_FLIGHT):
        assert table.with_capacity(shards) == sorted(
            worker
            for worker, state in states.items()
            if state.has_capacity and len(state.assignments) == shards
        )
    staying = [state for state in states.values() if not state.is_replaced]
    assert table.staying == len(staying)
    assert table.loaded == sum(state.loaded is not None for state in states.values())
    assert table.in_flight == sum(len(state.assignments) for state in states.values())
    loading = sum(state.loaded is None for state in staying)
    assert table.soon_free == loading + len(table.with_capacity(0))
    assert table.returning == sum(
        len(s.assignments) for s in states.values() if s.has_ended and s.is_replaced
    )


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_consistent_after_any_events(seed: int) -> None:
    draw, table, shards = Random(seed), WorkerTable(), iter(range(10**6))

    def give(worker: int) -> None:
        if table[worker].has_capacity:
            table.assign(worker, assignment(next(shards), draw.choice([1, 1, 2])))

    def take_back(worker: int) -> None:
        for handed in list(table[worker].assignments.values())[:1]:
            table.release(worker, handed.shard)

    steps: list[Callable[[int], object]] = [
        lambda worker: table.load(worker, 1.0),
        lambda worker: table.load(worker, 1.0),
        table.replace,
        table.end,
        table.remove,
        *[give] * 6,
        *[take_back] * 3,
    ]
    for number in range(300):
        if len(table) < 6:
            table.add(number, 0.0)
        draw.choice(steps)(draw.choice([worker for worker, _ in table.items()]))
        assert_consistent(table)


def test_a_retried_shard_fills_its_worker() -> None:
    table = WorkerTable()
    table.add(1, 0.0)
    table.load(1, 1.0)
    table.assign(1, assignment(0, attempt=2))
    assert table.with_capacity(1) == []
    table.release(1, assignment(0).shard)
    table.assign(1, assignment(0))
    assert table.with_capacity(1) == [1]


def test_progress_without_news_does_not_renew_the_clock() -> None:
    """While a model loads ticks are; while rows are answered only answers are."""
    state = WorkerState(started=0.0)
    state.note_progress(Progress(ticks=5), now=1.0)
    state.note_progress(Progress(ticks=5), now=2.0)
    assert state.active == 1.0
    state.loaded = 3.0
    assert state.note_progress(Progress(ticks=9, answers=2), now=4.0).answers == 2
    assert state.note_progress(Progress(ticks=20, answers=2), now=5.0).answers == 0
    assert state.active == 4.0


def test_each_phase_has_its_clock() -> None:
    state = WorkerState(started=0.0)
    assert state.overdue(1000.0, CLOCKS) is None, "placement is the driver's business"
    state.placed = 10.0
    assert state.usage(UsageKind.USEFUL) == UsageKind.LOADING
    assert state.overdue(60.0, CLOCKS) is None
    assert state.overdue(61.0, CLOCKS) == "no progress in loading for 60 s"
    state.loaded = state.active = 50.0
    assert state.usage(UsageKind.USEFUL) == UsageKind.IDLE
    assert state.overdue(1000.0, CLOCKS) is None, "idle"
    state.assignments["sid"] = assignment(0)
    assert state.usage(UsageKind.USEFUL) == UsageKind.USEFUL
    assert state.overdue(150.0, CLOCKS) is None
    assert state.overdue(151.0, CLOCKS) == "stalled: no answer for 100 s"
    state.has_ended = True
    assert state.overdue(1000.0, CLOCKS) is None


def test_deaths_during_setup_end_a_run_only_in_a_row() -> None:
    deaths = SetupDeaths()
    for _ in range(SETUP_DEATHS - 1):
        deaths.count("killed", 100.0, is_alone=True)
    deaths.count("killed", 100.0, is_alone=False)
    assert deaths.may_start_at == 100.0 + SETUP_PAUSE_SECONDS * (SETUP_DEATHS - 1)
    deaths.clear()
    for _ in range(SETUP_DEATHS - 1):
        deaths.count("killed", 100.0, is_alone=True)
    with pytest.raises(GivenUp, match=f"{SETUP_DEATHS} workers in a row died .*: killed"):
        deaths.count("killed", 100.0, is_alone=True)
