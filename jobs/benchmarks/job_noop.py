"""The whole Ray job around an engine that computes nothing: what our own machinery costs.

Once with an engine that answers at once, and once with one that sleeps for each row, so that it
shows how workers add up. Everything else is as in earnest: Parquet in, the whole answer schema, the
journal, parts that are synced to disk.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.config.job import Job, parse_job
from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Request
from gc2ray.core.stats import RunStats
from gc2ray.runner.run import run_job
from gc2ray.runner.worker import Worker
from jobs.benchmarks import Line, goal

ROWS, SHARD_ROWS, IMAGE_BYTES = 100_000, 2000, 1024
SLEEPY_ROWS, SLEEPY_SHARD_ROWS, SLEEP_SECONDS = 4000, 100, 0.004
RUNS = 3
ROWS_GOAL, SCALING_GOAL = 20_000, 1.8


@dataclass(frozen=True)
class NoopEngine:
    """Answers every request at once, or after a sleep; see `gc2ray.engine.answering.Answering`."""

    sleep_seconds: float = 0.0
    device: str = "no-op"
    model_digest: str = "no model"
    model_shape: None = None

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        for request in requests:
            if self.sleep_seconds:
                time.sleep(self.sleep_seconds)
            bare = replace(request, images=())
            yield Answer(bare, Status.OK, self.device, 1.0, answer="-", device=self.device)

    def clear_cache(self) -> None:
        pass

    def totals(self) -> RunStats:
        return RunStats()


def noop_worker(job: Job, kept_columns: pa.Schema, sleep_seconds: float = 0.0) -> Worker:
    """A worker without a model; made in its own process."""
    return Worker(job, kept_columns, load=lambda _: NoopEngine(sleep_seconds))


def run() -> list[Line]:
    """Medians over runs of the same job, each with a Ray of its own; in turns where compared.

    `rows_per_s` counts all of it, Ray's start included; `rows_per_s_answering` the time from the
    first worker that is up to the last part that is committed.
    """
    os.environ.pop("RAY_ADDRESS", None)  # a local Ray, whatever the shell has joined
    with tempfile.TemporaryDirectory(prefix="gc2ray-bench-") as directory:
        root = Path(directory)
        _write_rows(root / "rows.parquet", ROWS, SHARD_ROWS)
        _write_rows(root / "sleepy.parquet", SLEEPY_ROWS, SLEEPY_SHARD_ROWS)
        sleepy = partial(noop_worker, sleep_seconds=SLEEP_SECONDS)
        quick = {workers: _Runs(root / "rows.parquet", workers, noop_worker) for workers in (1, 2)}
        slow = {workers: _Runs(root / "sleepy.parquet", workers, sleepy) for workers in (1, 2)}
        for runs in (*quick.values(), *slow.values()):
            runs.repeat(RUNS, root)
    one = quick[1].figures()
    scaling = median(
        two["rows_per_s_answering"] / one["rows_per_s_answering"]
        for one, two in zip(slow[1].runs, slow[2].runs, strict=True)
    )
    met = one["rows_per_s_answering"] >= ROWS_GOAL
    what = f"{ROWS} rows of {IMAGE_BYTES} bytes"
    return [
        Line(f"{what}, 1 worker", one, goal(f"{ROWS_GOAL} rows/s answering", met=met)),
        Line(f"{what}, 2 workers", quick[2].figures()),
        Line(
            f"{SLEEPY_ROWS} rows that sleep {SLEEP_SECONDS * 1e3:g} ms, 2 workers against 1",
            {"speedup": scaling, **slow[2].figures()},
            goal(f"{SCALING_GOAL}x", met=scaling >= SCALING_GOAL),
        ),
    ]


def _write_rows(path: Path, rows: int, group_rows: int) -> None:
    """Small rows; their images are noise, nobody decodes them."""
    noise = np.random.default_rng(0)
    images = [{"bytes": noise.bytes(IMAGE_BYTES)} for _ in range(rows)]
    table = pa.table({"id": list(range(rows)), "image": images})
    pq.write_table(table, path, row_group_size=group_rows)


class _Runs:
    """Runs of one job, and the figures of each."""

    def __init__(self, source: Path, workers: int, make_worker: Callable[..., Worker]) -> None:
        self._source, self._workers, self._make_worker = source, workers, make_worker
        self.runs: list[dict[str, float]] = []

    def figures(self) -> dict[str, float]:
        """Medians."""
        return {name: median(run[name] for run in self.runs) for name in self.runs[0]}

    def repeat(self, times: int, root: Path) -> None:
        """Run the job so many times."""
        for _ in range(times):
            with tempfile.TemporaryDirectory(dir=root) as output:
                self.runs.append(self._once(Path(output)))

    def _once(self, output: Path) -> dict[str, float]:
        file = pq.ParquetFile(self._source)
        rows, group_rows = file.metadata.num_rows, file.metadata.row_group(0).num_rows
        source = {"uri": str(self._source), "keep": ["id"], "prompt": {"constant": "What is it?"}}
        recipe = {"model": {"path": "no-model", "dtype": "float32"}, "input": source}
        cluster = {"workers": self._workers, "shard_rows": group_rows}
        job = parse_job({"output": str(output), "recipe": recipe, "cluster": cluster})
        started = time.time()
        outcome = run_job(job, make_worker=self._make_worker)
        ended = time.time()
        if outcome.exit_code or outcome.rows != rows:
            raise RuntimeError(f"{outcome.rows} of {rows} rows are committed: {outcome.dead}")
        records = [json.loads(path.read_text()) for path in (output / "workers").iterdir()]
        loaded = min(datetime.fromisoformat(record["loaded"]).timestamp() for record in records)
        committed = max(path.stat().st_mtime for path in (output / "data").iterdir())
        return {
            "rows_per_s": rows / (ended - started),
            "start_s": loaded - started,
            "rows_per_s_answering": rows / (committed - loaded),
        }
