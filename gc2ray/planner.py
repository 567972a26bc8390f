"""The plan of a run, frozen once; and how far it is carried out (`Outcome`).

What counts is what the store holds: `run.json` names the recipe and the digest of the plan, the
listing of `data/` says what is committed, the parts' footers how many input rows that is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gc2ray.config import Cluster, Job
from gc2ray.errors import ConfigError
from gc2ray.manifest import PLAN_NAME, RUN_NAME, Plan, Run, Shard, digest
from gc2ray.stats import RunStats
from gc2ray.store import PartFooter, Store

CALIBRATION_ROWS = 24
SHARDS_PER_WORKER = 4
"""At least, so that no worker waits long for the last one."""
MAX_SHARD_ROWS = 20_000


@dataclass(frozen=True)
class Outcome:
    """How a run ended, by what is committed."""

    shards: int
    planned_shards: int
    rows: int
    planned_rows: int
    stats: RunStats  # of the answers, of which a row may have several
    dead: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 only when every planned row is committed."""
        return 0 if self.rows == self.planned_rows and self.shards == self.planned_shards else 1


def stored_plan(store: Store, job: Job) -> Plan | None:
    """The plan of an earlier run into the same output; None for a new output.

    Raises:
        ConfigError: It is of another recipe, or damaged.
    """
    data = store.read(RUN_NAME)
    if data is None:
        return None
    run = Run.from_bytes(data)
    run.check(job.recipe)
    plan = store.read(PLAN_NAME)
    if plan is None or digest(plan) != run.plan_digest:
        raise ConfigError(f"{job.output}: {PLAN_NAME} is not the one that {RUN_NAME} names")
    return Plan.from_bytes(plan)


def store_plan(store: Store, job: Job, plan: Plan) -> Plan:
    """Freeze a plan; if another driver was faster, its plan is returned instead.

    Raises:
        ConfigError: The other driver's recipe is not this one.
    """
    store.create(PLAN_NAME, plan.to_bytes())
    data = store.read(PLAN_NAME) or b""
    frozen = Plan.from_bytes(data)
    if frozen.recipe_fingerprint != job.recipe.fingerprint():
        raise ConfigError(
            f"{job.output}: {PLAN_NAME} was left by a start with another recipe; choose a new "
            "output, or delete that file"
        )
    store.create(RUN_NAME, Run.of(job.recipe, frozen, data).to_bytes())
    return stored_plan(store, job) or frozen


def shard_rows(cluster: Cluster, rows: int, workers: int, seconds_per_row: float) -> int:
    """Rows of a shard: `shard_seconds` of work, fewer where workers would wait at the end."""
    if cluster.shard_rows is not None:
        return cluster.shard_rows
    fair = max(1, -(-rows // (workers * SHARDS_PER_WORKER)))
    timed = int(cluster.shard_seconds / seconds_per_row) if seconds_per_row > 0 else MAX_SHARD_ROWS
    return max(1, min(fair, timed, MAX_SHARD_ROWS))


def committed_parts(store: Store, plan: Plan) -> dict[str, PartFooter]:
    """Committed shards of a plan: sid to checked footer.

    Raises:
        ConfigError: A part is damaged, or not of this plan.
    """
    names = store.committed()
    shards = {shard.sid: shard for shard in plan.shards}
    footers = store.footers(list(names.values()))
    for (sid, name), footer in zip(names.items(), footers, strict=True):
        shard = shards.get(sid)
        fits = shard is not None and footer.sid == sid and footer.rows == shard.rows
        if not fits or footer.run != plan.recipe_fingerprint:
            raise ConfigError(f"{store.uri}: {name} is not a part of this run; move it away")
    return dict(zip(names, footers, strict=True))


def outcome(store: Store, plan: Plan, parts: Mapping[str, PartFooter]) -> Outcome:
    """How a run stands, by its `committed_parts`."""
    footers = parts.values()
    return Outcome(
        shards=len(footers),
        planned_shards=len(plan.shards),
        rows=sum(footer.rows for footer in footers),
        planned_rows=plan.rows,
        stats=sum((footer.stats for footer in footers), RunStats()),
        dead=_dead_letters(store, [shard for shard in plan.shards if shard.sid not in parts]),
    )


def _dead_letters(store: Store, missing: Sequence[Shard]) -> tuple[str, ...]:
    """The last dead letter of each missing shard that has one, a line each."""
    last = {name.split("/")[1].split(".")[0]: name for name in store.names("dead")}
    letters = []
    for shard in missing:
        data = store.read(last[shard.sid]) if shard.sid in last else None
        if data is not None:
            reason = json.loads(data)["reason"]
            letters.append(f"shard {shard.index} ({shard.rows} rows): {reason}")
    return tuple(letters)
