"""The report of one run, or of several side by side: a page, Markdown, and JSON for programs.

All three show the figures of `Summary`; the JSON document holds `Summary.to_dict` of each run. The
page is one self-contained file without scripts and network requests (its own policy forbids both),
with charts inline. Text from rows and users (keys, reasons, paths) is escaped.

Not covered: the answers themselves.
"""

from __future__ import annotations

import json
import posixpath
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from gc2ray.core.format import money, percent, precise, seconds_text, short, size
from gc2ray.core.intervals import Interval
from gc2ray.core.version import __version__
from gc2ray.reporting import charts
from gc2ray.reporting.heat_map import TokenMap, panels
from gc2ray.reporting.summary import Summary
from gc2ray.reporting.tables import STAGE_LABELS, Table, tables

TEMPLATES = Path(__file__).with_name("templates")
KWH_JOULES = 3.6e6


@dataclass(frozen=True)
class Line:
    """A sentence, and whether it is `good`, `bad` or neither."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart of ours, with its caption."""

    title: str
    svg: str


@dataclass(frozen=True)
class RowImages:
    """The token map of a row, drawn.

    Attributes:
        captions: Lines about the row, its key first.
        panels: Title and `data:` URI of each image.
    """

    captions: Sequence[str]
    panels: Sequence[tuple[str, str]]

    @staticmethod
    def from_token_maps(token_maps: Sequence[TokenMap]) -> RowImages:
        """Draw the panels of a row's token maps, image after image."""
        drawn = [
            (panel.title, f"data:image/webp;base64,{b64encode(panel.webp).decode()}")
            for token_map in token_maps
            for panel in panels(token_map)
        ]
        return RowImages([line for each in token_maps for line in each.captions], drawn)


@dataclass(frozen=True)
class RunView:
    """A run as templates show it.

    Attributes:
        summary: Its figures.
        name: Short name.
        when: Start and duration.
        tiles: The most important figures, as label and value.
        verdicts: Conclusions in sentences.
        tables: Those with rows.
        charts: Shown on the page only.
        rows: Rows whose token maps are drawn; on the page only.
        recipe: As YAML.
    """

    summary: Summary
    name: str
    when: str
    tiles: Sequence[tuple[str, str]]
    verdicts: Sequence[Line]
    tables: Sequence[Table]
    charts: Sequence[Chart]
    rows: Sequence[RowImages]
    recipe: str


@dataclass(frozen=True)
class Report:
    """The three forms of a report."""

    html: str
    markdown: str
    json: str


def report(
    summaries: Sequence[Summary], rows: Mapping[str, Sequence[RowImages]] | None = None
) -> Report:
    """Write the report of some runs.

    Args:
        summaries: Summaries of the runs, in order.
        rows: By output, rows whose token maps are drawn.
    """
    names = _names([summary.output for summary in summaries])
    images = [(rows or {}).get(summary.output, ()) for summary in summaries]
    runs = [_view(*parts) for parts in zip(summaries, names, images, strict=True)]
    title = names[0] if len(names) == 1 else f"{len(names)} runs side by side"
    context = {"title": title, "version": __version__, "runs": runs, "compared": _compared(runs)}
    environment = templates()
    document = {"version": __version__, "runs": [summary.to_dict() for summary in summaries]}
    return Report(
        html=environment.get_template("report.html.j2").render(context),
        markdown=environment.get_template("report.md.j2").render(context),
        json=json.dumps(document, default=str, indent=1),
    )


def templates() -> jinja2.Environment:
    """The environment of all templates: HTML escapes everything, Markdown what `md` filters."""
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
    """Numbers whose lines may break only between the parts of a range."""
    return re.sub(r" (?!\(|to )", "\N{NO-BREAK SPACE}", value)


def markdown_text(value: object) -> str:
    """Escape text so that Markdown, and HTML within it, show it as it is on one line."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)


def _names(outputs: Sequence[str]) -> list[str]:
    """Last parts of paths, as many as make them differ."""
    parts = [[part for part in output.rstrip("/").split("/") if part] for output in outputs]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = [posixpath.join(*path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return list(outputs)


# -------------------------------------------------------------------------------------- one run


def _view(summary: Summary, name: str, rows: Sequence[RowImages]) -> RunView:
    recipe = yaml.safe_dump(dict(summary.recipe), sort_keys=False, allow_unicode=True)
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    return RunView(
        summary=summary,
        name=name,
        when=_when(summary),
        tiles=list(_tiles(summary)),
        verdicts=[*_verdicts(summary), *_cost_notes(summary)],
        tables=[table for table in tables(summary) if table.rows],
        charts=list(_charts(summary)),
        rows=rows,
        recipe=f"{recipe}# {versions}",
    )


def _when(summary: Summary) -> str:
    if summary.started is None or summary.ended is None:
        return ""
    seconds = (summary.ended - summary.started).total_seconds()
    return f"started {summary.started:%Y-%m-%d %H:%M} UTC, took {seconds_text(seconds)}"


def _tiles(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "rows answered", f"{summary.answered_rows:,} of {summary.rounds[0].planned_rows:,}"
    share = summary.errors / summary.answers if summary.answers else 0.0
    rounds = " of all rounds" if len(summary.rounds) > 1 else ""
    yield f"errors among {summary.answers:,} answers{rounds}", f"{summary.errors:,} ({share:.2%})"
    yield "of visual tokens kept", percent(summary.visual.share)
    yield "of the uncompressed KV cache", percent(summary.kv_bytes.share)
    yield "of the uncompressed operations", percent(summary.operations.share)
    costs = summary.costs
    if costs.device_seconds:
        yield "device time", seconds_text(costs.device_seconds)
        yield "useful share of it", percent(costs.useful_share)
    if costs.usd is not None:
        yield f"total cost, {costs.price}", money(costs.usd)
    if summary.usd_per_1000 is not None:
        yield "cost of 1,000 images", money(summary.usd_per_1000)
    if summary.audit is not None:
        yield "of audited answers unchanged", percent(summary.audit.agreed.mid)
    if summary.energy_joules:
        yield "energy of the devices", f"{precise(summary.energy_joules / KWH_JOULES)} kWh"


def _verdicts(summary: Summary) -> Iterator[Line]:
    missing = summary.rounds[0].planned_rows - summary.answered_rows
    if missing:
        text = f"{missing:,} planned rows are not answered; run the job again to resume."
        yield Line(text, "bad")
    saved, answering = summary.costs.saved_seconds, summary.costs.answering_seconds
    if saved is None or summary.visual.share is None:
        return
    if summary.visual.share == 1:
        yield Line("Nothing was compressed in this run.")
    elif answering:
        of_full = Interval(*(s / (s + answering) for s in (saved.low, saved.mid, saved.high)))
        text = (
            f"Compression saved about {seconds_text(saved.mid)} of device time "
            f"({seconds_text(saved.low)} to {seconds_text(saved.high)}), "
            f"{of_full.mid:.0%} ({of_full.low:.0%} to {of_full.high:.0%}) of what answering would "
            "have taken without it: an estimate from operations, not a measurement."
        )
        yield Line(text, "good" if of_full.low > 0.05 else "")
        yield _audit_line(summary)


def _audit_line(summary: Summary) -> Line:
    audit = summary.audit
    if audit is None:
        return Line(
            "Its effect on the answers is unknown, because no row was audited; recipe.audit.share "
            "turns audits on."
        )
    agreed = audit.agreed
    text = (
        f"Of {audit.audits:,} rows that were also answered uncompressed, {agreed.mid:.1%} "
        f"({agreed.low:.1%} to {agreed.high:.1%}) got the same answer; the mean similarity is "
        f"{audit.similarity:.3f}."
    )
    if audit.slowdown is not None:
        text += (
            f" Uncompressed answers took {audit.slowdown:.2f} times as long on the device, in the "
            "same batches as compressed ones."
        )
    if audit.steps:
        again, agree = (sum(getattr(step, of) for step in audit.steps) for of in ("rows", "agreed"))
        text += (
            f" {again:,} that differed were answered again with more visual tokens; {agree:,} of "
            "them now agree."
        )
    text += f" Audits took {audit.share_of_time:.1%} of the devices' answering time."
    return Line(text)


def _cost_notes(summary: Summary) -> Iterator[Line]:
    """Why figures of money, or other devices, are absent."""
    if summary.costs.no_cost is not None:
        yield Line(summary.costs.no_cost, "note")
    for note in summary.costs.left_out if summary.costs.devices else ():
        yield Line(note, "note")


def _charts(summary: Summary) -> Iterator[Chart]:
    views = {
        "thumbnail" if index == 0 else f"crop {index}": change
        for index, change in enumerate(summary.views)
    }
    if views:
        title = "Visual tokens by view"
        yield Chart(title, charts.changes(title, "tokens", views))
    if sum(summary.retention):
        title = "Actual retention"
        yield Chart(title, charts.retention(title, summary.retention))
    if summary.flops:
        title = "Operations by stage"
        by_label = {
            STAGE_LABELS[stage].split(",")[0]: change for stage, change in summary.flops.items()
        }
        yield Chart(title, charts.changes(title, "operations", by_label))
    title = "Busy seconds by stage"
    seconds = {STAGE_LABELS[s].split(" (")[0]: n for s, n in summary.stage_seconds.items()}
    yield Chart(title, charts.bars(title, "seconds", seconds))
    if len(summary.throughput) > 1:
        title = "Throughput"
        yield Chart(title, charts.over_time(title, summary.throughput))
    if summary.costs.device_seconds_by_use:
        title = "Device-seconds by use"
        yield Chart(title, charts.bars(title, "seconds", summary.costs.device_seconds_by_use))


# --------------------------------------------------------------------------------- side by side


def _compared(runs: Sequence[RunView]) -> Table:
    rows: dict[str, list[str]] = {}
    for index, run in enumerate(runs):
        for name, value in _comparable(run.summary).items():
            rows.setdefault(name, [""] * len(runs))[index] = value
    cells = [[name, *values] for name, values in rows.items()]
    return Table("Side by side", ["", *(run.name for run in runs)], cells)


def _comparable(summary: Summary) -> Mapping[str, str]:
    stats, costs, answers = summary.stats, summary.costs, max(1, summary.answers)
    figures = {
        "method, retention": f"{summary.method}, {summary.retention_requested:g}",
        "answers": f"{summary.answers:,}",
        "errors": f"{summary.errors:,}",
        "blank answers": f"{stats.empty_answers:,}",
        "visual tokens an answer": precise(summary.visual.kept / answers),
        "prompt tokens an answer": precise(stats.prompt_tokens / answers),
        "output tokens an answer": precise(stats.output_tokens / answers),
        "KV cache an answer": size(summary.kv_bytes.kept // answers),
        "operations an answer": short(summary.operations.kept / answers),
        "device time": seconds_text(costs.device_seconds),
        "useful share of it": percent(costs.useful_share),
    }
    if costs.answering_seconds:
        each_second = summary.answers / costs.answering_seconds
        figures["answers a device-second of answering"] = precise(each_second)
    if summary.usd_per_1000 is not None:
        figures["cost of 1,000 images"] = money(summary.usd_per_1000)
    if summary.audit is not None:
        figures["audited answers unchanged"] = percent(summary.audit.agreed.mid)
    if summary.energy_joules:
        figures["joules an answer"] = precise(summary.energy_joules / answers)
    return figures
