"""The whole Ray job around an engine that costs nothing: what our own machinery costs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.config import Job, parse_job
from gc2ray.errors import Status
from gc2ray.records import Answer, Request
from gc2ray.run import run_job
from gc2ray.stats import RunStats
from gc2ray.worker import Worker
from jobs.benchmarks import Line

ROWS, SHARD_ROWS, IMAGE_BYTES = 20_000, 1000, 1024
WORKERS, RUNS = 2, 3


class NoopEngine:
    """Answers every request at once; see `gc2ray.worker.Answering`."""

    device = "no-op"

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        for request in requests:
            bare = replace(request, images=())
            yield Answer(bare, Status.OK, self.device, 1.0, answer="-", device=self.device)

    def forget(self) -> None:
        pass

    def totals(self) -> RunStats:
        return RunStats()


def noop_worker(job: Job, carried: pa.Schema) -> Worker:
    """A worker without a model; made in its own process."""
    return Worker(job, carried, load=lambda _: NoopEngine())


def run() -> list[Line]:
    """Medians over runs of the same job, each with a Ray of its own.

    `rows_per_s` counts all of it, Ray's start included; `rows_per_s_answering` the time from the
    first worker that is up to the last part that is committed.
    """
    os.environ.pop("RAY_ADDRESS", None)  # a local Ray, whatever the shell has joined
    with tempfile.TemporaryDirectory(prefix="gc2ray-bench-") as directory:
        root = Path(directory)
        _write_rows(root / "in.parquet")
        runs = [_run_once(root / "in.parquet", root / f"out{number}") for number in range(RUNS)]
    figures = {name: median(run[name] for run in runs) for name in runs[0]}
    return [Line(f"{ROWS} rows, {WORKERS} workers, {ROWS // SHARD_ROWS} shards", figures)]


def _write_rows(path: Path) -> None:
    """Small rows; their images are noise, nobody decodes them."""
    noise = np.random.default_rng(0)
    images = [{"bytes": noise.bytes(IMAGE_BYTES)} for _ in range(ROWS)]
    table = pa.table({"id": list(range(ROWS)), "image": images})
    pq.write_table(table, path, row_group_size=SHARD_ROWS)


def _run_once(source: Path, output: Path) -> dict[str, float]:
    rows = {"uri": str(source), "keep": ["id"], "prompt": {"constant": "What is it?"}}
    recipe = {"model": {"path": "no-model", "dtype": "float32"}, "input": rows}
    cluster = {"workers": WORKERS, "shard_rows": SHARD_ROWS}
    job = parse_job({"output": str(output), "recipe": recipe, "cluster": cluster})
    started = time.time()
    outcome = run_job(job, make_worker=noop_worker)
    ended = time.time()
    if outcome.exit_code or outcome.rows != ROWS:
        raise RuntimeError(f"{outcome.rows} of {ROWS} rows are committed: {outcome.dead}")
    records = [json.loads(path.read_text()) for path in (output / "workers").iterdir()]
    loaded = min(datetime.fromisoformat(record["loaded"]).timestamp() for record in records)
    committed = max(path.stat().st_mtime for path in (output / "data").iterdir())
    return {
        "rows_per_s": ROWS / (ended - started),
        "start_s": loaded - started,
        "rows_per_s_answering": ROWS / (committed - loaded),
    }
