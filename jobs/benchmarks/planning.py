"""The driver at scale, without a cluster: a plan of a million shards, and simulated workers.

The plan is cut from synthetic footers by the real planner, and carried out by the real driver over
a simulated pool in virtual time. Shards take 45 s, lognormally; one in a hundred takes ten times as
long; one in five hundred ends its worker on the way, and another takes 65 s to be up. What dies is
looked into as it would be: the next try answers the rows that were in hand in groups first.

Efficiency is the service time of all shards over the time that the workers had, from the driver's
start to its end: starting, deaths, what was lost by them and the tail are all missing from it.
CPU time is this process's, with the simulation's own; where workers are few most of it goes into
two turns a second that find nothing to do. Bytes are the growth of the process's memory.

Not covered: Ray's own cost per call (`job_noop` has it), and reading footers.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gc2ray.core.config.job import Cluster, WorkerRange
from gc2ray.core.shards import Shard, Shards, SourceFile, cut_shards
from gc2ray.core.usage import UsageKind
from gc2ray.data.store import Store
from gc2ray.output.plan import Plan
from gc2ray.output.planner import Committed
from gc2ray.runner.driver import Driver
from gc2ray.runner.messages import ShardAssignment
from jobs.benchmarks import Line, goal
from jobs.benchmarks.support.simulated_pool import SimulatedPool
from jobs.support.machine import resident_bytes

FILES, GROUPS, SHARD_ROWS = 10_000, 100, 1000
SHARDS = FILES * GROUPS
"""A million, of a billion rows."""
CLUSTERS = ((1, 20_000), (8, 100_000), (64, 100_000), (64, SHARDS), (512, SHARDS))
"""Workers, and shards that they are given."""
SERVICE_SECONDS, SPREAD = 45.0, 0.2
STRAGGLERS, STRAGGLER_FACTOR = 0.01, 10.0
DEATHS, LOAD_SECONDS = 1 / 500, 65.0
ROWS_IN_HAND, GROUP_SECONDS = 64, 2.0
BYTES_GOAL, EFFICIENCY_GOAL = 300, 0.95
DAY_SECONDS = 86_400


def run() -> list[Line]:
    """The plan's size and time, then a line for each cluster."""
    logging.getLogger("gc2ray.runner.driver").setLevel(
        logging.ERROR
    )  # thousands of workers are gone
    before = resident_bytes()
    started = time.perf_counter()
    shards = Shards.from_shards(cut_shards(_footers(), SHARD_ROWS, "recipe"))
    took = time.perf_counter() - started
    plan = Plan("recipe", shards, pa.schema([]))
    lines = [
        Line(
            f"{len(shards):,} shards of {shards.rows:,} rows, cut from {FILES:,} footers",
            {"seconds": took, "plan_mb": len(plan.to_bytes()) / 1e6},
        )
    ]
    for workers, count in CLUSTERS:
        lines.append(_simulated(_part_of(plan, count), workers, before))
    return lines


def _footers() -> Iterator[SourceFile]:
    for number in range(FILES):
        name = f"2026/11/part-{number:05d}-of-{FILES:05d}.parquet"
        yield SourceFile(name, f"etag:{number:032x}", (SHARD_ROWS,) * GROUPS)


def _part_of(plan: Plan, count: int) -> Plan:
    if count >= len(plan.shards):
        return plan
    return Plan(plan.recipe_fingerprint, Shards.from_shards(plan.shards[:count]), plan.kept_columns)


@dataclass(frozen=True)
class Service:
    """How shards go.

    Attributes:
        seconds: What each takes, (shards,).
        dies: Whether its first try ends the worker, (shards,).
    """

    seconds: npt.NDArray[np.float64]
    dies: npt.NDArray[np.bool_]

    @staticmethod
    def drawn(shards: int) -> Service:
        """As the module says, the same each time."""
        draw = np.random.default_rng(0)
        seconds = SERVICE_SECONDS * draw.lognormal(0.0, SPREAD, shards)
        seconds[draw.random(shards) < STRAGGLERS] *= STRAGGLER_FACTOR
        return Service(seconds, draw.random(shards) < DEATHS)

    def goes(self, _worker: int, shard: Shard, attempt: int) -> str:
        """How a try of a shard goes."""
        return "die" if attempt == 1 and self.dies[shard.index] else "done"

    def of(self, assignment: ShardAssignment) -> float:
        """What a try takes that ends well: suspects a moment more for each of their groups."""
        groups = sum(1 for _ in assignment.suspect_groups())
        return float(self.seconds[assignment.shard.index]) + GROUP_SECONDS * groups

    def until_death(self, assignment: ShardAssignment) -> float:
        """What a try takes that does not."""
        return float(self.seconds[assignment.shard.index]) / 2

    def in_hand(self, assignment: ShardAssignment) -> tuple[int, ...]:
        """Rows in the middle of the shard."""
        first = assignment.shard.rows // 2
        return tuple(range(first, first + ROWS_IN_HAND))


def _simulated(plan: Plan, workers: int, before_bytes: int) -> Line:
    service = Service.drawn(len(plan.shards))
    pool = SimulatedPool(
        service.goes,
        in_hand=service.in_hand,
        service_seconds=service.of,
        death_seconds=service.until_death,
        load_seconds=LOAD_SECONDS,
        placed=workers,
        remembers=False,
    )
    cluster = Cluster(workers=WorkerRange(max=workers), stall_seconds=3600.0)
    with tempfile.TemporaryDirectory(prefix="gc2ray-bench-") as folder:
        driver = Driver(cluster, Store(folder), pool, lambda _: None)
        started = time.process_time()
        driver.run(plan, Committed.nothing(plan))
        cpu = time.process_time() - started
    grown = resident_bytes() - before_bytes
    figures = {
        "efficiency": float(service.seconds.sum()) / (workers * pool.time),
        "days": pool.time / DAY_SECONDS,
        "deaths": float(service.dies.sum()),
        "useful": driver.usage().seconds_for(UsageKind.USEFUL) / driver.usage().total_seconds,
        "us_per_shard": cpu / len(plan.shards) * 1e6,
    }
    what = f"{workers} simulated workers, {len(plan.shards):,} shards"
    if len(plan.shards) < SHARDS:
        return Line(what, figures)
    figures["bytes_per_shard"] = grown / SHARDS
    met = figures["bytes_per_shard"] <= BYTES_GOAL and figures["efficiency"] >= EFFICIENCY_GOAL
    return Line(what, figures, goal(f"{EFFICIENCY_GOAL:.0%}, {BYTES_GOAL} bytes", met=met))
