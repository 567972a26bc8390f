"""How a plan is stored once, and how much of it is done (`Committed`, `Outcome`).

Only the objects in the store count. `run.json` holds the recipe and the digest of the plan; the
listing of `data/` shows which shards are committed; the footers of the parts count input rows and
failed answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gc2ray.core.config.job import Cluster, Job
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.shards import Booleans, Shard, SourceFile, bytes_digest
from gc2ray.core.stats import RunStats
from gc2ray.core.usage import Usage
from gc2ray.data.column_types import holds
from gc2ray.data.store import Store, json_bytes
from gc2ray.output.heartbeats import WorkerRecord, driver_records, worker_records
from gc2ray.output.parts import foreign_part, planned_parts, read_part, read_part_footers
from gc2ray.output.plan import PLAN_NAME, Plan, plan_name
from gc2ray.output.run_directory import (
    RUN_NAME,
    Run,
    dead_letter_reason,
    dead_letters,
    frozen_plan,
    open_first_round,
    stored_run,
)
from gc2ray.output.verify import answered_rows

FIRST_ERRORS = 3

CALIBRATION_ROWS = 24
SHARDS_PER_WORKER = 4
"""Fewest shards per worker, so that no worker waits long for the last shard."""
MAX_SHARD_ROWS = 20_000


@dataclass(frozen=True)
class Judged:
    """How many answers failed, and how many may.

    Attributes:
        answers: Number of latest answers in the whole output.
        failed: Number of those that failed.
        allowed: Share of answers that may fail, `cluster.max_bad_rows`.
    """

    answers: int
    failed: int
    allowed: float

    @property
    def is_too_many(self) -> bool:
        """Whether more answers failed than allowed."""
        return self.failed > self.allowed * self.answers

    def __str__(self) -> str:
        verdict = "more than" if self.is_too_many else "which"
        return (
            f"{self.failed:,} of {self.answers:,} answers failed, {verdict} cluster.max_bad_rows = "
            f"{self.allowed:g} allows"
        )


@dataclass(frozen=True)
class Outcome:
    """How a run ended, according to its committed parts.

    Attributes:
        shards: Number of committed shards.
        planned_shards: Number of shards in the plan.
        rows: Number of input rows in committed shards; of `read_status`, those of retries too.
        planned_rows: Number of input rows in the plan.
        stats: Statistics of the answers; a row may have several answers.
        dead: A line for each shard that was given up, with the reason.
        usage: How the devices spent their time.
        errors: A line for each of the first answers that failed.
        judged: How many answers failed and how many may; None if that is not judged.
    """

    shards: int
    planned_shards: int
    rows: int
    planned_rows: int
    stats: RunStats
    dead: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    errors: tuple[str, ...] = ()
    judged: Judged | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every planned row is committed."""
        return self.rows == self.planned_rows

    @property
    def exit_code(self) -> int:
        """0 only if the run is complete and, where that is judged, not too many answers failed."""
        too_many = self.judged is not None and self.judged.is_too_many
        return 0 if self.is_complete and not too_many else 1


@dataclass(frozen=True, eq=False)
class Committed:
    """The committed part of a plan.

    Attributes:
        shards: Whether each shard is committed, (shards,).
        rows: Number of input rows in committed shards.
        stats: Statistics of their answers.
        failed: Names of parts with failed answers, at most `FIRST_ERRORS`.
    """

    shards: Booleans
    rows: int
    stats: RunStats
    failed: tuple[str, ...] = ()

    @staticmethod
    def nothing(plan: Plan) -> Committed:
        """No shard committed, as at the start of a run."""
        return Committed(np.zeros(len(plan.shards), np.bool_), 0, RunStats())

    @property
    def whole(self) -> bool:
        """Whether every shard is committed."""
        return bool(self.shards.all())


def stored_plan(store: Store, job: Job) -> Plan | None:
    """The plan of an earlier run into the same output; None for a new output.

    Raises:
        ConfigError: The stored plan has another recipe, or is damaged.
    """
    run = stored_run(store)
    if run is None:
        return None
    run.check(job.recipe)
    return frozen_plan(store, run)


def extend_plan(
    store: Store, job: Job, plan: Plan, files: Sequence[SourceFile], kept_columns: pa.Schema
) -> Plan:
    """The plan with the input files that it does not have yet, stored as its next extension.

    Args:
        store: The output.
        job: The job.
        plan: The stored plan.
        files: The files of the input as it is now.
        kept_columns: Schema of its columns that are written back.

    Raises:
        ConfigError: A planned file has changed, or the kept columns have.
    """
    planned = dict(plan.shards.files)
    changed = [f.source for f in files if planned.get(f.source, f.fingerprint) != f.fingerprint]
    if changed:
        raise ConfigError(
            f"--extend: {changed[0]} changed since it was planned"
            f"{f', and {len(changed) - 1} more' if changed[1:] else ''}; only new files can extend "
            "a run: give changed files another name, or choose a new output"
        )
    if holds(plan.kept_columns, kept_columns):
        kept_columns = plan.kept_columns
    new = [file for file in files if file.source not in planned and file.rows]
    if not new:
        return plan
    rows = job.cluster.shard_rows or int(plan.shards.rows_each.max(initial=1))
    more = Plan.cut(job.recipe, new, rows, kept_columns)
    plan.extended(more)  # refuses a plan that must not be stored
    names = store.names("plan")
    last = store.read(names[-1]) or b""
    store.create(plan_name(len(names)), more.to_bytes(bytes_digest(last)))
    grown = stored_plan(store, job) or plan
    return extend_plan(
        store, job, grown, files, kept_columns
    )  # another driver may have stored one first


def store_plan(store: Store, job: Job, plan: Plan) -> Plan:
    """Store a plan for good; if another driver was faster, its plan is returned instead.

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
    store.create(RUN_NAME, Run.from_plan(job.recipe, frozen, data).to_bytes())
    return stored_plan(store, job) or frozen


def shard_rows(cluster: Cluster, rows: int, workers: int, seconds_per_row: float) -> int:
    """Rows of a shard: `shard_seconds` of work, fewer if workers would be idle at the end."""
    if cluster.shard_rows is not None:
        return cluster.shard_rows
    fair = max(1, -(-rows // (workers * SHARDS_PER_WORKER)))
    timed = int(cluster.shard_seconds / seconds_per_row) if seconds_per_row > 0 else MAX_SHARD_ROWS
    return max(1, min(fair, timed, MAX_SHARD_ROWS))


def committed_parts(store: Store, plan: Plan, earlier: Committed | None = None) -> Committed:
    """The committed part of a plan, by one listing and the footers of new parts.

    Args:
        store: The output.
        plan: Its plan.
        earlier: The result of an earlier call; footers that it counts are not read again.

    Raises:
        ConfigError: A part is damaged, or does not belong to this plan.
    """
    earlier = earlier or Committed.nothing(plan)
    listed = planned_parts(store, plan.shards)
    if listed.foreign:
        raise foreign_part(store, listed.foreign[0])
    new: list[int] = np.flatnonzero(listed.committed & ~earlier.shards).tolist()
    names = [plan.shards.part_name(index) for index in new]
    rows, stats, failed = earlier.rows, earlier.stats, list(earlier.failed)
    planned = plan.shards.rows_each
    for index, name, footer in zip(new, names, read_part_footers(store, names), strict=True):
        fits = footer.rows == planned[index] and footer.sid == plan.shards.sid(index)
        if not fits or footer.run != plan.recipe_fingerprint:
            raise foreign_part(store, name)
        rows, stats = rows + footer.rows, stats + footer.stats
        if footer.stats.bad_rows and len(failed) < FIRST_ERRORS:
            failed.append(name)
    return Committed(earlier.shards | listed.committed, rows, stats, tuple(failed))


def outcome(store: Store, plan: Plan, committed: Committed) -> Outcome:
    """The outcome of a run so far."""
    missing = np.flatnonzero(~committed.shards)
    return Outcome(
        shards=len(plan.shards) - len(missing),
        planned_shards=len(plan.shards),
        rows=committed.rows,
        planned_rows=plan.rows,
        stats=committed.stats,
        dead=_dead_letters(store, plan, missing),
        usage=sum((record.usage for record in driver_records(store)), Usage()),
        errors=tuple(islice(_errors(store, committed.failed), FIRST_ERRORS)),
    )


def _errors(store: Store, names: Iterable[str]) -> Iterator[str]:
    """Failed answers in some parts, as `row_key: status: error`."""
    for name in names:
        try:
            table = read_part(store, name, ["row_key", "status", "error"])
        except OSError as error:  # the rest of the outcome does not depend on it
            yield str(error)
            continue
        for row in table.filter(pc.not_equal(table["status"], str(Status.OK))).to_pylist():
            yield f"{row['row_key']}: {row['status']}: {row['error']}"


def write_dead_letter(store: Store, shard: Shard, tries: int, reason: str) -> None:
    """Record why a shard was given up, beside the dead letters of earlier runs of the plan.

    Raises:
        OSError, or another of `storage_errors`: The record could not be written.
    """
    content = {
        "sid": shard.sid,
        "shard": shard.index,
        "tries": tries,
        "reason": reason,
        "rows": shard.rows,
        "spans": [asdict(span) for span in shard.spans],
        "time": datetime.now(UTC).isoformat(),
    }
    data = json_bytes(content)
    number = tries
    while not store.create(f"dead/{shard.sid}.{number}.json", data):
        number += 1


def _dead_letters(store: Store, plan: Plan, missing: Iterable[int]) -> tuple[str, ...]:
    """The last dead letter of each missing shard that has one, a line each."""
    last = dict(dead_letters(store))
    lines = []
    for index in missing if last else ():
        name = last.get(plan.shards.sid(index))
        data = store.read(name) if name else None
        if data is not None:
            shard = plan.shards[index]
            lines.append(f"shard {shard.index} ({shard.rows} rows): {_reason(name, data)}")
    return tuple(lines)


def _reason(name: str | None, dead_letter: bytes) -> str:
    """Why a shard was given up, according to its dead letter."""
    try:
        return dead_letter_reason(dead_letter)
    except (ValueError, KeyError, TypeError):
        return f"{name} is not a dead letter that gc2ray wrote, or is incomplete"


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        outcome: The outcome so far, judged by committed parts.
        workers: The records of its worker processes.
    """

    outcome: Outcome
    workers: tuple[WorkerRecord, ...]


def read_status(output: str) -> RunStatus:
    """Read how far a run is, from its output alone.

    Args:
        output: Directory or URL of the run.

    Raises:
        ConfigError: There is no run, or it is damaged.
    """
    first = open_first_round(output)
    state = outcome(first.store, first.plan, committed_parts(first.store, first.plan))
    rows = answered_rows(output, state.rows, state.planned_rows)
    state = replace(state, rows=rows, dead=() if rows == state.planned_rows else state.dead)
    return RunStatus(state, tuple(worker_records(first.store)))
