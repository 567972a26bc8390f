"""Shows a run in the terminal: a progress bar while it runs, a table when it ends.

On a terminal the bar moves; in a log a line is printed every half minute. `Terminal` shows the
results of the functions of `gc2ray`, each in its form.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from gc2ray.core.stats import STAGES, RunStats
from gc2ray.core.usage import Usage, UsageKind
from gc2ray.output.planner import Outcome, RunStatus
from gc2ray.output.retry import Retried
from gc2ray.output.run_directory import object_name
from gc2ray.output.verify import Verdict

if TYPE_CHECKING:
    from gc2ray.core.config.job import Job
    from gc2ray.engine.parity.result import Parity
    from gc2ray.estimation.estimate import Estimate
    from gc2ray.estimation.recommendation import Tuning
    from gc2ray.models.checkpoint.known_models import SupportedModels
    from gc2ray.output.compact import Dataset
    from gc2ray.output.heartbeats import WorkerRecord
    from gc2ray.reporting.evaluation import Evaluation
    from gc2ray.reporting.writing import WrittenReport
    from gc2ray.runner.messages import Snapshot

LOG_SECONDS = 30.0
MAX_DEAD_LETTERS = 10
MAX_ERROR = 400
MAX_PROBLEMS = 20


@contextmanager
def run_display(console: Console) -> Iterator[Callable[[Snapshot], None]]:
    """A progress bar of a run; yields the driver's display, which shows a snapshot."""
    bar = Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("ETA", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn(  # last, as it is what a narrow terminal cuts
            "{task.fields[note]}",
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        expand=True,
        console=console,
        speed_estimate_period=300,
        disable=not console.is_terminal,
    )
    with bar:
        yield _RunDisplay(console, bar)


@contextmanager
def counter(label: str) -> Iterator[Callable[[int], None]]:
    """Count on a terminal, and nowhere else; yields a function that adds to the count.

    Args:
        label: Name of the counted things.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.completed:,.0f} " + label),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(label, total=None)
    with bar:
        yield lambda count: bar.advance(task, count)


class _RunDisplay:
    """Shows snapshots of a run."""

    def __init__(self, console: Console, bar: Progress) -> None:
        self._console = console
        self._bar = bar
        self._task = bar.add_task("starting", total=None, note="")
        self._first: tuple[float, int] | None = None
        self._logged = 0.0

    def __call__(self, snapshot: Snapshot) -> None:
        note = f"rows  {self._note(snapshot)}"
        self._bar.update(
            self._task,
            description=snapshot.phase,
            total=snapshot.total_rows or None,
            completed=snapshot.rows,
            note=note,
        )
        now = time.monotonic()
        if not self._console.is_terminal and now - self._logged >= LOG_SECONDS:
            self._logged = now
            rows = f"{snapshot.rows} of {snapshot.total_rows} {note}" if snapshot.total_rows else ""
            self._console.print(f"{snapshot.phase}  {rows}", soft_wrap=True)

    def _note(self, snapshot: Snapshot) -> str:
        now = time.monotonic()
        if self._first is None and snapshot.workers:
            self._first = (now, snapshot.rows)
        started, rows = self._first or (now, snapshot.rows)
        speed = (snapshot.rows - rows) / (now - started) if now > started else 0.0
        parts = [f"{speed:.1f}/s", f"{snapshot.workers} workers"]
        if snapshot.visual_tokens_full:
            kept = snapshot.visual_tokens_kept / snapshot.visual_tokens_full
            parts.append(f"{1 - kept:.0%} of visual tokens dropped")
        if snapshot.bad_answers:
            parts.append(f"{snapshot.bad_answers} errors")
        if snapshot.dead_shards:
            parts.append(f"{snapshot.dead_shards} dead shards")
        return ", ".join(parts)


def print_outcome(console: Console, outcome: Outcome, output: str, retry_round: int = 0) -> None:
    """Print the table at the end of a run, its failures, and the command that retries them.

    Args:
        console: Prints it.
        outcome: Outcome of the run.
        output: Directory or URL.
        retry_round: Number of the retry that ended; 0 for the run itself.
    """
    title = "/".join(filter(None, (output.rstrip("/"), object_name(retry_round))))
    table = Table("", "", title=escape(f"gc2ray: {title}"), show_header=False)
    lines = (*_row_lines(outcome), *_cost_lines(outcome.stats), *_usage_lines(outcome.usage))
    for name, value in lines:
        table.add_row(name, value)
    console.print(table)
    if not outcome.is_complete:
        missing = outcome.planned_rows - outcome.rows
        again = "run gc2ray retry again" if retry_round else "run the job again"
        console.print(f"[bold red]{missing} rows are not committed[/]; {again} to resume")
    for dead_letter in outcome.dead[:MAX_DEAD_LETTERS]:
        console.print(f"  {_plain(dead_letter)}", markup=False, soft_wrap=True)
    _print_failures(console, outcome, output, is_retry=retry_round > 0)


def _print_failures(console: Console, outcome: Outcome, output: str, *, is_retry: bool) -> None:
    judged = outcome.judged
    if not outcome.errors or (judged is not None and not judged.failed):
        return
    console.print("first failed answers:")
    for error in outcome.errors:
        console.print(f"  {_plain(error)}", markup=False, soft_wrap=True)
    if judged is not None and judged.is_too_many:
        console.print(
            f"{judged}; cluster.max_bad_rows=1 accepts any share", style="red", soft_wrap=True
        )
    if is_retry:  # another retry would most likely end as this one did
        console.print(f"answers that failed again: {outcome.stats.bad_rows:,}", soft_wrap=True)
    elif outcome.is_complete:
        command = shlex.join(["gc2ray", "retry", output])
        console.print(f"to answer them again: {command}", markup=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Text of an input on one line, without control codes of terminals."""
    printable = "".join(c if c.isprintable() else " " for c in text[:MAX_ERROR])
    return printable if len(text) <= MAX_ERROR else f"{printable} … ({len(text):,} characters)"


def print_verdict(console: Console, verdict: Verdict, output: str) -> None:
    """Print what an output holds, and the problems found."""
    table = Table("round", "shards", "rows", "answers", "errors among them")
    table.title = escape(output)
    for checked in verdict.rounds:
        plan, stats = checked.round.plan, checked.stats
        table.add_row(
            str(checked.round.number),
            f"{checked.committed.sum():,} of {len(plan.shards):,}",
            f"{checked.rows:,} of {plan.rows:,}",
            f"{stats.rows:,}",
            f"{stats.bad_rows:,}",
        )
    console.print(table)
    for line in verdict.notes:
        console.print(f"note: {line}", markup=False, soft_wrap=True)
    for line in verdict.problems[:MAX_PROBLEMS]:
        console.print(line, markup=False, soft_wrap=True)
    more = len(verdict.problems) - MAX_PROBLEMS
    if more > 0:
        console.print(f"and {more:,} more")
    answered = f"{verdict.rows:,} of {verdict.planned_rows:,} planned rows are answered"
    color, word = ("red", "damaged") if verdict.damage else ("yellow", "incomplete")
    if not verdict.problems:
        color, word = "green", "complete"
    console.print(f"[bold {color}]{word}[/]: {answered}", soft_wrap=True)
    for checked in verdict.rounds[1:]:
        if checked.waiting.any():
            line = f"retry round {checked.round.number} is not finished; to resume it: "
            command = shlex.join(["gc2ray", "retry", output])
            console.print(f"{line}{command}", markup=False, soft_wrap=True)


def _row_lines(outcome: Outcome) -> list[tuple[str, str]]:
    stats = outcome.stats
    bad = [f"{count} {status}" for status, count in stats.by_status.items() if status != "ok"]
    return [
        ("rows committed", f"{outcome.rows:,} of {outcome.planned_rows:,}"),
        ("answers", f"{stats.rows:,}"),
        ("errors among them", f"{stats.bad_rows:,}" + (f" ({', '.join(bad)})" if bad else "")),
        *([("blank answers", f"{stats.empty_answers:,}")] if stats.empty_answers else []),
    ]


def _cost_lines(stats: RunStats) -> list[tuple[str, str]]:
    lines = [
        ("visual tokens", _change(stats.visual_tokens_full, stats.visual_tokens_kept)),
        ("newline tokens", _change(stats.newline_tokens_full, stats.newline_tokens)),
        ("KV cache bytes", _change(stats.kv_bytes_full, stats.kv_bytes)),
        ("output tokens", f"{stats.output_tokens:,}"),
    ]
    lines += [
        (f"seconds, {stage}", f"{stats.stage_ns.get(stage, 0) / 1e9:.2f}") for stage in STAGES
    ]
    lines.append(("seconds, waiting for input", f"{stats.input_starved_ns / 1e9:.2f}"))
    if stats.images_shared:
        lines.append(("images shared by rows", f"{stats.images_shared:,}"))
        lines.append(("prompt tokens shared", f"{stats.prompt_tokens_shared:,}"))
    if stats.oom_splits:
        lines.append(("batches split for memory", f"{stats.oom_splits:,}"))
    lines.append(("peak host memory", f"{stats.peak_host_bytes / 2**20:,.0f} MiB"))
    if stats.peak_device_bytes:
        lines.append(("peak device memory", f"{stats.peak_device_bytes / 2**20:,.0f} MiB"))
    return lines


def _usage_lines(usage: Usage) -> list[tuple[str, str]]:
    """Device-seconds of all workers from start to end, useful and wasted."""
    total = usage.total_seconds
    if not total:
        return []
    useful = usage.seconds_for(UsageKind.USEFUL)
    wasted = {use: seconds for use, seconds in usage.seconds.items() if use != UsageKind.USEFUL}
    causes = ", ".join(
        f"{use} {seconds:,.1f}" for use, seconds in wasted.items() if seconds >= 0.05
    )
    return [
        ("device seconds, useful", f"{useful:,.1f} of {total:,.1f} ({useful / total:.0%})"),
        ("device seconds, wasted", f"{total - useful:,.1f}" + (f" ({causes})" if causes else "")),
    ]


def _change(full: int, kept: int) -> str:
    share = f" ({kept / full:.1%} kept)" if full else ""
    return f"{full:,} -> {kept:,}{share}"


class Terminal:
    """Shows people what the functions of `gc2ray` return.

    Args:
        console: Where to; None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()

    def line(self, text: str) -> None:
        """Show a line as it is, however long."""
        self._console.print(text, markup=False, soft_wrap=True)

    def display(self) -> AbstractContextManager[Callable[[Snapshot], None]]:
        """A progress bar for `run` and `retry`."""
        return run_display(self._console)

    def counter(self, label: str) -> AbstractContextManager[Callable[[int], None]]:
        """A counter on standard error for a `progress` argument."""
        return counter(label)

    def outcome(self, outcome: Outcome, output: str) -> None:
        """How a run ended."""
        print_outcome(self._console, outcome, output)

    def retried(self, retried: Retried, output: str) -> None:
        """How a retry ended, or that there was nothing to retry."""
        if retried.outcome is not None:
            print_outcome(self._console, retried.outcome, output, retried.retry_round or 0)
            return
        self.line(f"{output}: no row has to be answered again")
        if retried.judged.is_too_many:
            self._console.print(str(retried.judged), soft_wrap=True)

    def status(self, status: RunStatus, output: str) -> None:
        """How far a run is, and who works on it."""
        outcome = status.outcome
        self._console.print(f"{outcome.shards} of {outcome.planned_shards} shards committed")
        print_outcome(self._console, outcome, output)
        self._console.print(_worker_table(status.workers))

    def verdict(self, verdict: Verdict, output: str) -> None:
        """What an output holds, and what is wrong with it."""
        print_verdict(self._console, verdict, output)

    def estimate(self, estimate: Estimate, job: Job) -> None:
        """What a run would cost."""
        from gc2ray.reporting.terminal_tables import print_estimate

        print_estimate(self._console, estimate, job)

    def tuning(self, tuning: Tuning) -> None:
        """What was measured, and what follows."""
        from gc2ray.reporting.terminal_tables import print_tuning

        print_tuning(self._console, tuning)

    def parity(self, parity: Parity) -> None:
        """How far answers are those of stock transformers."""
        from gc2ray.reporting.terminal_tables import print_parity

        print_parity(self._console, parity)

    def models(self, supported: SupportedModels) -> None:
        """Which models are supported, or why some are not."""
        from gc2ray.reporting.terminal_tables import print_models

        print_models(self._console, supported)

    def written(self, written: WrittenReport) -> None:
        """Where a report is, and the dataset cards."""
        self.line(f"{written.to}/report.html, .md, .json")
        for card in written.cards:
            self.line(card)
        for card in written.foreign_cards:
            self.line(f"{card} was not written by gc2ray, and stays as it is")

    def dataset(self, dataset: Dataset, destination: str) -> None:
        """What `compact` wrote."""
        files = len(dataset.files)
        self.line(
            f"{dataset.answers:,} answers to {dataset.rows:,} rows, {dataset.failed:,} of them "
            f"failed, in {files:,} {'file' if files == 1 else 'files'}: {destination}"
        )

    def evaluation(self, evaluation: Evaluation) -> None:
        """How good answers are."""
        from gc2ray.reporting.terminal_tables import print_evaluation

        print_evaluation(self._console, evaluation)


def _worker_table(records: Iterable[WorkerRecord]) -> Table:
    """A table of worker processes; text too long for its column continues in the next line."""
    table = Table(title="worker processes so far (UTC)")
    names = ("node", "pid", "device")
    times = ("started", "loaded", "last_seen")
    for name in names:
        table.add_column(name, overflow="fold", min_width=4)
    for name in times:
        table.add_column(name, overflow="fold", min_width=10)  # of a date
    for record in records:
        cells = [str(getattr(record, name)) for name in names]
        table.add_row(*map(escape, cells + [_seconds(getattr(record, name)) for name in times]))
    return table


def _seconds(time: datetime | None) -> str:
    """A time of a record, to the second."""
    return "None" if time is None else f"{time:%Y-%m-%d %H:%M:%S}"
