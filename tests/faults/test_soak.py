"""A long run whose workers are killed from outside, at random, whatever they are doing.

`make test-all` has a short one; `make soak` has 100,000 rows, and takes at least ten minutes. No
row is guilty of any kill: none may be lost, doubled, or named as one that kills workers.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from gc2ray.core.config.job import Job, load_job
from gc2ray.data.store import Store
from gc2ray.output.parts import list_parts, read_part
from gc2ray.output.planner import Outcome
from gc2ray.output.verify import verify
from gc2ray.runner.run import run_job
from gc2ray.runner.worker import Worker
from tests.support.fakes import EchoEngine
from tests.support.rows import job_data, write_rows

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.timeout(3 * 3600),
]

WORKERS = 3
SHARD_ROWS = 250
IN_HAND = 40
"""Rows that a worker holds at a time: all of them are suspected when it is killed."""


def _load(seconds: float, _job: Job) -> EchoEngine:
    return EchoEngine(seconds, buffered=IN_HAND)


def slowed_worker(job: Job, kept_columns: pa.Schema, seconds: float) -> Worker:
    """A worker that takes so long for each row."""
    return Worker(job, kept_columns, load=partial(_load, seconds))


def living_workers() -> list[int]:
    """Pids of the actors that answer."""
    alive = ray._private.state.actors(actor_state_name="ALIVE").values()
    return [actor["Pid"] for actor in alive]


def kill_at_random(run: Future[Outcome], store: Store, kills: int, seconds: float) -> list[float]:
    """Kill a worker in each equal part of the run's life; when each was, from its first part on."""
    draw = random.Random(20)
    while not list_parts(store) and not run.done():
        time.sleep(0.1)
    started, times = time.monotonic(), []
    for number in range(kills):
        due = started + (number + draw.random()) * seconds / kills
        while time.monotonic() < due or not living_workers():
            if run.done():
                return times
            time.sleep(0.05)
        os.kill(draw.choice(living_workers()), signal.SIGKILL)
        times.append(time.monotonic() - started)
    return times


def test_random_kills_neither_lose_nor_repeat_rows(
    tmp_path: Path, request: pytest.FixtureRequest, soaked: dict[str, object]
) -> None:
    rows, kills = int(request.config.getoption("--rows")), int(request.config.getoption("--kills"))
    seconds = float(request.config.getoption("--seconds"))
    write_rows(tmp_path / "in" / "a.parquet", rows, row_group=SHARD_ROWS)
    data = job_data("unused-hub-id", tmp_path / "in", tmp_path / "out")
    data["recipe"]["input"]["prompt"] = {"column": "prompt"}
    data["cluster"] = {"workers": WORKERS, "cpus_per_worker": 0.5, "shard_rows": SHARD_ROWS}
    (tmp_path / "job.json").write_text(json.dumps(data))
    job = load_job(tmp_path / "job.json").located()
    store = Store(job.output)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with ThreadPoolExecutor(1) as beside:
            started = time.monotonic()
            slowed = partial(slowed_worker, seconds=WORKERS * seconds / rows)
            run = beside.submit(run_job, job, make_worker=slowed)
            times = kill_at_random(run, store, kills, seconds)
            outcome = run.result()
            took = time.monotonic() - started
    finally:
        ray.shutdown()
    found: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    for part in store.names("data"):
        table = read_part(store, part, ["row_key", "status"])
        found.update(table["row_key"].to_pylist())
        statuses.update(table["status"].to_pylist())
    planned = {f"a.parquet#{row}" for row in range(rows)}
    soaked |= {
        "rows": rows,
        "took": f"{took:.0f} s",
        "kills": len(times),
        "first and last": f"{times[0]:.0f} s, {times[-1]:.0f} s" if times else "none",
        "lost": len(planned - found.keys()),
        "doubled": sum(count - 1 for count in found.values()),
        "by status": dict(statuses),
        "given up": len(outcome.dead),
    }
    assert len(times) == kills
    assert took >= seconds
    assert found == Counter(planned)
    assert statuses == {"ok": rows}
    assert outcome.exit_code == 0
    assert verify(job.output, deep=True).problems == ()
