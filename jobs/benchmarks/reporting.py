"""Whether a report of a run of any size is quick and bounded: a million rows in 10,000 parts.

The run is a real one, on a local Ray, from Parquet to committed parts, but for its engine, which
makes answers up: those of LLaVA-NeXT-7B about images of five views, no two alike, one in a hundred
audited. `gc2ray report` is then a process of its own, from its start to its end.

Not covered: outputs in a bucket, retries, rows that are drawn (`--show`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.config.job import Job, parse_job
from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Audit, Request
from gc2ray.core.stats import STAGES, RunStats
from gc2ray.engine.audit import is_audited
from gc2ray.models.flops import AnswerTokens, demand_of
from gc2ray.models.shape import LLAVA_7B, ModelShape
from gc2ray.runner.run import run_job
from gc2ray.runner.worker import Worker
from jobs.benchmarks import Line, goal

PARTS, PART_ROWS, SHARE, RUNS = 10_000, 100, 0.01, 3
SECONDS_GOAL, BYTES_GOAL = 60, 500e6
VIEWS, VIEW_TOKENS, NEWLINES, TEXT_TOKENS = 5, 576, 48, 60
KINDS = 500
"""Answers that differ; their keys, and what is audited of them, make each its own."""

COMMAND = """
import atexit
from gc2ray.__main__ import main

def tell():
    from gc2ray.engine.device import peak_host_bytes
    print(peak_host_bytes())

atexit.register(tell)
main()
"""
"""`gc2ray` itself, and what it took."""


@dataclass(frozen=True)
class MadeUpEngine:
    """An `AnsweringEngine` that answers every request at once, as if it had computed."""

    kinds: tuple[Answer, ...]
    device: str = "NVIDIA H200"
    model_digest: str = "no model"
    model_shape: ModelShape = LLAVA_7B

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        for request in requests:
            drawn = request.seed
            answer = replace(
                self.kinds[drawn % KINDS],
                request=replace(request, images=()),
                stage_ns=dict.fromkeys(STAGES, 10**7 + drawn % 10**7),
            )
            if is_audited(request.row_key, SHARE):
                audit = Audit("two cats", drawn % 4 / 3, answer.stage_ns, answer.stage_ns)
                answer = replace(answer, audit=audit, kept_mask=(bytes(VIEW_TOKENS // 8),) * VIEWS)
            yield answer

    def clear_cache(self) -> None:
        pass

    def totals(self) -> RunStats:
        return RunStats(peak_device_bytes=20 << 30)


def run(parts: int = PARTS, runs: int = RUNS) -> list[Line]:
    """Median seconds and the largest peak.

    Args:
        parts: Number of parts of `PART_ROWS` rows each.
        runs: Reports of the same output.
    """
    os.environ.pop("RAY_ADDRESS", None)  # a local Ray, whatever the shell has joined
    with tempfile.TemporaryDirectory(prefix="gc2ray-bench-") as folder:
        job = _job(Path(folder), parts)
        outcome = run_job(job, make_worker=_worker)
        if outcome.exit_code:
            raise RuntimeError(f"{outcome.rows} rows are committed: {outcome.dead}")
        reported = [_reported(job.output) for _ in range(runs)]
    seconds, peak = median(seconds for seconds, _ in reported), max(peak for _, peak in reported)
    met = seconds <= SECONDS_GOAL and peak <= BYTES_GOAL
    return [
        Line(
            f"a report of {outcome.rows:,} rows in {parts:,} parts",
            {"seconds": seconds, "peak_mb": peak / 1e6},
            goal(f"{SECONDS_GOAL} s and {BYTES_GOAL / 1e6:.0f} MB", met=met),
        )
    ]


def _job(folder: Path, parts: int) -> Job:
    """Rows of which nobody looks at the image."""
    rows = parts * PART_ROWS
    table = pa.table({"image": pa.array([b"-"] * rows), "id": pa.array(range(rows))})
    pq.write_table(table, folder / "rows.parquet", row_group_size=PART_ROWS * 100)
    source = {"uri": str(folder / "rows.parquet"), "prompt": {"constant": "?"}, "keep": ["id"]}
    return parse_job(
        {
            "output": str(folder / "out"),
            "recipe": {
                "model": {"path": "no-model"},
                "compression": {"retention": 0.25},
                "audit": {"share": SHARE},
                "input": source,
            },
            "cluster": {"workers": 1, "shard_rows": PART_ROWS},
        }
    )


def _worker(job: Job, kept_columns: pa.Schema) -> Worker:
    """Made in its own process."""
    return Worker(job, kept_columns, load=lambda _: MadeUpEngine(tuple(map(made_up, range(KINDS)))))


def made_up(kind: int) -> Answer:
    """An answer with a quarter of the visual tokens kept, more or less."""
    kept = (144, *(100 + (kind * step) % 88 for step in (3, 5, 7, 11)))
    full, words = VIEWS * VIEW_TOKENS, 1 + kind % 64
    tokens = AnswerTokens(VIEWS, sum(kept), TEXT_TOKENS + sum(kept) + NEWLINES, words)
    more = full - sum(kept)
    uncompressed = replace(tokens, projected=sum(kept) + more, prompt=tokens.prompt + more)
    return Answer(
        Request("", "", 0, (), ()), Status.OK, "globalcom2", 0.25, answer="two dogs",
        finish_reason="stop", prompt_tokens=tokens.prompt, output_tokens=words,
        visual_tokens_full=full, visual_tokens_kept=sum(kept),
        newline_tokens=NEWLINES, newline_tokens_full=NEWLINES,
        kept_per_view=(kept,), full_per_view=((VIEW_TOKENS,) * VIEWS,),
        kv_bytes=(tokens.prompt + words) * LLAVA_7B.kv_bytes_per_token,
        kv_bytes_full=(tokens.prompt + full - sum(kept) + words) * LLAVA_7B.kv_bytes_per_token,
        images_encoded=1,
        demand=demand_of(LLAVA_7B, tokens),
        demand_full=demand_of(LLAVA_7B, uncompressed),
        device="NVIDIA H200",
    )  # fmt: skip


def _reported(output: str) -> tuple[float, float]:
    """Seconds and peak bytes of the process."""
    command = [sys.executable, "-c", COMMAND, "report", output]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 -- ours
    return time.perf_counter() - started, float(done.stdout.splitlines()[-1])
