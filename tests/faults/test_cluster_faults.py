"""What befalls whole jobs on a cluster: stopped, doubled, out of memory, beheaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray.job_submission import JobStatus, JobSubmissionClient

from gc2ray.data.store import Store
from gc2ray.output.parts import list_parts, read_part
from gc2ray.output.verify import verify
from tests.support.fault_proxy import EVERYTHING, FaultProxy, Faults
from tests.support.object_servers import SECRET as STORE_SECRET
from tests.support.object_servers import a_bucket, aws_environment
from tests.support.ray_head import (
    ROOT,
    SHARD_ROWS,
    RayHead,
    files_holding,
    gc2ray,
    output_of,
    ray_head,
    start,
    until,
    write_job,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

GIB = 1 << 30


ROWS = 60
SHARDS = ROWS // SHARD_ROWS
SPARED = 3
"""Parts that are stored before whatever befalls the job."""


@pytest.fixture(scope="module")
def head(proxies: dict[str, FaultProxy]) -> Iterator[RayHead]:
    """One for all but the test that needs its own; its jobs reach the store through the proxy."""
    proxy = proxies["honours"]
    with aws_environment(proxy.host, proxy.port), ray_head() as head:
        yield head


@pytest.fixture
def client(head: RayHead) -> JobSubmissionClient:
    return head.client()


@pytest.fixture
def bucket(proxy: FaultProxy) -> Iterator[str]:
    with a_bucket(proxy.host, proxy.port) as bucket:
        yield bucket


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """What parts wait for; none waits longer than its test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def job_file(tmp_path: Path, tiny_paths: dict[str, Path], bucket: str) -> Path:
    return write_job(tmp_path, tiny_paths["vicuna"], ROWS, f"{bucket}/run")


def assert_whole(output: str) -> None:
    verdict = verify(output, deep=True)
    assert (verdict.problems, verdict.exit_code) == ((), 0)


# --- stopped ------------------------------------------------------------------------------------


def test_a_stopped_job_resumes(
    head: RayHead,
    tmp_path: Path,
    tiny_paths: dict[str, Path],
    client: JobSubmissionClient,
    bucket: str,
    proxy: FaultProxy,
) -> None:
    """`ray job stop` leaves three seconds: what ends in time is committed, nothing is torn."""
    job_file = write_job(tmp_path, tiny_paths["vicuna"], 5 * ROWS, f"{bucket}/run")
    store, words = Store(output_of(job_file)), ["submit", job_file, "--address", head.address]
    proxy.faults = Faults(part_seconds=0.5)  # 25 in all: time to stop it
    following = start(head, *words, "--follow", "--id", "stopped")
    until(lambda: len(list_parts(store)) >= SPARED)
    assert client.stop_job("stopped")
    stdout, stderr = following.communicate(timeout=400)
    proxy.faults = Faults()
    assert following.returncode == 1, stdout
    assert "stopped was stopped; submit it again to resume" in stderr
    assert client.get_job_status("stopped") is JobStatus.STOPPED
    logs = client.get_job_logs("stopped")
    assert "interrupted: " in logs, logs
    assert SPARED <= len(list_parts(store)) < 5 * SHARDS
    assert gc2ray(head, *words, "--follow").returncode == 0
    assert_whole(output_of(job_file))


def test_a_job_that_does_not_stop_in_time_is_ended_and_loses_what_was_in_flight(
    head: RayHead,
    tmp_path: Path,
    tiny_paths: dict[str, Path],
    client: JobSubmissionClient,
    bucket: str,
    proxy: FaultProxy,
    held: threading.Event,
) -> None:
    """It would drain for longer than Ray leaves it; what it was storing may come in afterwards."""
    model, output = tiny_paths["vicuna"], f"{bucket}/run"
    job_file = write_job(tmp_path, model, ROWS, output, shard_rows=ROWS, drain_seconds=60.0)
    words = ["submit", job_file, "--address", head.address]
    store = Store(output_of(job_file))
    proxy.faults = Faults(held=held)
    following = start(head, *words, "--follow", "--id", "slow")
    until(lambda: proxy.met["held"])
    assert client.stop_job("slow")
    following.communicate(timeout=400)
    proxy.faults = Faults()
    assert client.get_job_status("slow") is JobStatus.STOPPED
    assert "interrupted" not in client.get_job_logs("slow")
    assert list_parts(store) == {}
    assert gc2ray(head, *words, "--follow").returncode == 0
    held.set()
    assert_whole(output_of(job_file))


# --- doubled ------------------------------------------------------------------------------------


def test_two_drivers_on_one_output_on_s3(
    head: RayHead, job_file: Path, proxy: FaultProxy, held: threading.Event
) -> None:
    """Both end well, every row is there once, and the second one says that there is a first."""
    words = ["submit", job_file, "--address", head.address, "--follow"]
    store = Store(output_of(job_file))
    proxy.faults = Faults(spared_parts=SPARED, held=held)
    first = start(head, *words)
    until(lambda: proxy.met["held"])
    second = start(head, *words)
    until(lambda: len(store.names("workers")) == 2)  # both are at work at a time
    held.set()
    outputs = [driver.communicate(timeout=400)[0] for driver in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert "another driver" in outputs[1]
    assert_whole(output_of(job_file))
    assert len(store.names("data")) == SHARDS
    logs, leaking = files_holding(STORE_SECRET, head.folder)
    assert any(path.name.startswith("worker-") for path in logs)
    assert leaking == []


# --- locked out ---------------------------------------------------------------------------------


def test_credentials_that_expire(head: RayHead, job_file: Path, proxy: FaultProxy) -> None:
    """The run ends and says why; with new ones the same command goes on."""
    store, words = Store(output_of(job_file)), ["submit", job_file, "--address", head.address]
    proxy.faults = Faults(status=400, refused=EVERYTHING, spared_parts=SPARED)
    refused = gc2ray(head, *words, "--follow")
    assert proxy.met["status"] > 0
    proxy.faults = Faults()
    assert refused.returncode == 1, refused.stdout
    by_worker = r"^given up: s3://\S+ refused data/part-.*check the storage's .*credentials"
    by_driver = r"^storage: \w+ing .*: OSError: .*are the credentials"
    assert re.search(f"{by_worker}|{by_driver}", refused.stdout, re.M), "whoever is refused first"
    assert len(list_parts(store)) == SPARED
    again = gc2ray(head, *words, "--follow")
    assert again.returncode == 0, again.stdout
    assert_whole(output_of(job_file))


# --- out of the host's memory -------------------------------------------------------------------

DRIVER = """
import sys, time
from functools import partial
from pathlib import Path
from gc2ray.core.config.job import load_job
from gc2ray.runner.run import run_job
from gc2ray.runner.worker import Worker
from tests.support.fakes import EchoEngine

def greedy(request):
    if request.row == 7:
        taken = b"x" * BYTES
        time.sleep(60)

def load(job):
    return EchoEngine(0.002, greedy)

def worker(job, kept_columns):
    return Worker(job, kept_columns, load=load)

run_job(load_job(Path(sys.argv[1])), address=sys.argv[2], make_worker=worker)
"""


@pytest.mark.alone
def test_a_row_that_takes_all_of_the_hosts_memory_costs_only_itself(tmp_path: Path) -> None:
    """Ray ends the worker that takes most; the row that does so twice is named."""
    total = get_system_memory()
    threshold = (get_used_memory() + 4 * GIB) / total
    job_file = write_job(tmp_path, "unused-hub-id", 24)
    script = DRIVER.replace("BYTES", str(6 * GIB))
    with ray_head(
        RAY_memory_usage_threshold=f"{threshold:.4f}", RAY_memory_monitor_refresh_ms="100"
    ) as head:
        driver = subprocess.run(
            [sys.executable, "-c", script, str(job_file), head.gcs_address],
            env={**os.environ, **head.credentials(), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert driver.returncode == 0, driver.stderr[-2000:]
    assert_whole(output_of(job_file))
    store = Store(output_of(job_file))
    rows = [row for part in store.names("data") for row in read_part(store, part).to_pylist()]
    assert {row["row"] for row in rows if row["status"] != "ok"} == {7}
    (killed,) = [row for row in rows if row["status"] != "ok"]
    assert killed["status"] == "killed_worker"
    assert "memory" in killed["error"].lower(), killed["error"]


# --- beheaded -----------------------------------------------------------------------------------


HASTY = """
from gc2ray.__main__ import main
from gc2ray.runner import submit as submission
submission.LOST_SECONDS = 5.0
main()
"""


def test_a_head_that_is_killed(
    head: RayHead, job_file: Path, proxy: FaultProxy, held: threading.Event
) -> None:
    """Whoever follows is told; the output says how far it is, and another cluster goes on.

    The last test here: the others share the head.
    """
    proxy.faults = Faults(spared_parts=SPARED, held=held)
    words = ["submit", job_file, "--address", head.address, "--follow"]
    following = start(head, *words, program=("-c", HASTY))
    until(lambda: proxy.met["held"])
    head.kill()
    stdout, stderr = following.communicate(timeout=400)
    proxy.faults = Faults()
    assert following.returncode == 1, stdout
    assert "does not answer any more; `gc2ray status` tells" in stderr
    assert gc2ray(None, "status", output_of(job_file)).returncode == 1
    assert gc2ray(None, "run", job_file).returncode == 0
    assert_whole(output_of(job_file))
