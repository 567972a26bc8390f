"""Checks that an output holds what was planned: every row once, and nothing else.

A quick check compares digests of run and plan, the listing of `data/` and every part's footer with
the plan. A deep check also reads every part and compares its rows with the plan and the footer.
Retries are checked in the same manner, and must plan rows of round 0 only.

Not covered: the input, which is not read; whether answers are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gc2ray.core.errors import ConfigError
from gc2ray.core.shards import Booleans, Integers, runs
from gc2ray.core.stats import RunStats
from gc2ray.data.parquet_footer import FOOTER_THREADS
from gc2ray.output.latest import Latest, owners
from gc2ray.output.part_checks import PartCheck, check_part
from gc2ray.output.parts import planned_parts
from gc2ray.output.plan import PLAN_NAME
from gc2ray.output.run_directory import (
    MODEL_NAME,
    RETRY_ROUNDS,
    RUN_NAME,
    Round,
    dead_letters,
    object_name,
    open_round,
    open_run,
    retry_numbers,
    round_store,
)

DEEP_THREADS = 2
"""Threads that read whole parts: each holds one in memory."""
AT_A_TIME = 1024
"""Number of parts whose checks are in memory at a time."""


@dataclass(frozen=True, eq=False)
class Checked:
    """The check of one round.

    Attributes:
        round: The round.
        committed: Whether each shard has a part, (shards,).
        given_up: Whether each shard has a dead letter and no part, (shards,).
        failed: Number of failed answers of each shard, (shards,).
        rows: Number of input rows in good parts.
        stats: Statistics of their answers.
        problems: A line for each problem.
        notes: Lines that are worth knowing, but no problems.
    """

    round: Round
    committed: Booleans
    given_up: Booleans
    failed: Integers
    rows: int
    stats: RunStats
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def waiting(self) -> Booleans:
        """Whether each shard has neither a part nor a dead letter, (shards,)."""
        return ~(self.committed | self.given_up)


@dataclass(frozen=True, eq=False)
class Verdict:
    """The result of verifying an output.

    Attributes:
        rounds: The rounds that could be checked, in order; none if round 0 could not.
        rows: Number of input rows that have answers, in any round.
        planned_rows: Number of input rows in the plan of round 0.
        damage: A line for each problem.
        missing: A line for each run of shards without answers.
        notes: Lines that are worth knowing, but no problems.
    """

    rounds: tuple[Checked, ...]
    rows: int
    planned_rows: int
    damage: tuple[str, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """The lines of damage, then those of missing answers."""
        return self.damage + self.missing

    @property
    def exit_code(self) -> int:
        """0 only if every planned row is answered and nothing is damaged."""
        return 1 if self.problems else 0

    def raise_if_damaged(self, output: str) -> None:
        """Refuse an output that is damaged.

        Args:
            output: Its directory or URL, for the message.

        Raises:
            ConfigError: Names the first problem.
        """
        if self.damage:
            raise ConfigError(f"{output}: {self.damage[0]}; run `gc2ray verify` for details")

    def latest(self) -> Latest:
        """The latest answers."""
        return _latest(self.rounds)


def answered_rows(output: str, first_rows: int, planned_rows: int) -> int:
    """Number of input rows that have answers in any round.

    A retry may have answered rows of a shard that was given up, which round 0 has no part of; only
    then is the output verified.

    Args:
        output: Directory or URL.
        first_rows: Number of rows that round 0 has answered.
        planned_rows: Number of rows in its plan.

    Raises:
        ConfigError, OSError: As `verify`.
    """
    if first_rows >= planned_rows or not retry_numbers(round_store(output, 0).names(RETRY_ROUNDS)):
        return first_rows
    return verify(output).rows


def verify(output: str, *, deep: bool = False) -> Verdict:
    """Check an output.

    Args:
        output: Directory or URL.
        deep: Read every part, not only its footer.

    Raises:
        ConfigError: There is no run, or its `run.json` is damaged.
        OSError: The storage does not answer.
    """
    store, _ = open_run(output)
    names = store.names(RETRY_ROUNDS)
    numbers = retry_numbers(names)
    folders = {object_name(number) for number in numbers}
    damage = [
        f"{name}: is not a retry round; move it away" for name in names if name not in folders
    ]
    notes: list[str] = []
    checked: list[Checked] = []
    for number in (0, *numbers):
        try:
            this_round = open_round(output, number)
        except ConfigError as error:
            damage.append(object_name(number, str(error)))
            if number == 0:
                return Verdict((), 0, 0, tuple(damage), (), ())
            continue
        if this_round is None:
            notes.append(
                f"{object_name(number, RUN_NAME)}: missing; run `gc2ray retry` to begin this round"
            )
            continue
        damage += _strayed(checked[0].round, this_round) if checked else ()
        checked.append(_check(this_round, deep=deep))
    return _verdict(checked, damage, notes)


def _verdict(checked: Sequence[Checked], damage: Sequence[str], notes: Sequence[str]) -> Verdict:
    unanswered = _unanswered(checked)
    planned = checked[0].round.plan.rows
    return Verdict(
        rounds=tuple(checked),
        rows=planned - int(unanswered.sum()),
        planned_rows=planned,
        damage=(*damage, *(line for each in checked for line in each.problems)),
        missing=tuple(_missing(checked, unanswered)),
        notes=(*notes, *(line for each in checked for line in each.notes)),
    )


def _latest(rounds: Sequence[Checked]) -> Latest:
    return Latest([(checked.round, checked.committed) for checked in rounds])


def _strayed(first: Round, retry: Round) -> Iterator[str]:
    """What a retry has that does not belong to round 0."""
    run = retry.name(RUN_NAME)
    if retry.plan.recipe_fingerprint != first.plan.recipe_fingerprint:
        yield f"{run}: its recipe is not the output's; move {retry.name('')} away"
    if None not in (first.model, retry.model) and first.model != retry.model:
        yield f"{retry.name(MODEL_NAME)}: its model is not the output's; move {retry.name('')} away"
    if (owners(first.plan.shards, retry.plan.shards) < 0).any():
        yield f"{retry.name(PLAN_NAME)}: plans rows that {PLAN_NAME} does not; move it away"


def _check(this_round: Round, *, deep: bool) -> Checked:
    shards = this_round.plan.shards
    problems = list(_plan_problems(this_round))
    committed, foreign, others = planned_parts(this_round.store, shards)
    for name in sorted([*foreign, *others]):
        problems.append(f"{this_round.name(name)}: is no planned shard's part; move it away")
    failed, rows, stats = np.zeros(len(shards), np.int64), 0, RunStats()
    for index, check in _part_checks(this_round, np.flatnonzero(committed), deep=deep):
        problems += [check.problem] if check.problem else []
        rows, stats = rows + check.rows, stats + check.stats
        failed[index] = check.stats.bad_rows
    sids = [int(sid, 16) for sid, _ in dead_letters(this_round.store)]
    dead = np.isin(shards.sids, np.array(sids, np.uint64))
    return Checked(
        round=this_round,
        committed=committed,
        given_up=dead & ~committed,
        failed=failed,
        rows=rows,
        stats=stats,
        problems=tuple(problems),
        notes=tuple(_notes(this_round, int((dead & committed).sum()))),
    )


def _plan_problems(this_round: Round) -> Iterator[str]:
    """Problems of a plan whose digest is right."""
    plan, run = this_round.plan, this_round.run
    if run.recipe.fingerprint() != plan.recipe_fingerprint:
        yield f"{this_round.name(PLAN_NAME)}: belongs to another recipe than {RUN_NAME}"
    spans, sources = plan.shards.spans, [source for source, _ in plan.shards.files]
    source = np.unique(sources, return_inverse=True)[1].astype(np.int64)[spans.file]
    order = np.lexsort((spans.first, source))
    overlap = (source[order][1:] == source[order][:-1]) & (
        spans.first[order][1:] < spans.stop[order][:-1]
    )
    for at in order[1:][overlap]:
        name = f"{sources[spans.file[at]]}#{spans.first[at]}"
        yield f"{this_round.name(PLAN_NAME)}: {name} is planned twice"


def _part_checks(
    this_round: Round, parts: Integers, *, deep: bool
) -> Iterator[tuple[int, PartCheck]]:
    """Checks of parts, with their indices, in order."""
    threads = DEEP_THREADS if deep else FOOTER_THREADS
    with ThreadPoolExecutor(threads, "gc2ray-verify") as pool:
        for start in range(0, len(parts), AT_A_TIME):
            indices = parts[start : start + AT_A_TIME].tolist()
            checks = pool.map(lambda index: check_part(this_round, index, deep=deep), indices)
            yield from zip(indices, checks, strict=True)


def _notes(this_round: Round, revived: int) -> Iterator[str]:
    if revived:
        name = this_round.name("dead")
        yield f"{name}: {revived} shards were given up and committed later"
    left = len(this_round.store.names("_tmp"))
    if left:
        name = this_round.name("_tmp")
        yield f"{name}: {left} temporary files of killed processes; a later run removes them"


def _unanswered(checked: Sequence[Checked]) -> Integers:
    """Number of rows of each shard of round 0 without an answer in any round, (shards,)."""
    first, latest = checked[0], _latest(checked)
    rows = np.where(first.committed, 0, first.round.plan.shards.rows_each)
    for index in np.flatnonzero(latest.retried() & ~first.committed):
        rows[index] = latest.unanswered(int(index)).sum()
    return rows


def _missing(checked: Sequence[Checked], unanswered: Integers) -> Iterator[str]:
    """A line for each run of shards without answers."""
    first, newest = checked[0], checked[-1]
    yield from _waiting(first, unanswered, "run again")
    for shards in runs(first.given_up & (unanswered > 0)):
        yield (
            f"{_named(shards)} ({unanswered[shards].sum()} rows without an answer): given up, "
            "dead/ says why; run again, or `gc2ray retry`"
        )
    if newest is not first:
        rows = newest.round.plan.shards.rows_each
        yield from _waiting(newest, rows, "retry again")


def _waiting(checked: Checked, rows: Integers, remedy: str) -> Iterator[str]:
    for shards in runs(checked.waiting):
        name = checked.round.name(_named(shards))
        yield f"{name} ({rows[shards].sum()} rows): not answered yet; {remedy}"


def _named(shards: slice) -> str:
    last = shards.stop - 1
    return f"shard {last}" if shards.start == last else f"shards {shards.start} to {last}"
