"""Workers of a driver: started, placed, loaded, calibrated, replaced and dropped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from gc2ray.core.errors import (
    ConfigError,
    GivenUp,
)
from gc2ray.core.shards import SourceFile, first_spans
from gc2ray.core.usage import UsageKind
from gc2ray.output.planner import CALIBRATION_ROWS
from gc2ray.runner.messages import (
    CallFailed,
    Event,
    Progress,
    Progressed,
    WorkerDied,
    WorkerDraining,
    WorkerExited,
    WorkerPlaced,
)
from jobs.benchmarks.support.simulated_pool import SimulatedPool
from tests.support.drivers import DriverHarness, make_plan


def test_a_stalled_worker_is_killed_and_its_shard_redone(tmp_path: Path) -> None:
    plan = make_plan()
    hanging = plan.shards[2].sid
    pool = SimulatedPool(
        lambda w, shard, attempt: "hang" if shard.sid == hanging and attempt == 1 else "done"
    )
    harness = DriverHarness(tmp_path, pool)
    harness.run(plan)
    assert Counter(harness.finished) == Counter(shard.sid for shard in plan.shards)
    assert len(pool.killed) == 1
    assert pool.time >= 100.0


def test_a_slow_worker_is_not_stalled(tmp_path: Path) -> None:
    """Each shard takes 20 times `stall_seconds`, but rows keep finishing."""
    plan = make_plan(rows=40, per_shard=20)
    pool = SimulatedPool(seconds_per_row=90.0)
    original = pool.submit

    def submit(worker, assignment):
        original(worker, assignment)
        shard = assignment.shard
        base = pool._rows.get(worker, 0) - shard.rows
        start = pool._busy_until[worker] - shard.rows * 90.0
        for row in range(1, shard.rows):
            due = start + row * 90.0
            pool.at(due - pool.time, Progressed(worker, Progress(answers=base + row)))

    pool.submit = submit
    harness = DriverHarness(tmp_path, pool)
    harness.run(plan)
    assert pool.killed == []
    assert len(harness.finished) == 2


def test_a_full_cluster_is_reported_with_what_it_lacks(tmp_path: Path) -> None:
    harness = DriverHarness(tmp_path, SimulatedPool(placed=0), place_seconds=30.0)
    with pytest.raises(GivenUp, match=r"no room for a worker within 30 s: .*cluster has 0 GPU"):
        harness.run(make_plan())


def test_resources_for_some_workers_are_enough(tmp_path: Path) -> None:
    harness = DriverHarness(tmp_path, SimulatedPool(placed=1), place_seconds=30.0)
    harness.run(make_plan())
    assert len(harness.finished) == 10
    assert {worker for worker, _, _ in harness.pool.submitted} == {1}


def test_loading_has_its_own_clock_renewed_by_progress(tmp_path: Path) -> None:
    harness = DriverHarness(tmp_path, SimulatedPool(load_goes=lambda w: "slow"), load_seconds=60.0)
    harness.run(make_plan())
    assert harness.pool.killed == []
    assert len(harness.finished) == 10


def test_a_hanging_load_is_given_up(tmp_path: Path) -> None:
    harness = DriverHarness(tmp_path, SimulatedPool(load_goes=lambda w: "hang"), load_seconds=60.0)
    with pytest.raises(GivenUp, match="no progress in loading for 60 s"):
        harness.run(make_plan())


def test_workers_that_die_while_loading_end_the_run(tmp_path: Path) -> None:
    harness = DriverHarness(tmp_path, SimulatedPool(load_goes=lambda w: "die"), workers=1)
    with pytest.raises(GivenUp, match="3 workers in a row died while starting"):
        harness.run(make_plan())
    assert harness.pool.started == 3
    assert harness.pool.time >= 5.0 + 10.0, "memory comes back late: the next ones waited"


def test_workers_that_die_while_starting_do_not_end_a_run_in_which_one_answers(
    tmp_path: Path,
) -> None:
    """Its row may have taken the memory; and no more of them than one in five seconds."""
    pool = SimulatedPool(load_goes=lambda w: "done" if w in (1, 40) else "die")
    harness = DriverHarness(tmp_path, pool, workers=2, stall_seconds=1000.0)
    harness.run(make_plan(rows=400, per_shard=100))
    assert len(harness.finished) == 4
    assert 10 < pool.started <= 400 / 5.0


def test_a_model_that_cannot_be_loaded_is_the_users_error(tmp_path: Path) -> None:
    pool = SimulatedPool(load_goes=lambda w: "hang")
    load = pool.load
    pool.load = lambda worker: (
        load(worker),
        pool.at(1.0, CallFailed(worker, None, ConfigError("recipe.model.path: wrong"))),
    )
    with pytest.raises(ConfigError, match=r"recipe\.model\.path"):
        DriverHarness(tmp_path, pool).run(make_plan())


def test_calibration_keeps_its_workers(tmp_path: Path) -> None:
    """One measures while the others load; all of them stay."""
    pool = SimulatedPool(seconds_per_row=0.5)
    harness = DriverHarness(tmp_path, pool)
    sample = first_spans([SourceFile("a.parquet", "f", (1000,))], CALIBRATION_ROWS)
    assert harness.driver.calibrate(sample) == 0.5
    harness.run(make_plan())
    assert pool.started == 2
    assert pool.calibrated == [1]


def test_calibration_that_fails_gives_up(tmp_path: Path) -> None:
    pool = SimulatedPool()
    pool.calibrate = lambda worker, spans: pool.at(
        1.0, CallFailed(worker, None, OSError("changed"))
    )
    sample = first_spans([SourceFile("a.parquet", "f", (1000,))], CALIBRATION_ROWS)
    with pytest.raises(GivenUp, match="3 workers in a row died while starting: OSError: changed"):
        DriverHarness(tmp_path, pool).driver.calibrate(sample)


def test_a_long_calibration_costs_no_waiting_worker(tmp_path: Path) -> None:
    """The one that measures stalls and is replaced; the other, idle all the while, is not."""
    pool = SimulatedPool(seconds_per_row=0.5)
    original = pool.calibrate
    pool.calibrate = lambda worker, spans: original(worker, spans) if worker != 1 else None
    sample = first_spans([SourceFile("a.parquet", "f", (1000,))], CALIBRATION_ROWS)
    harness = DriverHarness(tmp_path, pool)
    assert harness.driver.calibrate(sample) == 0.5
    assert pool.killed == [1]
    assert pool.calibrated == [2]


def test_workers_are_dropped_when_nothing_waits(tmp_path: Path) -> None:
    """All but one, which is there for what gets lost; and never below the minimum."""
    plan = make_plan(rows=90)
    slow = plan.shards[-1].sid

    def run(**range_: int) -> SimulatedPool:
        pool = SimulatedPool(lambda w, shard, attempt: "hang" if shard.sid == slow else "done")
        DriverHarness(tmp_path, pool, workers=range_, tries=1, stall_seconds=500.0).run(plan)
        return pool

    pool = run(max=4)
    assert (pool.started, len(pool.dropped)) == (4, 2)
    assert run(min=4, max=4).dropped == []


def test_a_lost_shard_brings_workers_back(tmp_path: Path) -> None:
    """The last shards kill both that are left; they are done by others."""
    pool = SimulatedPool(lambda w, s, attempt: "die" if s.index >= 8 and attempt == 1 else "done")
    harness = DriverHarness(tmp_path, pool, workers={"max": 4})
    harness.run(make_plan())
    assert len(harness.finished) == 10


def test_workers_without_resources_join_later(tmp_path: Path) -> None:
    """A node that joins is used; until then the others go on, and a line says so once."""
    pool = SimulatedPool(placed=1)
    late = pool.start

    def start() -> int:
        worker = late()
        if worker == 2:
            pool.at(120.0, WorkerPlaced(2))
        return worker

    pool.start = start
    harness = DriverHarness(tmp_path, pool, place_seconds=30.0)
    harness.run(make_plan(rows=300))
    workers = {worker for worker, _, _ in pool.submitted}
    assert (workers, pool.started) == ({1, 2}, 2)
    assert [snapshot.workers for snapshot in harness.seen][-1] == 2


def test_fewer_workers_than_the_minimum_end_the_run(tmp_path: Path) -> None:
    harness = DriverHarness(
        tmp_path, SimulatedPool(placed=1), workers={"min": 2, "max": 4}, place_seconds=30.0
    )
    with pytest.raises(GivenUp, match="no room for a worker within 30 s"):
        harness.run(make_plan(rows=1000))


def test_a_worker_whose_node_is_about_to_go_gets_no_more(tmp_path: Path) -> None:
    """It ends what it has, another takes its place, and nothing counts as lost."""
    pool = SimulatedPool(lambda worker, shard, attempt: "leave" if worker == 1 else "done")
    harness = DriverHarness(tmp_path, pool)
    harness.run(make_plan(rows=200))
    assert len(harness.finished) == 20
    assert pool.dropped[0] == 1
    assert pool.started == 3
    mine = [shard for worker, shard, _ in pool.submitted if worker == 1]
    assert len(mine) == 2
    assert {attempt for _, _, attempt in pool.submitted} == {1}


def test_a_replacement_starts_while_a_journal_is_read(tmp_path: Path) -> None:
    """The end is known at once, what was in hand a minute later; that minute is not billed."""
    pool = SimulatedPool(lambda w, shard, attempt: "hang" if attempt == 1 else "done")
    pool.at(10.0, WorkerExited(1))
    pool.at(70.0, WorkerDied(1, "the node is gone", ended=10.0))
    harness = DriverHarness(tmp_path, pool, workers=1, stall_seconds=500.0)
    poll = pool.poll

    def watch(seconds: float) -> list[Event]:
        started.append((pool.time, pool.started))
        return poll(seconds)

    started: list[tuple[float, int]] = []
    pool.poll = watch
    harness.run(make_plan(rows=10))
    assert harness.finished
    assert min(time for time, number in started if number == 2) < 12.0
    assert harness.driver.usage().seconds_for(UsageKind.DIED) == pytest.approx(8.0, abs=0.1)


def test_a_worker_that_has_ended_is_not_killed_again(tmp_path: Path) -> None:
    """Its journal takes longer to read than a stall does to be noticed."""
    pool = SimulatedPool(lambda w, shard, attempt: "hang" if attempt == 1 else "done")
    pool.at(10.0, WorkerExited(1))
    pool.at(200.0, WorkerDied(1, "the node is gone", ended=10.0))
    harness = DriverHarness(tmp_path, pool, workers=1, stall_seconds=100.0)
    harness.run(make_plan(rows=10))
    assert harness.finished
    assert pool.killed == []
    assert harness.driver.usage().seconds_for(UsageKind.STALLED) == 0.0


def test_an_idle_worker_that_has_ended_is_not_dropped(tmp_path: Path) -> None:
    """The second is idle when it ends; then the first is, too, and there is one too many."""
    seconds = (20.0, 5.0, 50.0)
    pool = SimulatedPool(service_seconds=lambda assignment: seconds[assignment.shard.index])
    pool.at(10.0, WorkerExited(2))
    pool.at(100.0, WorkerDied(2, "the node is gone", ended=10.0))
    harness = DriverHarness(tmp_path, pool, workers=3)
    harness.run(make_plan(rows=30))
    assert len(harness.finished) == 3
    assert 2 not in pool.dropped
    assert pool.started <= 4


def test_workers_that_go_with_their_nodes_do_not_end_the_run(tmp_path: Path) -> None:
    """Five nodes take a worker each that has just started."""
    pool = SimulatedPool(load_goes=lambda worker: "hang" if worker <= 5 else "done")
    for worker in range(1, 6):
        pool.at(worker + 0.5, WorkerDied(worker, "its node is gone", node_lost=True))
    harness = DriverHarness(tmp_path, pool, workers=1)
    harness.run(make_plan(rows=10))
    assert len(harness.finished) == 1
    assert pool.started == 6


def test_a_worker_that_has_ended_does_not_calibrate(tmp_path: Path) -> None:
    pool = SimulatedPool(seconds_per_row=0.5)
    original = pool.calibrate
    pool.calibrate = lambda worker, spans: original(worker, spans) if worker != 1 else None
    pool.at(2.5, WorkerExited(2))
    pool.at(2.6, WorkerDied(1, "the process ended"))
    pool.at(50.0, WorkerDied(2, "the node is gone", ended=2.5))
    sample = first_spans([SourceFile("a.parquet", "f", (1000,))], CALIBRATION_ROWS)
    assert DriverHarness(tmp_path, pool).driver.calibrate(sample) == 0.5
    assert pool.calibrated == [3]


def test_an_idle_worker_whose_node_goes_is_dropped_at_once(tmp_path: Path) -> None:
    pool = SimulatedPool(lambda w, s, a: "hang" if s.index == 0 else "done")
    pool.at(50.0, WorkerDraining(2))
    DriverHarness(tmp_path, pool, tries=1).run(make_plan(rows=20))
    assert pool.dropped[0] == 2
