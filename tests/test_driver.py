"""The driver's decisions, on a pool with a clock of its own: no Ray, no waiting."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gc2ray.config import Cluster
from gc2ray.driver import Driver, Snapshot
from gc2ray.errors import ConfigError, GivenUp
from gc2ray.manifest import Plan
from gc2ray.planner import CALIBRATION_ROWS, Committed, shard_rows
from gc2ray.pool import Progressed
from gc2ray.shards import SourceFile, first_spans
from gc2ray.stats import RunStats
from gc2ray.store import Store
from gc2ray.worker import Progress
from tests.fakes import SimulatedPool
from tests.rows import make_recipe

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

    def submit(worker, shard, attempt):
        original(worker, shard, attempt)
        base = pool._rows.get(worker, 0) - shard.rows
        start = pool._busy_until[worker] - shard.rows * 90.0
        for row in range(1, shard.rows):
            due = start + row * 90.0
            pool._due.append((due, Progressed(worker, Progress(answers=base + row))))

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


def test_no_room_says_what_the_cluster_lacks(tmp_path: Path) -> None:
    harness = Harness(tmp_path, SimulatedPool(placed=0), place_seconds=30.0)
    with pytest.raises(GivenUp, match=r"no room for a worker within 30 s: .*cluster has 0 GPU"):
        harness.run(make_plan())


def test_some_room_is_enough(tmp_path: Path) -> None:
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


def test_a_model_that_cannot_be_loaded_is_the_users_error(tmp_path: Path) -> None:
    from gc2ray.pool import Failed

    pool = SimulatedPool(load_goes=lambda w: "hang")
    load = pool.load
    pool.load = lambda worker: (
        load(worker),
        pool._at(1.0, Failed(worker, None, ConfigError("recipe.model.path: wrong"))),
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

    def submit(worker, shard, attempt):
        original(worker, shard, attempt)
        start = pool._busy_until[worker] - shard.rows * 1500.0
        for prompt in range(1, shard.rows * 50):
            progress = Progress(rows=prompt // 50, answers=prompt, bad_answers=prompt // 5)
            pool._due.append((start + prompt * 30.0, Progressed(worker, progress)))

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
    from gc2ray.pool import Failed

    pool = SimulatedPool()
    pool.calibrate = lambda worker, spans: pool._at(1.0, Failed(worker, None, OSError("changed")))
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
