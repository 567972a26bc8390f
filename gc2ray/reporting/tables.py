"""The figures of a run as tables of texts, for the page and for Markdown.

Not covered: charts (`gc2ray.reporting.charts`); the layout of tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gc2ray.core.arguments import PriceKind
from gc2ray.core.format import (
    duration,
    interval_text,
    money,
    percent,
    precise,
    seconds_text,
    short,
    size,
)
from gc2ray.reporting.costs import Costs
from gc2ray.reporting.summary import AuditSummary, BeforeAfter, Summary

STAGE_LABELS = {
    "image": "decode images (on threads)",
    "encode": "vision tower",
    "compress": "compress, project",
    "prefill": "prefill",
    "generate": "decode",
}
"""Stages by name, for people."""
HALF_PAGE = 40
"""Characters of a table's columns beside the first."""


@dataclass(frozen=True)
class Table:
    """A table of texts; `numbers` says whether all columns but the first are numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    numbers: bool = True

    @property
    def is_wide(self) -> bool:
        """Whether half a page is too narrow for its numbers, which are not broken."""
        _, *columns = zip(self.head, *self.rows, strict=True)
        return self.numbers and sum(max(map(len, column)) for column in columns) > HALF_PAGE


def tables(summary: Summary) -> Iterator[Table]:
    """All tables of a run; some have no rows."""
    stats = summary.stats
    statuses = sorted(stats.by_status.items(), key=lambda item: (item[0] != "ok", -item[1]))
    counts = [[status, f"{count:,}"] for status, count in statuses]
    if stats.empty_answers:
        counts.append(["ok, but blank", f"{stats.empty_answers:,}"])
    yield Table("Answers by status", ["status", "answers"], counts)
    yield _round_table(summary)
    yield _token_table(summary)
    yield _memory_table(summary)
    yield Table(
        "Operations",
        ["stage", "before", "after", "share"],
        [_change_row(STAGE_LABELS[s], c) for s, c in summary.flops.items() if c.full],
        "Matrix products only, as gc2ray runs them; the vision tower reads whole images whatever "
        "is kept.",
    )
    yield _time_table(summary)
    yield from _cost_tables(summary.costs)
    if summary.audit is not None:
        yield from _audit_tables(summary.audit)
    yield Table(
        "Slowest rows",
        ["row", "busy seconds"],
        [[key, precise(seconds)] for seconds, key in summary.slowest],
    )
    yield Table(
        "Largest rows",
        ["row", "KV cache"],
        [[key, size(kv_bytes)] for kv_bytes, key in stats.largest if kv_bytes],
    )
    more = summary.dead_letter_count - len(summary.dead_letters)
    yield Table(
        "Dead letters",
        ["shard", "reason"],
        [list(letter) for letter in summary.dead_letters],
        f"and {more:,} more" if more else "",
        numbers=False,
    )


def _round_table(summary: Summary) -> Table:
    """A row for each round of a run that was retried; no rows otherwise."""
    rows = [
        [
            "run" if one.number == 0 else f"retry {one.number}",
            f"{one.rows:,} of {one.planned_rows:,}",
            f"{one.parts:,}",
            f"{one.by_status.get('ok', 0):,}",
            f"{sum(one.by_status.values()) - one.by_status.get('ok', 0):,}",
        ]
        for one in summary.rounds
    ]
    head = ["round", "rows", "parts", "ok", "errors"]
    return Table("Retry rounds", head, rows if len(rows) > 1 else [])


def _audit_tables(audit: AuditSummary) -> Iterator[Table]:
    yield Table(
        "Audited rows that were answered again",
        ["final retention", "rows", "same as uncompressed"],
        [[f"{step.retention:g}", f"{step.rows:,}", f"{step.agreed:,}"] for step in audit.steps],
        "Rows whose answer differed were answered at rising retentions until one agreed.",
    )
    yield Table(
        "Audited rows that differ most",
        ["row", "similarity"],
        [[key, f"{similarity:.3f}"] for similarity, key in audit.least_similar],
        "`gc2ray report OUTPUT --show 4` draws the kept tokens of the first four.",
    )


def _token_table(summary: Summary) -> Table:
    thumbnail, *crops = summary.views or (BeforeAfter(0, 0),)
    all_crops = BeforeAfter(sum(c.full for c in crops), sum(c.kept for c in crops))
    stats = summary.stats
    text = stats.prompt_tokens - summary.visual.kept - summary.newlines.kept
    rows = [
        _change_row("visual tokens", summary.visual),
        *([_change_row("of the thumbnails", thumbnail)] if thumbnail.full else []),
        *([_change_row("of the crops", all_crops)] if all_crops.full else []),
        *(_change_row(f"of crop {index}", crop) for index, crop in enumerate(crops, 1)),
        _change_row("newline tokens", summary.newlines),
        ["text tokens", short(text), short(text), ""],
        ["output tokens", short(stats.output_tokens), short(stats.output_tokens), ""],
    ]
    note = ""
    if stats.images_shared:
        note = (
            f"{stats.images_shared:,} images and {short(stats.prompt_tokens_shared)} prompt tokens "
            "were those of another row, and not computed again."
        )
    return Table("Tokens", ["", "before", "after", "share"], rows, note)


def _memory_table(summary: Summary) -> Table:
    rows = [["KV cache of all answers", *_change_cells(summary.kv_bytes, size)]]
    stats = summary.stats
    if stats.peak_device_bytes:
        rows.append(["largest device allocation", "", size(stats.peak_device_bytes), ""])
    if stats.peak_host_bytes:
        rows.append(["largest worker process", "", size(stats.peak_host_bytes), ""])
    return Table("Memory", ["", "before", "after", "share"], rows)


def _time_table(summary: Summary) -> Table:
    seconds = {**summary.stage_seconds, "waiting": summary.input_starved_seconds}
    labels = STAGE_LABELS | {"waiting": "waiting for input"}
    rows = [[labels[stage], seconds_text(spent)] for stage, spent in seconds.items()]
    note = "Sum over all workers; stages overlap on a GPU."
    if summary.rows_a_step:
        note += f" {precise(summary.rows_a_step)} rows were decoded together on average."
    return Table("Time by stage", ["stage", "busy"], rows, note)


def _cost_tables(costs: Costs) -> Iterator[Table]:
    yield _use_table(costs)
    yield Table(
        "Devices",
        ["device", "workers", "time", "price an hour"],
        [
            [d.device, str(d.workers), seconds_text(d.seconds), _price(d.usd_per_hour)]
            for d in costs.devices
        ],
        f"Prices: {costs.price}. Time from each worker's start until it was last seen.",
    )
    yield _what_if_table(costs)


def _use_table(costs: Costs) -> Table:
    total = costs.device_seconds
    price = costs.usd / total if costs.usd is not None and total else None
    uses = sorted(costs.device_seconds_by_use.items(), key=lambda item: -item[1])
    return Table(
        "Device time by use",
        ["use", "time", "share", *(["cost"] if price is not None else [])],
        [
            [
                use,
                seconds_text(seconds),
                f"{seconds / total:.1%}",
                *([money(seconds * price)] if price is not None else []),
            ]
            for use, seconds in uses
        ],
        "Useful time led to committed parts; the rest is waste, by cause.",
    )


def _what_if_table(costs: Costs) -> Table:
    kinds = [kind for kind in PriceKind if any(kind in item.usd for item in costs.what_if)]
    return Table(
        "What if: the same answers on other devices",
        ["device", "device time", *(kind.replace("_", " ") for kind in kinds)],
        [
            [
                item.hardware,
                interval_text(item.device_hours, duration),
                *(
                    interval_text(item.usd[kind], money) if kind in item.usd else ""
                    for kind in kinds
                ),
            ]
            for item in costs.what_if
        ],
        "From each device's roofline: of it, a device is assumed to reach the share that the "
        "device of this run reached, or else 25 % to 60 %. Answering only, without loading and "
        "audits.",
    )


def _change_row(name: str, change: BeforeAfter) -> list[str]:
    return [name, *_change_cells(change, short)]


def _change_cells(change: BeforeAfter, text: Callable[[float], str]) -> list[str]:
    return [text(change.full), text(change.kept), percent(change.share)]


def _price(usd: float | None) -> str:
    return "unknown" if usd is None else money(usd)
