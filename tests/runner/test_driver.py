"""The driver's decisions, on a pool with a clock of its own: no Ray, no waiting."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gc2ray.core.errors import (
    GivenUp,
    Status,
    UnwritableShard,
)
from gc2ray.core.stats import RunStats
from gc2ray.core.usage import UsageKind
from gc2ray.output.parts import Commit
from gc2ray.output.planner import Committed
from gc2ray.runner.messages import (
    CallFailed,
    Event,
    Progress,
    Progressed,
    ShardAssignment,
    ShardFinished,
    Snapshot,
    WorkerDied,
)
from jobs.benchmarks.support.simulated_pool import SimulatedPool, done
from tests.support.drivers import DriverHarness, make_plan


def test_every_shard_once(tmp_path: Path) -> None:
    plan = make_plan()
    harness = DriverHarness(tmp_path, SimulatedPool())
    harness.run(plan)
    assert Counter(harness.finished) == Counter(shard.sid for shard in plan.shards)
    assert {worker for worker, _, _ in harness.pool.submitted} == {1, 2}
    assert harness.pool.most_in_flight == 2
    last: Snapshot = harness.seen[-1]
    assert (last.rows, last.total_rows, last.workers) == (100, 100, 2)


def test_committed_shards_are_not_assigned(tmp_path: Path) -> None:
    plan = make_plan()
    committed = Committed(np.arange(10) < 7, 70, RunStats())
    harness = DriverHarness(tmp_path, SimulatedPool())
    harness.run(plan, committed)
    assert sorted(harness.finished) == sorted(shard.sid for shard in plan.shards[7:])
    assert harness.seen[-1].rows == 100


def test_no_more_workers_than_shards(tmp_path: Path) -> None:
    harness = DriverHarness(tmp_path, SimulatedPool(), workers=8)
    harness.run(make_plan(rows=20, per_shard=10))
    assert harness.pool.started == 2


def test_a_killing_shard_is_a_dead_letter_and_takes_no_other_with_it(tmp_path: Path) -> None:
    plan = make_plan()
    killer = plan.shards[3].sid
    pool = SimulatedPool(lambda worker, shard, attempt: "die" if shard.sid == killer else "done")
    harness = DriverHarness(tmp_path, pool, tries=3)
    harness.run(plan)
    assert Counter(harness.finished) == Counter(s.sid for s in plan.shards if s.sid != killer)
    letter = harness.dead_letters()
    assert [item["sid"] for item in letter] == [killer]
    assert letter[0]["tries"] == 3
    assert "the process ended" in letter[0]["reason"]
    assert letter[0]["spans"] == [
        {"source": "a.parquet", "fingerprint": "f", "first": 30, "stop": 40}
    ]
    attempts = [attempt for _, shard, attempt in pool.submitted if shard.sid == killer]
    assert attempts == [1, 2, 3]


def test_a_lost_shard_runs_alone(tmp_path: Path) -> None:
    plan = make_plan(rows=200)
    killer = plan.shards[0].sid
    pool = SimulatedPool(lambda worker, shard, attempt: "die" if shard.sid == killer else "done")
    harness = DriverHarness(tmp_path, pool, workers=1, tries=3)
    harness.run(plan)
    mates = Counter(shard.sid for _, shard, _ in pool.submitted if shard.sid != killer)
    assert sorted(mates.values(), reverse=True)[:2] == [2, 1], "only the first mate was redone"


def test_a_shard_that_always_hangs_is_given_up_with_the_reason(tmp_path: Path) -> None:
    plan = make_plan(rows=30)
    hanging = plan.shards[1].sid
    pool = SimulatedPool(lambda w, shard, attempt: "hang" if shard.sid == hanging else "done")
    harness = DriverHarness(tmp_path, pool, tries=2)
    harness.run(plan)
    assert [item["sid"] for item in harness.dead_letters()] == [hanging]
    assert "no answer for 100 s" in harness.dead_letters()[0]["reason"]
    assert len(harness.finished) == 2


def test_a_failing_shard_is_retried_on_living_workers(tmp_path: Path) -> None:
    plan = make_plan(rows=30)
    failing = plan.shards[0].sid
    pool = SimulatedPool(lambda w, shard, attempt: "fail" if shard.sid == failing else "done")
    harness = DriverHarness(tmp_path, pool)
    harness.run(plan)
    assert pool.killed == []
    assert pool.started == 2
    assert "OSError: no such file" in harness.dead_letters()[0]["reason"]


def test_dead_letters_of_several_runs_are_kept(tmp_path: Path) -> None:
    plan = make_plan(rows=10)
    for count in (1, 2):
        pool = SimulatedPool(lambda worker, shard, attempt: "fail")
        harness = DriverHarness(tmp_path, pool, tries=1)
        harness.run(plan)
        assert len(harness.dead_letters()) == count


def test_too_many_bad_rows_stop_the_run_with_the_first_errors(tmp_path: Path) -> None:
    harness = DriverHarness(tmp_path, SimulatedPool(bad=True), max_bad_rows=0.5)
    with pytest.raises(GivenUp, match=r"(?s)answers failed.*a: failed: x\n.*b: .*\n.*c: failed: z"):
        harness.run(make_plan(rows=1000, per_shard=50))
    assert len(harness.finished) < 20


def pool_of_many_prompts() -> SimulatedPool:
    """Rows of fifty prompts, an answer every 30 s, every fifth bad."""
    pool = SimulatedPool(seconds_per_row=1500.0)
    original = pool.submit

    def submit(worker, assignment):
        original(worker, assignment)
        shard = assignment.shard
        start = pool._busy_until[worker] - shard.rows * 1500.0
        for prompt in range(1, shard.rows * 50):
            progress = Progress(rows=prompt // 50, answers=prompt, bad_answers=prompt // 5)
            pool.at(start + prompt * 30.0 - pool.time, Progressed(worker, progress))

    pool.submit = submit
    return pool


def test_an_answer_keeps_a_worker_alive_and_rows_are_counted(tmp_path: Path) -> None:
    """No row ends within `stall_seconds`, and ten rows are ten rows, whatever their prompts."""
    pool = pool_of_many_prompts()
    harness = DriverHarness(tmp_path, pool, max_bad_rows=0.25)
    harness.run(make_plan(rows=10, per_shard=5))
    assert pool.killed == []
    assert len(harness.finished) == 2
    shown = [(snapshot.rows, snapshot.total_rows) for snapshot in harness.seen]
    assert shown[-1] == max(shown) == (10, 10)


def test_bad_answers_are_judged_by_answers(tmp_path: Path) -> None:
    harness = DriverHarness(tmp_path, pool_of_many_prompts(), max_bad_rows=0.1)
    with pytest.raises(GivenUp, match=r"of 2\d\d answers failed"):
        harness.run(make_plan(rows=10, per_shard=5))


def test_few_bad_rows_are_not_judged(tmp_path: Path) -> None:
    harness = DriverHarness(tmp_path, SimulatedPool(bad=True))
    harness.run(make_plan(rows=100))
    assert len(harness.finished) == 10


def pool_that_dies_at(row: int, outcome: str = "die") -> SimulatedPool:
    """A shard's row that kills its worker until it is named; up to five rows are in hand."""

    def behave(worker, shard, attempt):
        assignment = pool.assignments[-1]
        return outcome if shard.index == 3 and row not in assignment.poison else "done"

    def in_hand(assignment):
        if assignment.shard.index != 3:
            return (0, 1)
        return (row,) if row in assignment.suspects else (row - 1, row, row + 1)

    pool = SimulatedPool(behave, in_hand=in_hand)
    return pool


@pytest.mark.parametrize(
    ("outcome", "status"), [("die", Status.KILLED_WORKER), ("hang", Status.TIMEOUT)]
)
def test_a_row_that_kills_is_named_and_the_shard_committed(
    tmp_path: Path, outcome: str, status: Status
) -> None:
    plan = make_plan()
    pool = pool_that_dies_at(5, outcome)
    harness = DriverHarness(tmp_path, pool)
    harness.run(plan)
    assert Counter(harness.finished) == Counter(shard.sid for shard in plan.shards)
    assert harness.dead_letters() == []
    tries = [assignment for assignment in pool.assignments if assignment.shard.index == 3]
    assert [assignment.suspects for assignment in tries] == [(), (4, 5, 6), (5,), ()]
    assert [dict(assignment.poison) for assignment in tries[:3]] == [{}, {}, {}]
    ((row, poison),) = tries[3].poison.items()
    assert (row, poison.status) == (5, status)
    assert poison.reason


def test_other_shards_are_not_suspected_for_long(tmp_path: Path) -> None:
    """What was in flight beside the killing row runs alone once, with its suspects, and is done."""
    pool = pool_that_dies_at(5)
    harness = DriverHarness(tmp_path, pool, workers=1)
    harness.run(make_plan())
    mates = Counter(h.shard.index for h in pool.assignments if h.shard.index != 3)
    assert max(mates.values()) == 2
    (again,) = [h for h in pool.assignments if h.shard.index != 3 and h.attempt == 2]
    assert again.suspects == (0, 1)


def test_rows_of_another_shard_in_hand_clear_a_suspect(tmp_path: Path) -> None:
    """Two workers die with row 3 alone of its shard, the first with rows of another shard, too."""
    pool = SimulatedPool(
        lambda w, shard, attempt: "die" if shard.index == 0 and attempt < 3 else "done",
        in_hand=lambda assignment: (3,) if assignment.shard.index == 0 else (1, 2),
    )
    DriverHarness(tmp_path, pool, workers=1).run(make_plan())
    tries = [assignment for assignment in pool.assignments if assignment.shard.index == 0]
    assert [(assignment.attempt, dict(assignment.poison)) for assignment in tries] == [
        (1, {}),
        (2, {}),
        (3, {}),
    ]


def test_a_shard_that_was_not_begun_loses_no_try(tmp_path: Path) -> None:
    """It waited beside the one that killed; a try of three is not gone."""
    waiting: list[str] = []
    pool = SimulatedPool(lambda w, s, attempt: "hang" if s.index == 1 and attempt < 4 else "done")
    start = pool.start

    def dying() -> int:
        worker = start()
        if worker < 4:
            mate = make_plan().shards[1].sid
            waiting.append(mate)
            pool.at(5.0, WorkerDied(worker, "killed", in_hand={mate: ()} if worker == 1 else {}))
        return worker

    pool.start = dying
    pool._died = lambda event: event
    harness = DriverHarness(tmp_path, pool, workers=1, tries=3)
    harness.run(make_plan(rows=20))
    assert len(waiting) == 3
    assert harness.dead_letters() == []


def test_the_device_time_of_a_smooth_run(tmp_path: Path) -> None:
    """Two workers, 1 s of loading each, ten shards of 10 s between them."""
    harness = DriverHarness(tmp_path, SimulatedPool(), gpus_per_worker=2.0)
    harness.run(make_plan())
    device_time = harness.driver.usage()
    assert device_time.seconds_for(UsageKind.USEFUL) == 200.0
    assert device_time.seconds_for(UsageKind.LOADING) == 4.0
    assert device_time.total_seconds == pytest.approx(204.0, abs=3.0)


def test_wasted_device_time_is_listed_by_cause(tmp_path: Path) -> None:
    """One death half a second into a shard, one failure, one stall of 100 s, one lost race."""
    how = {1: "die", 4: "fail", 7: "hang"}
    pool = SimulatedPool(lambda w, s, attempt: how.get(s.index, "done") if attempt == 1 else "done")
    harness = DriverHarness(tmp_path, pool, workers=1)
    poll = pool.poll

    def lose_one(seconds: float) -> list[Event]:
        return [
            replace(event, result=done(event.shard, Commit.LOST_RACE))
            if isinstance(event, ShardFinished) and event.shard.index == 9
            else event
            for event in poll(seconds)
        ]

    pool.poll = lose_one
    harness.run(make_plan())
    device_time = harness.driver.usage()
    assert device_time.seconds_for(UsageKind.USEFUL) == pytest.approx(90.0, abs=1.0)
    assert device_time.seconds_for(UsageKind.LOST_RACE) == pytest.approx(10.0, abs=0.5)
    assert device_time.seconds_for(UsageKind.STALLED) == pytest.approx(100.0, abs=2.0)
    assert 0 < device_time.seconds_for(UsageKind.DIED) < 12.0
    assert 0 < device_time.seconds_for(UsageKind.FAILED) < 12.0
    assert device_time.seconds_for(UsageKind.LOADING) == 3.0
    assert harness.driver.lost_races == 1


def test_a_part_that_can_never_be_written_is_answered_once(tmp_path: Path) -> None:
    pool = SimulatedPool(lambda w, shard, attempt: "hang" if shard.index == 1 else "done")
    unwritable = UnwritableShard("its answers do not fit into Parquet: column 'emb'")
    submit = pool.submit

    def fails(worker: int, assignment: ShardAssignment) -> None:
        submit(worker, assignment)
        if assignment.shard.index == 1:
            pool.at(30.0, CallFailed(worker, assignment.shard, unwritable))

    pool.submit = fails
    harness = DriverHarness(tmp_path, pool, tries=3)
    harness.run(make_plan(rows=50))
    assert [assignment.attempt for assignment in pool.assignments] == [1] * 5
    (letter,) = harness.dead_letters()
    assert letter["reason"] == f"UnwritableShard: {unwritable}"
    assert len(harness.finished) == 4
