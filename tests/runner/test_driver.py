"""The driver's decisions, on a pool with a clock of its own: no Ray, no waiting."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import (
    ConfigError,
    GivenUp,
    Interrupted,
    Status,
    StorageRefused,
    UnwritableShard,
)
from gc2ray.core.shards import SourceFile, first_spans
from gc2ray.core.stats import RunStats
from gc2ray.core.usage import UsageKind
from gc2ray.data.store import Store
from gc2ray.output.parts import Commit
from gc2ray.output.plan import Plan
from gc2ray.output.planner import CALIBRATION_ROWS, Committed, shard_rows
from gc2ray.runner.driver import Driver
from gc2ray.runner.messages import (
    CallFailed,
    Event,
    Progress,
    Progressed,
    ShardAssignment,
    ShardFinished,
    Snapshot,
    WorkerDied,
    WorkerDraining,
    WorkerExited,
    WorkerPlaced,
)
from jobs.benchmarks.support.simulated_pool import SimulatedPool, done
from tests.support.rows import make_recipe

RECIPE = make_recipe("model")


def make_plan(rows: int = 100, per_shard: int = 10) -> Plan:
    return Plan.cut(RECIPE, [SourceFile("a.parquet", "f", (rows,))], per_shard, pa.schema([]))


class Harness:
    def __init__(self, tmp_path: Path, pool: SimulatedPool, **cluster: object) -> None:
        self.pool, self.finished, self.seen = pool, [], []
        pool.on_done = lambda shard: self.finished.append(shard.sid)
        settings = {"workers": 2, "stall_seconds": 100.0, **cluster}
        self.store = Store(str(tmp_path / "out"))
        self.driver = Driver(Cluster(**settings), self.store, pool, self.seen.append)

    def run(self, plan: Plan, committed: Committed | None = None) -> None:
        self.driver.run(plan, committed or Committed.nothing(plan))

    def letters(self) -> list[dict]:
        return [json.loads(self.store.read(name) or b"") for name in self.store.names("dead")]


def test_every_shard_once(tmp_path: Path) -> None:
    plan = make_plan()
    harness = Harness(tmp_path, SimulatedPool())
    harness.run(plan)
    assert Counter(harness.finished) == Counter(shard.sid for shard in plan.shards)
    assert {worker for worker, _, _ in harness.pool.submitted} == {1, 2}
    assert harness.pool.most_in_flight == 2
    last: Snapshot = harness.seen[-1]
    assert (last.rows, last.total_rows, last.workers) == (100, 100, 2)


def test_committed_shards_are_not_handed_out(tmp_path: Path) -> None:
    plan = make_plan()
    committed = Committed(np.arange(10) < 7, 70, RunStats())
    harness = Harness(tmp_path, SimulatedPool())
    harness.run(plan, committed)
    assert sorted(harness.finished) == sorted(shard.sid for shard in plan.shards[7:])
    assert harness.seen[-1].rows == 100


def test_no_more_workers_than_shards(tmp_path: Path) -> None:
    harness = Harness(tmp_path, SimulatedPool(), workers=8)
    harness.run(make_plan(rows=20, per_shard=10))
    assert harness.pool.started == 2


def test_a_killing_shard_is_a_dead_letter_and_takes_no_other_with_it(tmp_path: Path) -> None:
    plan = make_plan()
    killer = plan.shards[3].sid
    pool = SimulatedPool(lambda worker, shard, attempt: "die" if shard.sid == killer else "done")
    harness = Harness(tmp_path, pool, tries=3)
    harness.run(plan)
    assert Counter(harness.finished) == Counter(s.sid for s in plan.shards if s.sid != killer)
    letter = harness.letters()
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
    harness = Harness(tmp_path, pool, workers=1, tries=3)
    harness.run(plan)
    mates = Counter(shard.sid for _, shard, _ in pool.submitted if shard.sid != killer)
    assert sorted(mates.values(), reverse=True)[:2] == [2, 1], "only the first mate was redone"


def test_a_stalled_worker_is_killed_and_its_shard_redone(tmp_path: Path) -> None:
    plan = make_plan()
    hanging = plan.shards[2].sid
    pool = SimulatedPool(
        lambda w, shard, attempt: "hang" if shard.sid == hanging and attempt == 1 else "done"
    )
    harness = Harness(tmp_path, pool)
    harness.run(plan)
    assert Counter(harness.finished) == Counter(shard.sid for shard in plan.shards)
    assert len(pool.killed) == 1
    assert pool.time >= 100.0


def test_a_shard_that_always_hangs_is_given_up_with_the_reason(tmp_path: Path) -> None:
    plan = make_plan(rows=30)
    hanging = plan.shards[1].sid
    pool = SimulatedPool(lambda w, shard, attempt: "hang" if shard.sid == hanging else "done")
    harness = Harness(tmp_path, pool, tries=2)
    harness.run(plan)
    assert [item["sid"] for item in harness.letters()] == [hanging]
    assert "no answer for 100 s" in harness.letters()[0]["reason"]
    assert len(harness.finished) == 2


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
    harness = Harness(tmp_path, pool)
    harness.run(plan)
    assert pool.killed == []
    assert len(harness.finished) == 2


def test_a_failing_shard_is_retried_on_living_workers(tmp_path: Path) -> None:
    plan = make_plan(rows=30)
    failing = plan.shards[0].sid
    pool = SimulatedPool(lambda w, shard, attempt: "fail" if shard.sid == failing else "done")
    harness = Harness(tmp_path, pool)
    harness.run(plan)
    assert pool.killed == []
    assert pool.started == 2
    assert "OSError: no such file" in harness.letters()[0]["reason"]


def test_dead_letters_of_several_runs_are_kept(tmp_path: Path) -> None:
    plan = make_plan(rows=10)
    for count in (1, 2):
        pool = SimulatedPool(lambda worker, shard, attempt: "fail")
        harness = Harness(tmp_path, pool, tries=1)
        harness.run(plan)
        assert len(harness.letters()) == count


def test_a_full_cluster_is_reported_with_what_it_lacks(tmp_path: Path) -> None:
    harness = Harness(tmp_path, SimulatedPool(placed=0), place_seconds=30.0)
    with pytest.raises(GivenUp, match=r"no room for a worker within 30 s: .*cluster has 0 GPU"):
        harness.run(make_plan())


def test_resources_for_some_workers_are_enough(tmp_path: Path) -> None:
    harness = Harness(tmp_path, SimulatedPool(placed=1), place_seconds=30.0)
    harness.run(make_plan())
    assert len(harness.finished) == 10
    assert {worker for worker, _, _ in harness.pool.submitted} == {1}


def test_loading_has_its_own_clock_renewed_by_progress(tmp_path: Path) -> None:
    harness = Harness(tmp_path, SimulatedPool(load_goes=lambda w: "slow"), load_seconds=60.0)
    harness.run(make_plan())
    assert harness.pool.killed == []
    assert len(harness.finished) == 10


def test_a_hanging_load_is_given_up(tmp_path: Path) -> None:
    harness = Harness(tmp_path, SimulatedPool(load_goes=lambda w: "hang"), load_seconds=60.0)
    with pytest.raises(GivenUp, match="no progress in loading for 60 s"):
        harness.run(make_plan())


def test_workers_that_die_while_loading_end_the_run(tmp_path: Path) -> None:
    harness = Harness(tmp_path, SimulatedPool(load_goes=lambda w: "die"), workers=1)
    with pytest.raises(GivenUp, match="3 workers in a row died while starting"):
        harness.run(make_plan())
    assert harness.pool.started == 3
    assert harness.pool.time >= 5.0 + 10.0, "memory comes back late: the next ones waited"


def test_workers_that_die_while_starting_do_not_end_a_run_in_which_one_answers(
    tmp_path: Path,
) -> None:
    """Its row may have taken the memory; and no more of them than one in five seconds."""
    pool = SimulatedPool(load_goes=lambda w: "done" if w in (1, 40) else "die")
    harness = Harness(tmp_path, pool, workers=2, stall_seconds=1000.0)
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
        Harness(tmp_path, pool).run(make_plan())


def test_too_many_bad_rows_stop_the_run_with_the_first_errors(tmp_path: Path) -> None:
    harness = Harness(tmp_path, SimulatedPool(bad=True), max_bad_rows=0.5)
    with pytest.raises(GivenUp, match=r"(?s)answers failed.*a: failed: x\n.*b: .*\n.*c: failed: z"):
        harness.run(make_plan(rows=1000, per_shard=50))
    assert len(harness.finished) < 20


def many_prompts() -> SimulatedPool:
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


def test_an_answer_keeps_a_worker_alive_and_rows_are_shown(tmp_path: Path) -> None:
    """No row ends within `stall_seconds`, and ten rows are ten rows, whatever their prompts."""
    pool = many_prompts()
    harness = Harness(tmp_path, pool, max_bad_rows=0.25)
    harness.run(make_plan(rows=10, per_shard=5))
    assert pool.killed == []
    assert len(harness.finished) == 2
    shown = [(snapshot.rows, snapshot.total_rows) for snapshot in harness.seen]
    assert shown[-1] == max(shown) == (10, 10)


def test_bad_answers_are_judged_by_answers(tmp_path: Path) -> None:
    harness = Harness(tmp_path, many_prompts(), max_bad_rows=0.1)
    with pytest.raises(GivenUp, match=r"of 2\d\d answers failed"):
        harness.run(make_plan(rows=10, per_shard=5))


def test_few_bad_rows_are_not_judged(tmp_path: Path) -> None:
    harness = Harness(tmp_path, SimulatedPool(bad=True))
    harness.run(make_plan(rows=100))
    assert len(harness.finished) == 10


def test_calibration_keeps_its_workers(tmp_path: Path) -> None:
    """One measures while the others load; all of them stay."""
    pool = SimulatedPool(seconds_per_row=0.5)
    harness = Harness(tmp_path, pool)
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
        Harness(tmp_path, pool).driver.calibrate(sample)


def test_a_long_calibration_costs_no_waiting_worker(tmp_path: Path) -> None:
    """The one that measures stalls and is replaced; the other, idle all the while, is not."""
    pool = SimulatedPool(seconds_per_row=0.5)
    original = pool.calibrate
    pool.calibrate = lambda worker, spans: original(worker, spans) if worker != 1 else None
    sample = first_spans([SourceFile("a.parquet", "f", (1000,))], CALIBRATION_ROWS)
    harness = Harness(tmp_path, pool)
    assert harness.driver.calibrate(sample) == 0.5
    assert pool.killed == [1]
    assert pool.calibrated == [2]


def test_shards_are_sized_by_time_and_by_fairness() -> None:
    cluster = Cluster(shard_seconds=45.0)
    assert shard_rows(cluster, 10**6, workers=2, seconds_per_row=0.1) == 450
    assert shard_rows(cluster, 100, workers=2, seconds_per_row=0.1) == 13
    assert shard_rows(cluster, 10**6, workers=2, seconds_per_row=100.0) == 1
    assert shard_rows(Cluster(shard_rows=7), 100, workers=2, seconds_per_row=0.1) == 7


def test_sample_takes_the_first_rows() -> None:
    files = [SourceFile(f"{i}.parquet", "f", (10,)) for i in range(5)]
    assert sum(span.rows for span in first_spans(files, 24)) == 24
    assert first_spans([], 24) == []


# --- rows that kill ----------------------------------------------------------------------------


def killing(row: int, goes: str = "die") -> SimulatedPool:
    """A shard's row that kills its worker until it is named; up to five rows are in hand."""

    def behave(worker, shard, attempt):
        assignment = pool.assignments[-1]
        return goes if shard.index == 3 and row not in assignment.poison else "done"

    def in_hand(assignment):
        if assignment.shard.index != 3:
            return (0, 1)
        return (row,) if row in assignment.suspects else (row - 1, row, row + 1)

    pool = SimulatedPool(behave, in_hand=in_hand)
    return pool


@pytest.mark.parametrize(
    ("goes", "status"), [("die", Status.KILLED_WORKER), ("hang", Status.TIMEOUT)]
)
def test_a_row_that_kills_is_named_and_the_shard_committed(
    tmp_path: Path, goes: str, status: Status
) -> None:
    plan = make_plan()
    pool = killing(5, goes)
    harness = Harness(tmp_path, pool)
    harness.run(plan)
    assert Counter(harness.finished) == Counter(shard.sid for shard in plan.shards)
    assert harness.letters() == []
    tries = [assignment for assignment in pool.assignments if assignment.shard.index == 3]
    assert [assignment.suspects for assignment in tries] == [(), (4, 5, 6), (5,), ()]
    assert [dict(assignment.poison) for assignment in tries[:3]] == [{}, {}, {}]
    ((row, poison),) = tries[3].poison.items()
    assert (row, poison.status) == (5, status)
    assert poison.reason


def test_other_shards_are_not_suspected_for_long(tmp_path: Path) -> None:
    """What was in flight beside the killing row runs alone once, with its suspects, and is done."""
    pool = killing(5)
    harness = Harness(tmp_path, pool, workers=1)
    harness.run(make_plan())
    mates = Counter(h.shard.index for h in pool.assignments if h.shard.index != 3)
    assert max(mates.values()) == 2
    (again,) = [h for h in pool.assignments if h.shard.index != 3 and h.attempt == 2]
    assert again.suspects == (0, 1)


def test_what_another_shard_had_in_hand_clears_a_row(tmp_path: Path) -> None:
    """Two workers die with row 3 alone of its shard, the first with rows of another shard, too."""
    pool = SimulatedPool(
        lambda w, shard, attempt: "die" if shard.index == 0 and attempt < 3 else "done",
        in_hand=lambda assignment: (3,) if assignment.shard.index == 0 else (1, 2),
    )
    Harness(tmp_path, pool, workers=1).run(make_plan())
    tries = [assignment for assignment in pool.assignments if assignment.shard.index == 0]
    assert [(assignment.attempt, dict(assignment.poison)) for assignment in tries] == [
        (1, {}),
        (2, {}),
        (3, {}),
    ]


def test_a_shard_that_was_not_begun_is_no_worse_for_it(tmp_path: Path) -> None:
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
    harness = Harness(tmp_path, pool, workers=1, tries=3)
    harness.run(make_plan(rows=20))
    assert len(waiting) == 3
    assert harness.letters() == []


# --- as many workers as there is work ----------------------------------------------------------


def test_workers_are_dropped_when_nothing_waits(tmp_path: Path) -> None:
    """All but one, which is there for what gets lost; and never below the minimum."""
    plan = make_plan(rows=90)
    slow = plan.shards[-1].sid

    def run(**range_: int) -> SimulatedPool:
        pool = SimulatedPool(lambda w, shard, attempt: "hang" if shard.sid == slow else "done")
        Harness(tmp_path, pool, workers=range_, tries=1, stall_seconds=500.0).run(plan)
        return pool

    pool = run(max=4)
    assert (pool.started, len(pool.dropped)) == (4, 2)
    assert run(min=4, max=4).dropped == []


def test_a_lost_shard_brings_workers_back(tmp_path: Path) -> None:
    """The last shards kill both that are left; they are done by others."""
    pool = SimulatedPool(lambda w, s, attempt: "die" if s.index >= 8 and attempt == 1 else "done")
    harness = Harness(tmp_path, pool, workers={"max": 4})
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
    harness = Harness(tmp_path, pool, place_seconds=30.0)
    harness.run(make_plan(rows=300))
    workers = {worker for worker, _, _ in pool.submitted}
    assert (workers, pool.started) == ({1, 2}, 2)
    assert [snapshot.workers for snapshot in harness.seen][-1] == 2


def test_fewer_workers_than_the_minimum_end_the_run(tmp_path: Path) -> None:
    harness = Harness(
        tmp_path, SimulatedPool(placed=1), workers={"min": 2, "max": 4}, place_seconds=30.0
    )
    with pytest.raises(GivenUp, match="no room for a worker within 30 s"):
        harness.run(make_plan(rows=1000))


def test_a_worker_whose_node_is_about_to_go_gets_no_more(tmp_path: Path) -> None:
    """It ends what it has, another takes its place, and nothing counts as lost."""
    pool = SimulatedPool(lambda worker, shard, attempt: "leave" if worker == 1 else "done")
    harness = Harness(tmp_path, pool)
    harness.run(make_plan(rows=200))
    assert len(harness.finished) == 20
    assert pool.dropped[0] == 1
    assert pool.started == 3
    mine = [shard for worker, shard, _ in pool.submitted if worker == 1]
    assert len(mine) == 2
    assert {attempt for _, _, attempt in pool.submitted} == {1}


def test_another_starts_while_a_journal_is_read(tmp_path: Path) -> None:
    """The end is known at once, what was in hand a minute later; that minute is not billed."""
    pool = SimulatedPool(lambda w, shard, attempt: "hang" if attempt == 1 else "done")
    pool.at(10.0, WorkerExited(1))
    pool.at(70.0, WorkerDied(1, "the node is gone", ended=10.0))
    harness = Harness(tmp_path, pool, workers=1, stall_seconds=500.0)
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
    harness = Harness(tmp_path, pool, workers=1, stall_seconds=100.0)
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
    harness = Harness(tmp_path, pool, workers=3)
    harness.run(make_plan(rows=30))
    assert len(harness.finished) == 3
    assert 2 not in pool.dropped
    assert pool.started <= 4


def test_workers_that_go_with_their_nodes_do_not_end_the_run(tmp_path: Path) -> None:
    """Five nodes take a worker each that has just started."""
    pool = SimulatedPool(load_goes=lambda worker: "hang" if worker <= 5 else "done")
    for worker in range(1, 6):
        pool.at(worker + 0.5, WorkerDied(worker, "its node is gone", node_lost=True))
    harness = Harness(tmp_path, pool, workers=1)
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
    assert Harness(tmp_path, pool).driver.calibrate(sample) == 0.5
    assert pool.calibrated == [3]


def test_an_idle_worker_whose_node_goes_is_dropped_at_once(tmp_path: Path) -> None:
    pool = SimulatedPool(lambda w, s, a: "hang" if s.index == 0 else "done")
    pool.at(50.0, WorkerDraining(2))
    Harness(tmp_path, pool, tries=1).run(make_plan(rows=20))
    assert pool.dropped[0] == 2


# --- told to stop ------------------------------------------------------------------------------


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
    harness = Harness(tmp_path, pool, drain_seconds=drain_seconds)
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
    harness = Harness(tmp_path, pool)
    harness.driver._stop = stopped_at(pool, 10.0)
    with pytest.raises(Interrupted, match="nothing was answered yet"):
        harness.driver.calibrate(first_spans([SourceFile("a.parquet", "f", (1000,))], 24))


# --- what it cost ------------------------------------------------------------------------------


def test_the_device_time_of_a_smooth_run(tmp_path: Path) -> None:
    """Two workers, 1 s of loading each, ten shards of 10 s between them."""
    harness = Harness(tmp_path, SimulatedPool(), gpus_per_worker=2.0)
    harness.run(make_plan())
    device_time = harness.driver.usage()
    assert device_time.seconds_for(UsageKind.USEFUL) == 200.0
    assert device_time.seconds_for(UsageKind.LOADING) == 4.0
    assert device_time.total_seconds == pytest.approx(204.0, abs=3.0)


def test_wasted_device_time_is_listed_by_cause(tmp_path: Path) -> None:
    """One death half a second into a shard, one failure, one stall of 100 s, one lost race."""
    how = {1: "die", 4: "fail", 7: "hang"}
    pool = SimulatedPool(lambda w, s, attempt: how.get(s.index, "done") if attempt == 1 else "done")
    harness = Harness(tmp_path, pool, workers=1)
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


# --- a storage that refuses --------------------------------------------------------------------


@pytest.mark.parametrize(("drain_seconds", "finished"), [(60.0, 7), (0.0, 6)])
def test_a_storage_that_refuses_ends_the_run_at_once(
    tmp_path: Path, drain_seconds: float, finished: int
) -> None:
    """Nothing more is handed out; what others have in flight is committed if it ends in time."""
    pool = SimulatedPool(lambda w, shard, attempt: "refuse" if shard.index == 2 else "done")
    harness = Harness(tmp_path, pool, drain_seconds=drain_seconds)
    with pytest.raises(GivenUp) as ended:
        harness.run(make_plan(rows=2000))
    left = f"; {200 - finished} shards are left to answer"
    assert str(ended.value).startswith(f"s3://out refused data/part{left}")
    assert "run the same command again" in str(ended.value)
    answered = [assignment.shard.index for assignment in pool.assignments]
    assert len(answered) == len({*answered}) == 8, "what two workers had at most"
    assert len(harness.finished) == finished
    assert harness.letters() == []


def test_a_last_shard_that_is_refused_is_reported_too(tmp_path: Path) -> None:
    pool = SimulatedPool(lambda w, shard, attempt: "refuse")
    with pytest.raises(GivenUp, match=r"refused data/part; 1 shards are left to answer\. "):
        Harness(tmp_path, pool, workers=1).run(make_plan(rows=10))
    assert len(pool.assignments) == 1


def test_a_model_that_cannot_be_noted_is_loaded_once(tmp_path: Path) -> None:
    pool = SimulatedPool(load_goes=lambda w: "hang")
    load = pool.load
    refused = CallFailed(1, None, StorageRefused("s3://out refused model.json"))
    pool.load = lambda worker: (load(worker), pool.at(1.0, replace(refused, worker=worker)))
    harness = Harness(tmp_path, pool, workers=1)
    with pytest.raises(GivenUp, match=r"refused model\.json; nothing was answered yet"):
        harness.driver.calibrate(first_spans([SourceFile("a.parquet", "f", (1000,))], 24))
    assert pool.started == 1
    with pytest.raises(GivenUp, match=r"refused model\.json; 10 shards are left"):
        Harness(tmp_path, pool, workers=1).run(make_plan())
    assert pool.started == 2


def test_a_dead_letter_that_is_refused_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        raise PermissionError(13, "ExpiredToken")

    pool = SimulatedPool(lambda w, shard, attempt: "fail" if shard.index == 0 else "done")
    harness = Harness(tmp_path, pool, workers=1, tries=1)
    monkeypatch.setattr(harness.store, "create", refuse)
    with pytest.raises(GivenUp) as ended:
        harness.run(make_plan(rows=2000))
    assert "shard 0 is given up (OSError: no such file), and " in str(ended.value)
    assert "refused its dead letter: PermissionError: [Errno 13] ExpiredToken; " in str(ended.value)
    assert len(pool.assignments) <= 3


def test_a_part_that_can_never_be_written_is_answered_once(tmp_path: Path) -> None:
    pool = SimulatedPool(lambda w, shard, attempt: "hang" if shard.index == 1 else "done")
    unwritable = UnwritableShard("its answers do not fit into Parquet: column 'emb'")
    submit = pool.submit

    def fails(worker: int, assignment: ShardAssignment) -> None:
        submit(worker, assignment)
        if assignment.shard.index == 1:
            pool.at(30.0, CallFailed(worker, assignment.shard, unwritable))

    pool.submit = fails
    harness = Harness(tmp_path, pool, tries=3)
    harness.run(make_plan(rows=50))
    assert [assignment.attempt for assignment in pool.assignments] == [1] * 5
    (letter,) = harness.letters()
    assert letter["reason"] == f"UnwritableShard: {unwritable}"
    assert len(harness.finished) == 4
