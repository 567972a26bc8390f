"""Retries: which rows of an output are answered again, and the plan for them.

A row is answered again, with all its prompts, if the latest answer to one of them failed, or if it
has no answer because its shard was given up. The plan is stored like any other, as the plan of a
retry round.

Not covered: running a retry (`gc2ray.runner.run`).
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gc2ray.core.config.job import Cluster, Job
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.shards import Booleans, Integers, Shard, Shards, Span, cut_spans
from gc2ray.data.store import Store
from gc2ray.output.latest import MERGED_BY, Latest, row_positions, spans_where
from gc2ray.output.plan import Plan
from gc2ray.output.planner import Judged, Outcome, store_plan
from gc2ray.output.run_directory import round_store
from gc2ray.output.verify import Checked, Verdict, verify

DEAD = "dead"
"""Beside the statuses of answers: rows without an answer because their shard was given up."""
FAILURES: tuple[str, ...] = (*(str(status) for status in Status if status != Status.OK), DEAD)
MIN_SHARDS = 16
"""Fewest shards, if there are as many rows: a row that kills workers then affects few others."""


@dataclass(frozen=True, eq=False)
class Retry:
    """A retry to run: the next one, or the newest one if that is not finished.

    Attributes:
        output: Directory or URL of the run.
        number: Number of the retry round.
        store: Directory of the round.
        recipe: Recipe of the output.
        plan: Plan of the rows to answer again.
        begun: Whether the plan is stored already.
    """

    output: str
    number: int
    store: Store
    recipe: Recipe
    plan: Plan
    begun: bool

    def job(self, cluster: Cluster) -> Job:
        """The retry as a job."""
        return Job(output=self.store.uri, recipe=self.recipe, cluster=cluster)

    def freeze(self) -> Plan:
        """Store the plan; if another start was faster, its plan is returned instead."""
        return self.plan if self.begun else store_plan(self.store, self.job(Cluster()), self.plan)


@dataclass(frozen=True)
class Retried:
    """What a retry did.

    Attributes:
        retry_round: Its number; None where no row was left to answer again.
        outcome: How it ended; None where no row was left.
        judged: How many of all latest answers failed.
    """

    retry_round: int | None
    outcome: Outcome | None
    judged: Judged

    @property
    def exit_code(self) -> int:
        """0 where the retry is complete, and no more answers failed than the cluster allows."""
        if self.outcome is not None:
            return self.outcome.exit_code
        return 1 if self.judged.is_too_many else 0


def next_retry(output: str, failures: Collection[str] = FAILURES) -> Retry | None:
    """The retry to run; None if there is no row to answer again.

    A retry that is not finished is resumed, regardless of `failures`.

    Args:
        output: Directory or URL of the run.
        failures: Statuses of answers, or `DEAD`.

    Raises:
        ConfigError: There is no run, it is not finished or damaged, or a failure is unknown.
        OSError: The storage does not answer.
    """
    unknown = sorted({*failures} - {*FAILURES})
    if unknown:
        raise ConfigError(
            f"--status {unknown[0]!r}: is not a failure; choose from {', '.join(FAILURES)}"
        )
    verdict = verify(output)
    verdict.raise_if_damaged(output)
    first, newest = verdict.rounds[0], verdict.rounds[-1]
    waiting = int(first.waiting.sum())
    if waiting:
        raise ConfigError(f"{output}: {waiting} shards are not answered yet; run again, then retry")
    recipe, number = first.round.run.recipe, newest.round.number
    if number and newest.waiting.any():
        store, plan = newest.round.store, newest.round.plan
        return Retry(output, number, store, recipe, plan, begun=True)
    failed = retry_plan(verdict, failures)
    if failed is None:
        return None
    store = round_store(output, number + 1)
    return Retry(output, number + 1, store, recipe, failed, begun=False)


def retry_plan(verdict: Verdict, failures: Collection[str] = FAILURES) -> Plan | None:
    """The plan of the failed rows of an output; None if there are none.

    Args:
        verdict: The result of verifying the output, without damage.
        failures: Statuses of answers, or `DEAD`, as for `next_retry`.
    """
    first, latest = verdict.rounds[0], verdict.latest()
    plan = first.round.plan
    numbers = {file: number for number, file in enumerate(plan.shards.files)}
    flat = array("q")  # file, first, stop of each span: there may be a million of them
    for index in _doubtful(first, latest):
        shard = plan.shards[int(index)]
        for span in spans_where(shard, _failed_rows(latest, shard, failures)):
            flat.extend((numbers[span.source, span.fingerprint], span.first, span.stop))
    spans = np.array(flat, np.int64).reshape(-1, 3)
    rows = int((spans[:, 2] - spans[:, 1]).sum())
    if not rows:
        return None
    size = max(1, min(int(np.median(plan.shards.rows_each)), -(-rows // MIN_SHARDS)))
    cut = cut_spans(_spans(plan.shards.files, spans), size, plan.recipe_fingerprint)
    return Plan(plan.recipe_fingerprint, Shards.from_shards(cut), plan.kept_columns)


def latest_failures(output: str) -> tuple[int, int]:
    """The number of latest answers of an output, and how many of them failed.

    Raises:
        ConfigError: There is no run, or it is damaged.
        OSError: The storage does not answer.
    """
    verdict = verify(output)
    verdict.raise_if_damaged(output)
    first, latest = verdict.rounds[0], verdict.latest()
    answers, failed = first.stats.rows, 0
    for index in _doubtful(first, latest):
        table = latest.answers(int(index), MERGED_BY)
        if table is not None:
            statuses = table["status"].to_numpy().astype(str)
            failed += int(np.count_nonzero(statuses != str(Status.OK)))
            answers += 0 if first.committed[index] else len(table)
    return answers, failed


def _doubtful(first: Checked, latest: Latest) -> Integers:
    """Shards of round 0 with a failed answer, without a part, or with answers of a retry."""
    return np.flatnonzero((first.failed > 0) | latest.retried() | ~first.committed)


def _spans(files: Sequence[tuple[str, str]], columns: npt.NDArray[np.int64]) -> Iterator[Span]:
    for file, first, stop in columns:
        source, fingerprint = files[file]
        yield Span(source, fingerprint, int(first), int(stop))


def _failed_rows(latest: Latest, shard: Shard, failures: Collection[str]) -> Booleans:
    """Which rows of a shard are to be answered again, (rows,)."""
    chosen = latest.unanswered(shard.index) & (DEAD in failures)
    answers = latest.answers(shard.index, MERGED_BY)
    if answers is not None:
        failed = np.isin(answers["status"].to_numpy().astype(str), list(failures))
        chosen[row_positions(shard, answers)[failed]] = True
    return chosen
