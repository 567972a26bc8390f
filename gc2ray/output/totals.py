"""`RunTotals`: the sums over all footers and records of an output, read once and kept small.

Nothing is kept per row or per part. Statistics are added up while footers are read: in a few
groups, to estimate their spread, and over time, in buckets that widen. Runs of any size fit in
memory.

The record of a killed worker ends up to half a minute before its process did.

Not covered: the answers themselves; which round's answer is the latest (`gc2ray.output.latest`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gc2ray.core.stats import RunStats
from gc2ray.core.usage import Usage
from gc2ray.data.parquet_footer import FOOTER_THREADS
from gc2ray.data.store import Store, read_records
from gc2ray.output.heartbeats import DriverRecord, WorkerRecord, driver_records, worker_records
from gc2ray.output.parts import (
    PartFooter,
    foreign_part,
    list_parts,
    read_part_footer,
)
from gc2ray.output.run_directory import (
    RETRY_ROUNDS,
    Run,
    dead_letter_reason,
    dead_letters,
    open_run,
    retry_numbers,
    round_store,
    stored_run,
)
from gc2ray.output.verify import answered_rows

GROUPS = 64
"""Number of groups that parts are added to in turn: enough for a bootstrap."""
BUCKETS = 200
AHEAD = 4 * FOOTER_THREADS
MOST_DEAD_LETTERS = 20
"""Most dead letters that are read; the others are only counted."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moment:
    """What was committed within a period.

    Attributes:
        answers: Number of answer rows.
        input_starved_ns: Time that the parts' workers waited for input.
        busy_ns: Time that their stages were busy.
    """

    answers: int = 0
    input_starved_ns: int = 0
    busy_ns: int = 0

    def __add__(self, other: Moment) -> Moment:
        return Moment(
            self.answers + other.answers,
            self.input_starved_ns + other.input_starved_ns,
            self.busy_ns + other.busy_ns,
        )


class Timeline:
    """Moments in buckets of equal width; the width doubles when there would be too many buckets.

    Attributes:
        width_seconds: Width of a bucket.
    """

    def __init__(self) -> None:
        self.width_seconds = 1.0
        self._buckets: dict[int, Moment] = {}

    def add(self, when: datetime, moment: Moment) -> None:
        """Add a moment to its bucket."""
        at = int(when.timestamp() // self.width_seconds)
        self._buckets[at] = self._buckets.get(at, Moment()) + moment
        while max(self._buckets) - min(self._buckets) >= BUCKETS:
            self._widen()

    def _widen(self) -> None:
        wider: dict[int, Moment] = {}
        for at, moment in self._buckets.items():
            wider[at // 2] = wider.get(at // 2, Moment()) + moment
        self.width_seconds, self._buckets = 2 * self.width_seconds, wider

    def moments(self) -> list[tuple[datetime, Moment]]:
        """Every bucket from the first to the last, empty ones included, with its start."""
        if not self._buckets:
            return []
        return [
            (datetime.fromtimestamp(at * self.width_seconds, UTC), self._buckets.get(at, Moment()))
            for at in range(min(self._buckets), max(self._buckets) + 1)
        ]


@dataclass(frozen=True, eq=False)
class RoundTotals:
    """The totals of one round.

    Attributes:
        number: 0, or the number of the retry.
        run: The content of its `run.json`.
        parts: Number of committed parts.
        rows: Number of input rows in those parts.
        stats: Statistics of their answers.
        groups: The same statistics in up to `GROUPS` groups.
        timeline: Answers and times over time, of parts that record when they were written.
        workers: Records of its worker processes.
        drivers: Records of its drivers.
        dead_letters: Shards that were given up, each with the reason; at most
            `MOST_DEAD_LETTERS` of them.
        dead_letter_count: Number of dead letters, including those of shards committed later.
    """

    number: int
    run: Run
    parts: int
    rows: int
    stats: RunStats
    groups: tuple[RunStats, ...]
    timeline: Timeline
    workers: tuple[WorkerRecord, ...]
    drivers: tuple[DriverRecord, ...]
    dead_letters: tuple[tuple[str, str], ...]
    dead_letter_count: int

    @property
    def usage(self) -> Usage:
        """How the workers spent their time, according to the drivers."""
        return sum((record.usage for record in self.drivers), Usage())


@dataclass(frozen=True, eq=False)
class RunTotals:
    """The totals of an output.

    Attributes:
        output: Directory or URL.
        rounds: The totals of its rounds, in order.
        answered_rows: Number of input rows that have answers in any round.
    """

    output: str
    rounds: tuple[RoundTotals, ...]
    answered_rows: int

    @property
    def run(self) -> Run:
        """The content of the output's `run.json`."""
        return self.rounds[0].run

    @property
    def stats(self) -> RunStats:
        """Statistics of the answers of all rounds."""
        return sum((each.stats for each in self.rounds), RunStats())

    @property
    def usage(self) -> Usage:
        """How the workers of all rounds spent their time."""
        return sum((each.usage for each in self.rounds), Usage())

    @property
    def workers(self) -> tuple[WorkerRecord, ...]:
        """The worker processes of all rounds."""
        return tuple(worker for each in self.rounds for worker in each.workers)

    @property
    def model_shape(self) -> Mapping[str, Any] | None:
        """Sizes of the model, as `ModelShape.to_dict` has them; None if no worker recorded them."""
        return next((worker.model_shape for worker in self.workers if worker.model_shape), None)


def read_totals(output: str, tick: Callable[[int], None] = lambda _: None) -> RunTotals:
    """Read the footers and records of an output.

    Args:
        output: Directory or URL.
        tick: Called with 1 after each footer.

    Raises:
        ConfigError: There is no run, or something in it is damaged.
        OSError: The storage does not answer.
    """
    store, _ = open_run(output)
    numbers = [0, *retry_numbers(store.names(RETRY_ROUNDS))]
    totals = (_round_totals(round_store(output, number), number, tick) for number in numbers)
    rounds = tuple(each for each in totals if each is not None)
    first = rounds[0]
    return RunTotals(output, rounds, answered_rows(output, first.rows, first.run.rows))


def _round_totals(store: Store, number: int, tick: Callable[[int], None]) -> RoundTotals | None:
    run = stored_run(store)
    if run is None:
        return None
    names = sorted(list_parts(store).values())
    groups = [RunStats()] * min(GROUPS, len(names))
    rows, timeline, fingerprint = 0, Timeline(), run.recipe.fingerprint()
    for index, footer in enumerate(_footers(store, names)):
        if footer.run != fingerprint:
            raise foreign_part(store, names[index])
        stats = footer.stats
        groups[index % GROUPS] += stats
        rows += footer.rows
        if footer.written is not None:
            moment = Moment(stats.rows, stats.input_starved_ns, sum(stats.stage_ns.values()))
            timeline.add(footer.written, moment)
        tick(1)
    given_up = dead_letters(store)
    return RoundTotals(
        number=number,
        run=run,
        parts=len(names),
        rows=rows,
        stats=sum(groups, RunStats()),
        groups=tuple(groups),
        timeline=timeline,
        workers=tuple(worker_records(store)),
        drivers=tuple(driver_records(store)),
        dead_letters=tuple(_reasons(store, given_up[:MOST_DEAD_LETTERS])),
        dead_letter_count=len(given_up),
    )


def _footers(store: Store, names: Sequence[str]) -> Iterator[PartFooter]:
    """Footers in order; some are read ahead, none is kept."""
    ahead: deque[Future[PartFooter]] = deque()
    with ThreadPoolExecutor(FOOTER_THREADS, "gc2ray-footer") as pool:
        for name in names:
            ahead.append(pool.submit(read_part_footer, store, name))
            if len(ahead) > AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _reasons(store: Store, given_up: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The shards of dead letters, and why they were given up."""
    sids = {name: sid for sid, name in given_up}
    for name, reason in read_records(store, sids, dead_letter_reason):
        yield sids[name], reason
