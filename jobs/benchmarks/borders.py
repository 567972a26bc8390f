"""What the borders between shards cost: a worker with an engine whose every row takes as long."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.config.job import Job, parse_job
from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Request
from gc2ray.core.shards import Shard, cut_shards
from gc2ray.core.stats import RunStats
from gc2ray.data.source import Source
from gc2ray.engine.prefetch import Prefetcher
from gc2ray.runner.messages import ShardAssignment
from gc2ray.runner.worker import Worker
from jobs.benchmarks import Line, goal

SHARDS, SHARD_ROWS, ROW_SECONDS, IMAGE_BYTES = 50, 40, 0.01, 100_000
IN_FLIGHT = 2
"""As the driver has it."""
REPLY_SECONDS = 0.02
"""From a shard's end to the next one's beginning: what a driver and a network would take."""
SHARE = 0.02


class SteadyEngine:
    """Takes the same time for every row, and counts how long it had none; see `Answering`."""

    device = "steady"
    model_digest = "no model"
    model_shape = None

    def __init__(self) -> None:
        self.input_starved_ns = 0

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        answered = 0
        with Prefetcher(
            requests, lambda row: replace(row, images=()), threads=1, ahead=8
        ) as prefetcher:
            while not prefetcher.ended:
                row = prefetcher.take()
                if row is None:
                    before = prefetcher.waited_ns
                    prefetcher.wait()
                    self.input_starved_ns += (prefetcher.waited_ns - before) if answered else 0
                    continue
                time.sleep(ROW_SECONDS)
                answered += 1
                yield Answer(row, Status.OK, self.device, 1.0, answer="-", device=self.device)

    def clear_cache(self) -> None:
        pass

    def totals(self) -> RunStats:
        return RunStats(input_starved_ns=self.input_starved_ns)


def run() -> list[Line]:
    """From Parquet to committed parts, two shards in flight, without Ray."""
    with tempfile.TemporaryDirectory(prefix="gc2ray-bench-") as directory:
        job = _job(Path(directory))
        files, kept_columns = Source(job.recipe.input).scan()
        shards = tuple(cut_shards(files, SHARD_ROWS, job.recipe.fingerprint()))
        engine = SteadyEngine()
        worker = Worker(job, kept_columns, load=lambda _: engine)
        worker.load()

        def process(shard: Shard) -> RunStats:
            done = worker.process(ShardAssignment(shard))
            time.sleep(REPLY_SECONDS)
            return done.stats

        started = time.perf_counter()
        with ThreadPoolExecutor(IN_FLIGHT) as driver:
            stats = list(driver.map(process, shards))
        passed = time.perf_counter() - started
    total = sum(stats, RunStats())
    busy = total.rows * ROW_SECONDS
    waited_seconds = total.input_starved_ns / 1e9
    figures = {
        "waiting_percent": 100 * waited_seconds / (waited_seconds + busy),
        "waiting_ms_per_border": 1000 * waited_seconds / SHARDS,
        "wall_over_service": passed / busy,
    }
    met = goal(
        f"waiting at most {SHARE:.0%}", met=waited_seconds <= SHARE * (waited_seconds + busy)
    )
    return [
        Line(
            f"{len(shards)} shards of {SHARD_ROWS} rows, {ROW_SECONDS * 1e3:g} ms each",
            figures,
            met,
        )
    ]


def _job(root: Path) -> Job:
    noise = np.random.default_rng(0)
    rows = SHARDS * SHARD_ROWS
    images = [{"bytes": noise.bytes(IMAGE_BYTES)} for _ in range(rows)]
    table = pa.table({"id": list(range(rows)), "image": images})
    source = root / "in.parquet"
    pq.write_table(
        table, source, row_group_size=SHARD_ROWS, write_batch_size=8, use_dictionary=False
    )
    recipe = {
        "model": {"path": "no-model", "dtype": "float32"},
        "input": {"uri": str(source), "keep": ["id"], "prompt": {"constant": "What is it?"}},
    }
    return parse_job({"output": str(root / "out"), "recipe": recipe})
