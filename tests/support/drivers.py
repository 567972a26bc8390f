"""A driver on a simulated pool, and plans for it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa

from gc2ray.core.config.job import Cluster
from gc2ray.core.shards import SourceFile
from gc2ray.data.store import Store
from gc2ray.output.plan import Plan
from gc2ray.output.planner import Committed
from gc2ray.runner.driver import Driver
from jobs.benchmarks.support.simulated_pool import SimulatedPool
from tests.support.rows import make_recipe

RECIPE = make_recipe("model")


def make_plan(rows: int = 100, per_shard: int = 10) -> Plan:
    return Plan.cut(RECIPE, [SourceFile("a.parquet", "f", (rows,))], per_shard, pa.schema([]))


class DriverHarness:
    """A driver, with the shards that its pool finished and the snapshots that it gave."""

    def __init__(self, tmp_path: Path, pool: SimulatedPool, **cluster: object) -> None:
        self.pool, self.finished, self.seen = pool, [], []
        pool.on_done = lambda shard: self.finished.append(shard.sid)
        settings = {"workers": 2, "stall_seconds": 100.0, **cluster}
        self.store = Store(str(tmp_path / "out"))
        self.driver = Driver(Cluster(**settings), self.store, pool, self.seen.append)

    def run(self, plan: Plan, committed: Committed | None = None) -> None:
        self.driver.run(plan, committed or Committed.nothing(plan))

    def dead_letters(self) -> list[dict]:
        return [json.loads(self.store.read(name) or b"") for name in self.store.names("dead")]
