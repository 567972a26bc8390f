"""A run's numbers as tables of texts, for a page and for a text alike.

Not covered: drawings (`gc2ray.report.charts`); how tables are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gc2ray.core.format import duration, money, percent, precise, short, shown, size
from gc2ray.report.costs import HOUR
from gc2ray.report.summary import AuditSummary, BeforeAfter, Summary

STAGES = {
    "image": "decode images (on threads)",
    "encode": "vision tower",
    "compress": "compress, project",
    "prefill": "prefill",
    "generate": "decode",
}
"""How people are told stages."""
HALF_PAGE = 40
"""Characters, beside those of a first column."""


@dataclass(frozen=True)
class Table:
    """A table of texts, and whether all columns but the first are numbers."""

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
    """All of a run's; some have no rows."""
    statuses = sorted(summary.by_status.items(), key=lambda item: (item[0] != "ok", -item[1]))
    counts = [[status, f"{count:,}"] for status, count in statuses]
    if summary.empty_answers:
        counts.append(["ok, but blank", f"{summary.empty_answers:,}"])
    yield Table("Answers by status", ["status", "answers"], counts)
    yield _round_table(summary)
    yield _token_table(summary)
    yield _memory_table(summary)
    yield Table(
        "Operations",
        ["stage", "before", "after", "share"],
        [_change_row(STAGES[s], c) for s, c in summary.flops.items() if c.full],
        "Matrix products only, as gc2ray runs them; the tower reads every image whatever is kept.",
    )
    yield _time_table(summary)
    yield from _money_tables(summary)
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
        [[key, size(kv_bytes)] for kv_bytes, key in summary.largest if kv_bytes],
    )
    more = summary.letter_count - len(summary.letters)
    yield Table(
        "Dead letters",
        ["shard", "why it was given up"],
        [list(letter) for letter in summary.letters],
        f"and {more:,} more" if more else "",
        numbers=False,
    )


def _round_table(summary: Summary) -> Table:
    """Of a run that was retried; of others it has no rows."""
    found = [
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
    return Table("Generations", head, found if len(found) > 1 else [])


def _audit_tables(audit: AuditSummary) -> Iterator[Table]:
    yield Table(
        "Audited rows that were answered anew",
        ["retention of their answer now", "rows", "of them same as uncompressed"],
        [[f"{rung.retention:g}", f"{rung.rows:,}", f"{rung.agreed:,}"] for rung in audit.rungs],
        "Those whose answers disagreed, at rising retentions, until one agreed.",
    )
    yield Table(
        "Audited rows that differ most",
        ["row", "similarity"],
        [[key, f"{similarity:.3f}"] for similarity, key in audit.least],
        "gc2ray report OUTPUT --show 4 draws what was kept of the first four.",
    )


def _token_table(summary: Summary) -> Table:
    thumbnail, *crops = summary.views or (BeforeAfter(0, 0),)
    all_crops = BeforeAfter(sum(c.full for c in crops), sum(c.kept for c in crops))
    text = summary.prompt_tokens - summary.visual.kept - summary.newlines.kept
    rows = [
        _change_row("visual tokens", summary.visual),
        *([_change_row("of the thumbnails", thumbnail)] if thumbnail.full else []),
        *([_change_row("of the crops", all_crops)] if all_crops.full else []),
        *(_change_row(f"of crop {place}", crop) for place, crop in enumerate(crops, 1)),
        _change_row("newline tokens", summary.newlines),
        ["text tokens", short(text), short(text), ""],
        ["output tokens", short(summary.output_tokens), short(summary.output_tokens), ""],
    ]
    note = ""
    if summary.images_shared:
        note = (
            f"{summary.images_shared:,} answers shared an image that another had brought, and "
            f"{short(summary.prompt_tokens_shared)} prompt tokens."
        )
    return Table("Tokens", ["", "before", "after", "share"], rows, note)


def _memory_table(summary: Summary) -> Table:
    rows = [["KV cache of all answers", *_change_cells(summary.kv_bytes, size)]]
    if summary.peak_device_bytes:
        rows.append(["largest device allocation", "", size(summary.peak_device_bytes), ""])
    if summary.peak_host_bytes:
        rows.append(["largest worker process", "", size(summary.peak_host_bytes), ""])
    return Table("Memory", ["", "before", "after", "share"], rows)


def _time_table(summary: Summary) -> Table:
    seconds = summary.stage_seconds
    rows = [[STAGES[stage], duration(spent / HOUR)] for stage, spent in seconds.items()]
    rows.append(
        ["starved: nothing to do, rows to come", duration(summary.input_starved_seconds / HOUR)]
    )
    note = "Busy time of all workers; stages overlap on a GPU."
    if summary.rows_a_step:
        note += f" {precise(summary.rows_a_step)} rows were decoded together on average."
    return Table("Time by stage", ["stage", "busy"], rows, note)


def _money_tables(summary: Summary) -> Iterator[Table]:
    total = summary.device_seconds
    price = summary.usd / total if summary.usd is not None and total else None
    yield Table(
        "Where device time went",
        ["use", "time", "share", *(["cost"] if price is not None else [])],
        [
            [
                use,
                duration(seconds / HOUR),
                f"{seconds / total:.1%}",
                *([money(seconds * price)] if price is not None else []),
            ]
            for use, seconds in sorted(summary.bill.items(), key=lambda item: -item[1])
        ],
        "Useful time led to a committed part; the rest is waste, by cause.",
    )
    yield Table(
        "Devices",
        ["device", "workers", "time", "price an hour"],
        [
            [d.device, str(d.workers), duration(d.seconds / HOUR), _price(d.usd_per_hour)]
            for d in summary.devices
        ],
        f"Prices: {summary.price}. Time from each worker's start until it was last seen.",
    )
    yield Table(
        "What if: the same answers on other devices",
        ["device", "device time", "on demand", "spot"],
        [
            [
                found.hardware,
                shown(found.device_hours, duration),
                *(
                    shown(found.usd[kind], money) if kind in found.usd else ""
                    for kind in ("on_demand", "spot")
                ),
            ]
            for found in summary.what_if
        ],
        "By each device's roofline, of which it is taken to reach the share that this run's device "
        "did, or else 25 % to 60 %. Answering only: no loading, no second looks.",
    )


def _change_row(name: str, change: BeforeAfter) -> list[str]:
    return [name, *_change_cells(change, short)]


def _change_cells(change: BeforeAfter, text: Callable[[float], str]) -> list[str]:
    return [text(change.full), text(change.kept), percent(change.share)]


def _price(usd: float | None) -> str:
    return "unknown" if usd is None else money(usd)
