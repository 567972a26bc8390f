"""The report of one run, or of several side by side: a page, a text for people, JSON for programs.

All three say the same numbers, those of `Summary`. The page is one file: no script, no request to
anywhere (its own policy forbids both), drawings inline. What comes from rows and users (keys,
reasons, paths) is escaped.

Not covered: answers themselves.
"""

from __future__ import annotations

import json
import posixpath
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
import yaml

from gc2ray import __version__
from gc2ray.core.format import duration, money, percent, precise, short, size
from gc2ray.core.intervals import Interval
from gc2ray.report import charts
from gc2ray.report.costs import HOUR
from gc2ray.report.heat_map import TokenMap, panels
from gc2ray.report.summary import Summary
from gc2ray.report.tables import STAGES, Table, tables

TEMPLATES = Path(__file__).with_name("templates")
KWH_JOULES = 3.6e6


@dataclass(frozen=True)
class Line:
    """A sentence, and whether it is `good`, `bad` or neither."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing of ours, with its caption."""

    title: str
    svg: str


@dataclass(frozen=True)
class Picture:
    """A row that was looked at again.

    Attributes:
        captions: What it is about, the row first.
        panels: What each of its pictures shows, and the picture as a `data:` URI.
    """

    captions: Sequence[str]
    panels: Sequence[tuple[str, str]]

    @staticmethod
    def from_token_map(looked: TokenMap) -> Picture:
        """With its pictures drawn."""
        drawn = [
            (panel.title, f"data:image/webp;base64,{b64encode(panel.webp).decode()}")
            for panel in panels(looked)
        ]
        return Picture(looked.captions, drawn)


@dataclass(frozen=True)
class RunView:
    """A run as it is told.

    Attributes:
        summary: Its numbers.
        name: Short.
        when: From when to when.
        tiles: The most important numbers: what, how much.
        verdicts: What follows from them.
        tables: All of them.
        charts: Drawings; the text has none.
        pictures: Rows that were looked at again; likewise.
        recipe: As YAML.
    """

    summary: Summary
    name: str
    when: str
    tiles: Sequence[tuple[str, str]]
    verdicts: Sequence[Line]
    tables: Sequence[Table]
    charts: Sequence[Chart]
    pictures: Sequence[Picture]
    recipe: str


@dataclass(frozen=True)
class Report:
    """The three forms of a report."""

    html: str
    markdown: str
    json: str


def report(
    summaries: Sequence[Summary], pictures: Mapping[str, Sequence[Picture]] | None = None
) -> Report:
    """Tell runs, the first one first.

    Args:
        summaries: Their numbers.
        pictures: By output, rows that were looked at again.
    """
    names = _names([summary.output for summary in summaries])
    shown = [(pictures or {}).get(summary.output, ()) for summary in summaries]
    runs = [_view(*one) for one in zip(summaries, names, shown, strict=True)]
    title = names[0] if len(names) == 1 else f"{len(names)} runs side by side"
    told = {"title": title, "version": __version__, "runs": runs, "compared": _compared(runs)}
    found = templates()
    document = {"version": __version__, "runs": [asdict(summary) for summary in summaries]}
    return Report(
        html=found.get_template("report.html.j2").render(told),
        markdown=found.get_template("report.md.j2").render(told),
        json=json.dumps(document, default=str, indent=1),
    )


def templates() -> jinja2.Environment:
    """Pages escape everything; texts escape with `markdown_text`, cell by cell."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = markdown_text
    environment.filters["figures"] = figures_text
    return environment


def figures_text(value: str) -> str:
    """Numbers that break between those of a range only, where there is no room for it."""
    return re.sub(r" (?!\(|to )", "\N{NO-BREAK SPACE}", value)


def markdown_text(value: object) -> str:
    """Text that Markdown, and HTML within it, show as it is, on one line."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def _names(outputs: Sequence[str]) -> list[str]:
    """Last parts of paths, as many as make them differ."""
    parts = [[part for part in output.rstrip("/").split("/") if part] for output in outputs]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = [posixpath.join(*found[-length:]) for found in parts]
        if len(set(names)) == len(names):
            return names
    return list(outputs)


# -------------------------------------------------------------------------------------- one run


def _view(summary: Summary, name: str, pictures: Sequence[Picture]) -> RunView:
    recipe = yaml.safe_dump(dict(summary.recipe), sort_keys=False, allow_unicode=True)
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    return RunView(
        summary=summary,
        name=name,
        when=_when(summary),
        tiles=list(_tiles(summary)),
        verdicts=list(_verdicts(summary)),
        tables=[table for table in tables(summary) if table.rows],
        charts=list(_charts(summary)),
        pictures=pictures,
        recipe=f"{recipe}# {versions}",
    )


def _when(summary: Summary) -> str:
    if summary.started is None or summary.ended is None:
        return ""
    hours = (summary.ended - summary.started).total_seconds() / HOUR
    return f"{summary.started:%Y-%m-%d %H:%M} UTC, for {duration(hours)}"


def _tiles(summary: Summary) -> Iterator[tuple[str, str]]:
    first = summary.rounds[0]
    yield "rows committed", f"{first.rows:,} of {first.planned_rows:,}"
    share = summary.errors / summary.answers if summary.answers else 0.0
    yield f"errors among {summary.answers:,} answers", f"{summary.errors:,} ({share:.2%})"
    yield "of the visual tokens kept", percent(summary.visual.share)
    yield "of the KV cache used", percent(summary.kv_bytes.share)
    yield "of the operations done", percent(summary.operations.share)
    if summary.device_seconds:
        yield "device time", duration(summary.device_seconds / HOUR)
        yield "of it useful", percent(summary.useful_share)
    if summary.usd is not None:
        yield f"in all, {summary.price}", money(summary.usd)
    if summary.usd_per_1000 is not None:
        yield "per 1,000 images", money(summary.usd_per_1000)
    if summary.audit is not None:
        yield "of audited answers unchanged", percent(summary.audit.agreed.mid)
    if summary.energy_joules:
        yield "energy of the devices", f"{precise(summary.energy_joules / KWH_JOULES)} kWh"


def _verdicts(summary: Summary) -> Iterator[Line]:
    first = summary.rounds[0]
    missing = first.planned_rows - first.rows
    if missing:
        yield Line(f"{missing:,} planned rows are not committed; run again to go on.", "bad")
    saved, answering = summary.saved_seconds, summary.answering_seconds
    if saved is None or summary.visual.share is None:
        return
    if summary.visual.share == 1:
        yield Line("Nothing was compressed in this run.")
    elif answering:
        of_full = Interval(*(s / (s + answering) for s in (saved.low, saved.mid, saved.high)))
        text = (
            f"Compression saved about {duration(saved.mid / HOUR)} of device time "
            f"({duration(saved.low / HOUR)} to {duration(saved.high / HOUR)}), "
            f"{of_full.mid:.0%} ({of_full.low:.0%} to {of_full.high:.0%}) of what answering would "
            "have taken without it: an estimate from operations, not a measurement."
        )
        yield Line(text, "good" if of_full.low > 0.05 else "")
        yield _audit_line(summary)


def _audit_line(summary: Summary) -> Line:
    audit = summary.audit
    if audit is None:
        return Line(
            "What it did to the answers is not known: no row was answered uncompressed, too "
            "(recipe.audit.share)."
        )
    agreed = audit.agreed
    text = (
        f"Of {audit.audits:,} rows that were answered uncompressed, too, {agreed.mid:.1%} "
        f"({agreed.low:.1%} to {agreed.high:.1%}) were given the same answer; mean similarity "
        f"{audit.similarity:.3f}."
    )
    if audit.slowdown is not None:
        text += (
            f" Those took {audit.slowdown:.2f} times as long on the device, in the same batches as "
            "compressed ones."
        )
    if audit.rungs:
        anew, agreed_now = (sum(getattr(r, of) for r in audit.rungs) for of in ("rows", "agreed"))
        text += (
            f" {anew:,} that differed were answered anew with more visual tokens; {agreed_now:,} "
            "of them agree now."
        )
    text += f" All of it took {audit.share_of_time:.1%} of the time in which devices answered."
    return Line(text)


def _charts(summary: Summary) -> Iterator[Chart]:
    views = {
        "thumbnail" if place == 0 else f"crop {place}": change
        for place, change in enumerate(summary.views)
    }
    if views:
        title = "Visual tokens by view"
        yield Chart(title, charts.changes(title, "tokens", views))
    if sum(summary.retention):
        title = "Actual retention"
        yield Chart(title, charts.retention(title, summary.retention))
    if summary.flops:
        title = "Operations by stage"
        told = {STAGES[stage].split(",")[0]: change for stage, change in summary.flops.items()}
        yield Chart(title, charts.changes(title, "operations", told))
    title = "Busy seconds by stage"
    told_seconds = {STAGES[s].split(" (")[0]: n for s, n in summary.stage_seconds.items()}
    yield Chart(title, charts.bars(title, "seconds", told_seconds))
    if len(summary.throughput) > 1:
        title = "Throughput"
        yield Chart(title, charts.over_time(title, summary.throughput))
    if summary.bill:
        title = "Device time by use"
        yield Chart(title, charts.bars(title, "seconds", summary.bill))


# --------------------------------------------------------------------------------- side by side


def _compared(runs: Sequence[RunView]) -> Table:
    rows: dict[str, list[str]] = {}
    for place, run in enumerate(runs):
        for name, value in _comparable(run.summary).items():
            rows.setdefault(name, [""] * len(runs))[place] = value
    found = [[name, *values] for name, values in rows.items()]
    return Table("Side by side", ["", *(run.name for run in runs)], found)


def _comparable(summary: Summary) -> Mapping[str, str]:
    each = max(1, summary.answers)
    found = {
        "method, retention": f"{summary.method}, {summary.retention_requested:g}",
        "answers": f"{summary.answers:,}",
        "errors": f"{summary.errors:,}",
        "blank answers": f"{summary.empty_answers:,}",
        "visual tokens an answer": precise(summary.visual.kept / each),
        "prompt tokens an answer": precise(summary.prompt_tokens / each),
        "output tokens an answer": precise(summary.output_tokens / each),
        "KV cache an answer": size(summary.kv_bytes.kept // each),
        "operations an answer": short(summary.operations.kept / each),
        "device time": duration(summary.device_seconds / HOUR),
        "of it useful": percent(summary.useful_share),
    }
    if summary.answering_seconds:
        each_second = summary.answers / summary.answering_seconds
        found["answers a device-second of answering"] = precise(each_second)
    if summary.usd_per_1000 is not None:
        found["per 1,000 images"] = money(summary.usd_per_1000)
    if summary.audit is not None:
        found["audited answers unchanged"] = percent(summary.audit.agreed.mid)
    if summary.energy_joules:
        found["joules an answer"] = precise(summary.energy_joules / each)
    return found
