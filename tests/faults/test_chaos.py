"""The whole job under fire: workers, drivers, nodes and stores are killed in every window.

`make test` kills one of each kind in each window; `make chaos` twenty-one of each, and prints the
table. Each kill is confirmed by pid. No row may be lost or doubled, and what each kill cost is
counted: seconds of workers that answered nothing, and of a store those between a kill and the
commit of the shard that was there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
import s3fs
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster as LocalCluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from gc2ray.core.config.job import Job, load_job
from gc2ray.core.shards import cut_shards
from gc2ray.core.usage import Usage, UsageKind
from gc2ray.data.source import Source
from gc2ray.data.store import Store
from gc2ray.output.heartbeats import driver_records
from gc2ray.output.parts import list_parts, read_part
from gc2ray.output.planner import Outcome
from gc2ray.output.verify import verify
from gc2ray.runner.run import run_job
from tests.support.chaos import (
    VICTIMS,
    WINDOWS,
    Kill,
    Losses,
    Schedule,
    Survived,
    slow_worker,
    worker_on,
)
from tests.support.object_servers import RcloneServer, aws_environment
from tests.support.ray_head import has_ended, until
from tests.support.rows import job_data, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SHARD_ROWS = 10
SPARE_SHARDS = 6
"""Beyond those in which something is killed."""
NODES = 3
GONE_SECONDS = 60.0
DRAIN_SECONDS = 60.0
SLOW_ROWS = 300
OUTAGE_SECONDS = 1.0
LATE_SECONDS = 20.0
"""A back-off that began just before a store is back ends by then."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneServer]:
    """A store whose content outlives it; its address is in the environment."""
    made = RcloneServer(tmp_path_factory.mktemp("buckets"))
    with made.running(), aws_environment(made.host, made.port):
        yield made


@pytest.fixture(scope="module")
def cluster(server: RcloneServer) -> Iterator[LocalCluster]:
    """A head that runs nothing, and three nodes of one worker each, which know the store."""
    made = LocalCluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20},
    )
    for _ in range(NODES):
        add_node(made)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def add_node(cluster: LocalCluster) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--kills"))


@pytest.fixture
def job(tmp_path: Path, kills: int) -> Job:
    write_rows(
        tmp_path / "in" / "a.parquet", (kills + SPARE_SHARDS) * SHARD_ROWS, row_group=SHARD_ROWS
    )
    data = job_data("unused-hub-id", tmp_path / "in", tmp_path / "out")
    data["recipe"]["input"]["prompt"] = {"column": "prompt"}
    data["cluster"] = {"workers": 2, "shard_rows": SHARD_ROWS, "stall_seconds": 60.0, "tries": 4}
    (tmp_path / "job.json").write_text(json.dumps(data))
    return load_job(tmp_path / "job.json").located()


def scheduled(kind: str, job: Job, kills: int, folder: Path) -> Schedule:
    """A window for each of the first shards, in turns."""
    files, _ = Source(job.recipe.input).scan()
    shards = list(cut_shards(files, SHARD_ROWS, job.recipe.fingerprint()))
    windows = list(WINDOWS)
    steps = {shard.sid: windows[shard.index % 3] for shard in shards[:kills]}
    marks = folder / "marks"
    marks.mkdir()
    return Schedule(kind, steps, marks)


def usage_of(job: Job) -> Usage:
    return sum((record.usage for record in driver_records(Store(job.output))), Usage())


def assert_survived(
    job: Job, schedule: Schedule, survived: Survived, kills: int, late_seconds: float = 0.0
) -> None:
    """Every kill happened, where it was meant to; every row is there once."""
    happened = schedule.kills()
    windows = Counter(kill.step for kill in happened)
    assert min(windows[step] for step in WINDOWS) >= kills // 3
    assert {kill.sid: kill.step for kill in happened}.items() <= schedule.steps.items()
    assert len({kill.pid for kill in happened}) == len(happened)
    until(lambda: all(has_ended(kill.pid) for kill in happened), GONE_SECONDS)
    store = Store(job.output)
    rows = [row for part in store.names("data") for row in read_part(store, part).to_pylist()]
    planned = {f"a.parquet#{row}" for row in range((kills + SPARE_SHARDS) * SHARD_ROWS)}
    found = [row["row_key"] for row in rows]
    lost, doubled = len(planned - {*found}), len(found) - len({*found})
    assert (lost, doubled, {*found}) == (0, 0, planned)
    assert {row["status"] for row in rows} == {"ok"}
    assert verify(job.output, deep=True).problems == ()
    device_time = usage_of(job)
    wasted = (
        late_seconds
        + device_time.total_seconds
        - device_time.seconds_for(UsageKind.USEFUL)
        - device_time.seconds_for(UsageKind.IDLE)
    )
    survived.note(happened, Losses(len(planned), lost, doubled, wasted))


def confirm_worker_kills(job: Job, happened: list[Kill]) -> None:
    records = (Path(job.output) / "workers").glob("*.json")
    assert {kill.pid for kill in happened} <= {json.loads(r.read_text())["pid"] for r in records}


@pytest.mark.usefixtures("cluster")
def test_workers_are_killed(job: Job, kills: int, tmp_path: Path, survived: Survived) -> None:
    schedule = scheduled("worker", job, kills, tmp_path)
    result = run_job(job, make_worker=worker_on(schedule))
    assert result.exit_code == 0
    assert_survived(job, schedule, survived, kills)
    confirm_worker_kills(job, schedule.kills())


DRIVER = """
import os, sys
from pathlib import Path
from gc2ray.runner import driver
from gc2ray.output import heartbeats
from gc2ray.core.config.job import load_job
from gc2ray.runner.run import run_job
from tests.support.chaos import VICTIMS, Schedule, worker_on
job_file, address, marks = sys.argv[1:4]
driver.CHECK_SECONDS = heartbeats.HEARTBEAT_SECONDS = 0.1  # so that little of the bill dies with it
steps = dict(item.split("=") for item in sys.argv[4:])
marks = Path(marks)
(marks / VICTIMS["driver"]).write_text(str(os.getpid()))
make_worker = worker_on(Schedule("driver", steps, marks))
sys.exit(run_job(load_job(Path(job_file)), address=address, make_worker=make_worker).exit_code)
"""


def steps_still_due(schedule: Schedule, kills: int) -> list[str]:
    """Those of windows in which fewer were killed than are asked for, as words of `DRIVER`."""
    happened = Counter(kill.step for kill in schedule.kills())
    due = {step for step in WINDOWS if happened[step] < kills // 3}
    return [f"{sid}={step}" for sid, step in schedule.steps.items() if step in due]


def test_drivers_are_killed(
    job: Job, kills: int, tmp_path: Path, survived: Survived, cluster: LocalCluster
) -> None:
    """Each is started again at once, while workers of the one before may still commit.

    Such a commit may pass a window without a driver to kill: more are scheduled than are asked for,
    and those of a window that has had its kills are left alone.
    """
    schedule = scheduled("driver", job, kills + SPARE_SHARDS, tmp_path)
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "job.json"), cluster.address]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    codes = []
    while not codes or codes[-1] != 0:
        driver = subprocess.run(
            [*command, str(schedule.marks), *steps_still_due(schedule, kills)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        codes.append(driver.returncode)
        assert codes[-1] in (0, -signal.SIGKILL), driver.stderr[-2000:]
        assert len(codes) <= len(schedule.steps) + 1
    assert codes.count(-signal.SIGKILL) == len(schedule.kills())
    assert_survived(job, schedule, survived, kills)


def kill_nodes(cluster: LocalCluster, schedule: Schedule, run: Future[Outcome]) -> None:
    """Kill the node of every worker that says it is in its window, and let another join."""
    killed = 0
    while not run.done():
        for kill in schedule.kills()[killed:]:
            killed += 1
            (node,) = [node for node in cluster.worker_nodes if node.node_id == kill.node]
            cluster.remove_node(node, allow_graceful=False)
            add_node(cluster)
        time.sleep(0.05)


def test_nodes_are_killed(
    job: Job, kills: int, tmp_path: Path, survived: Survived, cluster: LocalCluster
) -> None:
    """A node takes its worker, its journal and its raylet; another joins and is used."""
    schedule = scheduled("node", job, kills, tmp_path)
    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(run_job, job, make_worker=worker_on(schedule))
        kill_nodes(cluster, schedule, run)
    assert run.result().exit_code == 0
    assert len({kill.node for kill in schedule.kills()}) == kills
    assert_survived(job, schedule, survived, kills)
    confirm_worker_kills(job, schedule.kills())


def restart(server: RcloneServer, schedule: Schedule, run: Future[Outcome]) -> None:
    """Start the store again a while after each kill."""
    killed = 0
    while not run.done():
        if len(schedule.kills()) > killed:
            killed += 1
            server.kill()  # it is: its parent, who is us, must look
            time.sleep(OUTAGE_SECONDS)
            server.start()
            (schedule.marks / "pid.new").write_text(str(server.pid))
            (schedule.marks / "pid.new").rename(schedule.marks / VICTIMS["store"])
        time.sleep(0.05)


def lateness(folder: Path, schedule: Schedule) -> float:
    """Seconds between a kill and the commit of its shard, summed."""
    late = 0.0
    for kill in schedule.kills():
        (mark,) = schedule.marks.glob(f"store-{kill.step}-{kill.sid}-*")
        (part,) = folder.glob(f"*/run/data/part-*-{kill.sid}.parquet")
        late += max(0.0, part.stat().st_mtime - mark.stat().st_mtime)
    return late


@pytest.mark.usefixtures("cluster")
def test_stores_are_killed(
    job: Job, kills: int, tmp_path: Path, survived: Survived, server: RcloneServer
) -> None:
    """Workers and driver wait until it is back; what it was writing is whole, or not there."""
    s3fs.S3FileSystem().mkdir("chaos")
    job = job.model_copy(update={"output": "s3://chaos/run"})
    schedule = scheduled("store", job, kills, tmp_path)
    (schedule.marks / VICTIMS["store"]).write_text(str(server.pid))
    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(run_job, job, make_worker=worker_on(schedule))
        restart(server, schedule, run)
    assert run.result().exit_code == 0
    late_seconds = lateness(server.folder, schedule)
    assert_survived(job, schedule, survived, kills, late_seconds)
    assert late_seconds < kills * (OUTAGE_SECONDS + LATE_SECONDS)


@pytest.fixture
def slow_job(tmp_path: Path) -> Job:
    """Half a minute of work for one worker, see `slow_worker`."""
    write_rows(tmp_path / "in" / "a.parquet", SLOW_ROWS, row_group=SHARD_ROWS)
    data = job_data("unused-hub-id", tmp_path / "in", tmp_path / "out")
    data["cluster"] = {"workers": 2, "shard_rows": SHARD_ROWS}
    (tmp_path / "job.json").write_text(json.dumps(data))
    return load_job(tmp_path / "job.json").located()


@pytest.mark.slow
def test_a_node_that_is_about_to_go_loses_nothing(cluster: LocalCluster, slow_job: Job) -> None:
    """As a spot notice does: its worker ends what it has, another starts elsewhere."""
    store = Store(slow_job.output)
    with ThreadPoolExecutor(1) as beside:
        run = beside.submit(run_job, slow_job, make_worker=slow_worker)
        until(lambda: len(list_parts(store)) >= 4)
        alive = ray._private.state.actors(actor_state_name="ALIVE").values()
        used = {actor["Address"]["NodeID"] for actor in alive}
        (node, *_) = [node for node in cluster.worker_nodes if node.node_id in used]
        drained_at = drain(cluster, node.node_id)
        committed = until(lambda: gone_from(node.node_id) and len(list_parts(store)))
        assert time.monotonic() - drained_at < DRAIN_SECONDS
        assert not run.done()
        cluster.remove_node(node, allow_graceful=False)
        add_node(cluster)
    assert run.result().exit_code == 0
    rows = [row for part in store.names("data") for row in read_part(store, part).to_pylist()]
    assert len(rows) == len({row["row_key"] for row in rows}) == SLOW_ROWS
    assert {row["attempt"] for row in rows} == {1}, "nothing was answered twice"
    assert committed < SLOW_ROWS / SHARD_ROWS
    assert len({row["worker"] for row in rows}) == 3
    assert usage_of(slow_job).seconds_for(UsageKind.DIED) == 0.0


def drain(cluster: LocalCluster, node: str) -> float:
    """Announce that a node goes in a minute; returns when that was."""
    accepted, why_not = GcsClient(address=cluster.gcs_address).drain_node(
        node,
        DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "a spot notice",
        int((time.time() + DRAIN_SECONDS) * 1000),
    )
    assert accepted, why_not
    return time.monotonic()


def gone_from(node: str) -> bool:
    """Whether no worker is on a node any more."""
    alive = ray._private.state.actors(actor_state_name="ALIVE").values()
    return node not in {actor["Address"]["NodeID"] for actor in alive}
