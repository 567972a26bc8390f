"""Host memory of a worker: whether it grows with the rows, and what a huge row group costs.

Each case runs in a process of its own, from Parquet to committed parts, with the demo model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gc2ray.core.config.job import Job, parse_job
from gc2ray.core.shards import cut_shards
from gc2ray.data.source import Source
from gc2ray.demo.photos import jpeg, opened_photos
from gc2ray.demo.rows import Split, demo_rows, write_rows
from gc2ray.demo.spec import MODEL
from gc2ray.engine.device import peak_host_bytes
from gc2ray.runner.messages import ShardAssignment
from gc2ray.runner.worker import Worker
from jobs.benchmarks import Line, goal

MIB = 2**20
ROWS, SHARD_ROWS = 5000, 500
FLAT = 1.1
GROUP_BYTES, IMAGE_BYTES = 2_200_000_000, 1_000_000
PAGE_ROWS = 2
"""Images to a page of the huge group: a reader holds a page, so pages are what bounds it."""


def run() -> list[Line]:
    """Peaks are of the whole process; `loaded` is before the first row."""
    return [_alone(_rows), _alone(_group)]


def _alone(case: Callable[[], Line]) -> Line:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(case).result()


def _rows() -> Line:
    with tempfile.TemporaryDirectory(prefix="gc2ray-bench-") as directory:
        root = Path(directory)
        write_rows(root / "in" / "rows.parquet", demo_rows(Split.TRAIN, ROWS, opened_photos()))
        # What writing took would hide what answering takes: the worker is a process of its own.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            loaded, *peaks = pool.submit(_answered, root, SHARD_ROWS).result()
    growth = peaks[-1] / peaks[0]
    figures = {
        "loaded_mib": loaded / MIB,
        f"peak_at_row_{SHARD_ROWS}_mib": peaks[0] / MIB,
        f"peak_at_row_{ROWS}_mib": peaks[-1] / MIB,
        "growth": growth,
    }
    met = goal(f"at most {FLAT}x from row {SHARD_ROWS} to {ROWS}", met=growth <= FLAT)
    return Line(f"{ROWS} rows, all images distinct", figures, met)


def _group() -> Line:
    with tempfile.TemporaryDirectory(prefix="gc2ray-bench-") as directory:
        root = Path(directory)
        rows = _write_group(root / "in" / "group.parquet")
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            loaded, peak = pool.submit(_answered, root, rows).result()
    budget = _job(root).cluster.host_memory_bytes
    figures = {
        "loaded_mib": loaded / MIB,
        "peak_mib": peak / MIB,
        "above_loaded_mib": (peak - loaded) / MIB,
        "budget_mib": budget / MIB,
    }
    met = goal("above loaded at most the budget", met=peak - loaded <= budget)
    return Line(f"one row group of {GROUP_BYTES / 1e9:.1f} GB, {rows} rows", figures, met)


def _write_group(path: Path) -> int:
    """One row group: a few images of noise, each row's made its own by bytes behind its end."""
    noise = np.random.default_rng(0)
    side = 720
    images = [
        jpeg(Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)), 95)
        for _ in range(8)
    ]
    padding = max(0, IMAGE_BYTES - len(images[0]))
    rows = GROUP_BYTES // (len(images[0]) + padding)
    cells = [
        {"bytes": images[row % 8] + noise.bytes(8) + bytes(padding), "path": None}
        for row in range(rows)
    ]
    path.parent.mkdir(parents=True)
    table = pa.table({"image": cells, "question": ["What is it?"] * rows})
    pq.write_table(
        table, path, row_group_size=rows, write_batch_size=PAGE_ROWS, use_dictionary=False,
        compression="none",
    )  # fmt: skip
    return rows


def _job(root: Path) -> Job:
    recipe = {
        "model": {"path": str(MODEL), "dtype": "float32"},
        "compression": {"retention": 0.1},
        "generation": {"max_new_tokens": 8},
        "input": {"uri": str(root / "in"), "prompt": {"column": "question"}},
    }
    return parse_job({"output": str(root / "out"), "recipe": recipe})


def _answered(root: Path, shard_rows: int) -> list[int]:
    """Peak of this process when the model is loaded, and after each shard."""
    job = _job(root)
    files, _ = Source(job.recipe.input).scan()
    worker = Worker(job, pa.schema([]))
    worker.load()

    def peaks() -> Iterator[int]:
        for shard in cut_shards(files, shard_rows, job.recipe.fingerprint()):
            worker.process(ShardAssignment(shard))
            yield peak_host_bytes()

    return list(chain([peak_host_bytes()], peaks()))
