"""What a person sees of a run: a progress bar while it goes, a table when it ends.

On a terminal the bar moves; in a log a line comes every half minute.
"""

from __future__ import annotations

import shlex
import time
from types import TracebackType
from typing import Self

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
from rich.table import Table

from gc2ray.core.stats import STAGES, RunStats
from gc2ray.core.usage import Usage, UsageKind
from gc2ray.output.planner import Outcome
from gc2ray.output.run_directory import object_name
from gc2ray.output.verify import Verdict
from gc2ray.runner.messages import Snapshot

LOG_SECONDS = 30.0
MAX_DEAD_LETTERS = 10
MAX_ERROR = 400
MAX_PROBLEMS = 20


class _Shown:
    """Something with a bar that is on the screen while it is entered."""

    _bar: Progress

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


class RunDisplay(_Shown):
    """Shows snapshots of a run; a context manager, and callable as the driver's display."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=300,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, note="")
        self._first: tuple[float, int] | None = None
        self._logged = 0.0

    def __call__(self, snapshot: Snapshot) -> None:
        """Show a snapshot."""
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
            parts.append(f"{1 - kept:.0%} of visual tokens saved")
        if snapshot.bad_answers:
            parts.append(f"{snapshot.bad_answers} errors")
        if snapshot.dead_shards:
            parts.append(f"{snapshot.dead_shards} dead shards")
        return ", ".join(parts)


class Counted(_Shown):
    """Counts on a terminal what somebody waits for, and nowhere else; a context manager.

    Args:
        what: Is counted.
    """

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.completed:,.0f} " + what),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=None)

    def add(self, count: int) -> None:
        """So many more."""
        self._bar.advance(self._task, count)


def print_outcome(console: Console, outcome: Outcome, output: str, retry_round: int = 0) -> None:
    """The table at the end of a run, what was given up, what failed, and what to do about it.

    Args:
        console: Where to.
        outcome: How it ended.
        output: Directory or URL.
        retry_round: 0, or the number of the retry in it whose end it is.
    """
    title = "/".join(filter(None, (output.rstrip("/"), object_name(retry_round))))
    table = Table("", "", title=escape(f"gc2ray: {title}"), show_header=False)
    lines = (*_row_lines(outcome), *_cost_lines(outcome.stats), *_bill_lines(outcome.usage))
    for name, value in lines:
        table.add_row(name, value)
    console.print(table)
    if not outcome.is_complete:
        missing = outcome.planned_rows - outcome.rows
        console.print(f"[bold red]{missing} rows are not committed[/]; rerun to try them again")
    for letter in outcome.dead[:MAX_DEAD_LETTERS]:
        console.print(f"  {_plain(letter)}", markup=False, soft_wrap=True)
    _print_failures(console, outcome, output)


def _print_failures(console: Console, outcome: Outcome, output: str) -> None:
    judged = outcome.judged
    if not outcome.errors or (judged is not None and not judged.failed):
        return
    console.print("the first answers that failed:")
    for error in outcome.errors:
        console.print(f"  {_plain(error)}", markup=False, soft_wrap=True)
    if judged is not None and judged.is_too_many:
        console.print(f"{judged}; cluster.max_bad_rows=1 accepts any", style="red", soft_wrap=True)
    if outcome.is_complete:
        command = shlex.join(["gc2ray", "retry", output])
        console.print(f"to answer them anew: {command}", markup=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Text of an input on one line, without codes that a terminal would follow."""
    shown = "".join(c if c.isprintable() else " " for c in text[:MAX_ERROR])
    return shown if len(text) <= MAX_ERROR else f"{shown} (and so on)"


def print_verdict(console: Console, verdict: Verdict, output: str) -> None:
    """What an output holds, and what is wrong with it."""
    table = Table("round", "shards", "rows", "answers", "of them errors")
    table.title = escape(output)
    for checked in verdict.rounds:
        plan, stats = checked.retry_round.plan, checked.stats
        table.add_row(
            str(checked.retry_round.number),
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
    color, word = ("red", "wrong") if verdict.damage else ("yellow", "incomplete")
    if not verdict.problems:
        color, word = "green", "whole"
    console.print(f"[bold {color}]{word}[/]: {answered}", soft_wrap=True)


def _row_lines(outcome: Outcome) -> list[tuple[str, str]]:
    stats = outcome.stats
    bad = [f"{count} {status}" for status, count in stats.by_status.items() if status != "ok"]
    return [
        ("rows committed", f"{outcome.rows:,} of {outcome.planned_rows:,}"),
        ("answers", f"{stats.rows:,}"),
        ("of them errors", f"{stats.bad_rows:,}" + (f" ({', '.join(bad)})" if bad else "")),
        *([("of them blank", f"{stats.empty_answers:,}")] if stats.empty_answers else []),
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
    lines.append(("seconds, starved", f"{stats.input_starved_ns / 1e9:.2f}"))
    if stats.images_shared:
        lines.append(("images shared", f"{stats.images_shared:,}"))
        lines.append(("prompt tokens shared", f"{stats.prompt_tokens_shared:,}"))
    if stats.oom_splits:
        lines.append(("short of memory", f"{stats.oom_splits:,} times"))
    lines.append(("peak host memory", f"{stats.peak_host_bytes / 2**20:,.0f} MiB"))
    if stats.peak_device_bytes:
        lines.append(("peak device memory", f"{stats.peak_device_bytes / 2**20:,.0f} MiB"))
    return lines


def _bill_lines(bill: Usage) -> list[tuple[str, str]]:
    """Seconds of all workers' devices, from when each worker was up until it ended."""
    total = bill.total_seconds
    if not total:
        return []
    useful = bill.of(UsageKind.USEFUL)
    wasted = {use: seconds for use, seconds in bill.seconds.items() if use != UsageKind.USEFUL}
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
