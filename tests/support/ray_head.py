"""A real Ray head of its own, with token authentication, job server and metrics; jobs for it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from ray.job_submission import JobSubmissionClient

from gc2ray.core.config.job import load_job
from tests.support.object_servers import free_port, wait_for_port
from tests.support.rows import job_data, write_rows

START_SECONDS = 90.0
END_SECONDS = 30.0
REPORT_MILLISECONDS = 500
HOST = "127.0.0.1"
ROOT = Path(__file__).parents[2]
SECRET = "do-not-tell-anybody-4711"
ROWS, SHARD_ROWS = 24, 6
LARGEST_READ = 50 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class RayHead:
    """A head that is up.

    Attributes:
        gcs_port: Where drivers join.
        job_port: Of the job server.
        metrics_port: Where Prometheus would ask.
        token: Whoever has it is let in.
        folder: Its sessions and logs.
        process: `ray start --block`, the leader of its group.
    """

    gcs_port: int
    job_port: int
    metrics_port: int
    token: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        """Of the job server."""
        return f"http://{HOST}:{self.job_port}"

    @property
    def gcs_address(self) -> str:
        return f"{HOST}:{self.gcs_port}"

    @property
    def metrics_address(self) -> str:
        return f"http://{HOST}:{self.metrics_port}/metrics"

    def credentials(self) -> Mapping[str, str]:
        """What a client has in its environment."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def client(self) -> JobSubmissionClient:
        """Of somebody else who knows the token."""
        return JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to it, its workers too."""
        leader = psutil.Process(self.process.pid)
        return [leader, *leader.children(recursive=True)]

    def kill(self) -> None:
        """All of it at once, as a host that loses power."""
        kill_all(self.processes())


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Some end by themselves meanwhile: the death of another has reached them first."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def has_ended(process: psutil.Process | int) -> bool:
    """Whether a process has ended; a zombie has, whose parent has only not waited for it yet.

    A `psutil.Process` is told from a later one with its pid by the time of its start.
    """
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def ray_head(**environment: str) -> Iterator[RayHead]:
    """Start a head, and end every process of it by pid."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets: short paths
        head = _started(Path(folder), environment)
        try:
            wait_for_port(HOST, head.job_port, START_SECONDS)
            wait_for_port(HOST, head.metrics_port, START_SECONDS)
            yield head
        finally:
            _end(head)


def _started(folder: Path, environment: Mapping[str, str]) -> RayHead:
    gcs, jobs, metrics = free_port(), free_port(), free_port()
    token = secrets.token_hex(32)
    options = {
        "--port": gcs,
        "--node-ip-address": HOST,
        "--dashboard-port": jobs,
        "--dashboard-host": HOST,
        "--metrics-export-port": metrics,
        "--dashboard-agent-listen-port": free_port(),
        "--ray-client-server-port": free_port(),
        "--min-worker-port": 0,  # any that is free
        "--max-worker-port": 0,
        "--num-cpus": 2,
        "--object-store-memory": 100 << 20,
        "--temp-dir": folder / "ray",
    }
    programs = Path(sys.executable).parent
    flags = ["--head", "--block", "--disable-usage-stats", "--include-dashboard=true"]
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_metrics_report_interval_ms": str(REPORT_MILLISECONDS),
        "PATH": f"{programs}:{os.environ['PATH']}",  # jobs are started as `python`
        **environment,
    }
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [str(programs / "ray"), "start", *flags, *(f"{k}={v}" for k, v in options.items())],
            env={**os.environ, **own},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return RayHead(gcs, jobs, metrics, token, folder, process)


def _end(head: RayHead) -> None:
    """Nothing of it may be left."""
    processes = head.processes() if head.process.poll() is None else []
    kill_all(processes)
    head.process.wait()
    _, left = psutil.wait_procs(processes, END_SECONDS)
    left = [process for process in left if not has_ended(process)]
    assert not left, left


def until(condition: Callable[[], T], seconds: float = 120.0) -> T:
    """What a condition says once it says something."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s")
        time.sleep(0.2)


def files_holding(secret: str, *folders: Path) -> tuple[list[Path], list[Path]]:
    """Files below folders, and those of them that hold a secret.

    Ray writes some of its files anew and renames them: one that is gone by now is in neither list.
    """
    found: dict[Path, bool] = {}
    walks = (walk for folder in folders for walk in os.walk(folder))  # skips folders that are gone
    for path in (Path(folder, name) for folder, _, names in walks for name in names):
        with suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_size < LARGEST_READ:
                found[path] = secret.encode() in path.read_bytes()
    return [*found], [path for path, holds in found.items() if holds]


def output_of(job_file: Path) -> str:
    return load_job(job_file).output


def write_job(
    folder: Path, model: Path | str, rows: int, output: str | None = None, **cluster: object
) -> Path:
    """A job file, and its rows."""
    source = write_rows(folder / "in" / "a.parquet", rows, row_group=SHARD_ROWS)
    data = job_data(model, source, output or folder / "out")
    data["cluster"] |= {"workers": 1, "shard_rows": SHARD_ROWS, **cluster}
    (folder / "job.yaml").write_text(json.dumps(data))
    return folder / "job.yaml"


def start(
    head: RayHead | None, *words: object, program: Sequence[str] = ("-m", "gc2ray")
) -> subprocess.Popen[str]:
    """The command, of somebody who knows the token, and a secret."""
    known = head.credentials() if head else {"RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, *program, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **known, "AWS_SECRET_ACCESS_KEY": SECRET, "COLUMNS": "200"},
        cwd=ROOT,
    )


def gc2ray(head: RayHead | None, *words: object) -> subprocess.CompletedProcess[str]:
    process = start(head, *words)
    stdout, stderr = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
