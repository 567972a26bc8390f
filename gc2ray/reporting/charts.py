"""Charts of a report as inline SVG, drawn by matplotlib in colours that the page sets.

Every colour is a placeholder that becomes a CSS variable, so one drawing is readable in light and
dark mode; text stays text. The palette is Okabe and Ito's (colour-blind safe). Charts are narrow,
for phones. Equal numbers give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gc2ray.core.format import si_number
from gc2ray.core.stats import RETENTION_BUCKETS
from gc2ray.estimation.recommendation import Tuning
from gc2ray.reporting.summary import BeforeAfter

INK, FAINT = "#010203", "#040506"
BEFORE, AFTER, THIRD = "#070809", "#0a0b0c", "#0d0e0f"
VARIABLES = {
    INK: "ink, #1b1f24", FAINT: "faint, #8a929c", BEFORE: "before, #8f98a3",
    AFTER: "after, #0072b2", THIRD: "third, #b04a00",
}  # fmt: skip
"""Placeholders to CSS variables, each with its default where no page sets it."""
WIDTH, ROW = 4.6, 0.34
"""Inches; 72 points an inch, and the page scales a point to about a pixel."""
TIME_TICKS = 6
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Point:
    """A setting: time of a row, and quality with its interval."""

    name: str
    milliseconds: float
    quality: float
    low: float
    high: float
    on_front: bool


def bars(title: str, unit: str, values: Mapping[str, float]) -> str:
    """Horizontal bars, one per line, with their numbers."""

    def draw(axes: Axes) -> None:
        names, numbers = list(values), list(values.values())
        container = axes.barh(names, numbers, color=AFTER, height=0.7)
        axes.bar_label(container, [si_number(value) for value in numbers], padding=3, color=INK)
        _tidy_bars(axes, max(numbers, default=0), unit)

    return _svg(title, 0.9 + ROW * len(values), draw)


def changes(title: str, unit: str, values: Mapping[str, BeforeAfter]) -> str:
    """Pairs of horizontal bars: before and after compression."""

    def draw(axes: Axes) -> None:
        places = range(len(values))
        full = [float(change.full) for change in values.values()]  # more than C's integers hold
        kept = [float(change.kept) for change in values.values()]
        before = axes.barh([p - 0.2 for p in places], full, height=0.4, color=BEFORE)
        after = axes.barh([p + 0.2 for p in places], kept, height=0.4, color=AFTER)
        axes.bar_label(before, [si_number(value) for value in full], padding=3, color=INK)
        axes.bar_label(after, [si_number(value) for value in kept], padding=3, color=INK)
        axes.set_yticks(list(places), list(values))
        axes.legend(
            [before, after], ["before", "after"], loc="lower center", bbox_to_anchor=(0.4, 1.0),
            ncols=2, frameon=False, labelcolor=INK,
        )  # fmt: skip
        _tidy_bars(axes, max(full, default=0), unit)

    return _svg(title, 1.2 + 2 * ROW * len(values), draw)


def retention(title: str, counts: Sequence[int]) -> str:
    """Histogram of the kept fraction over answers."""

    def draw(axes: Axes) -> None:
        width = 1 / RETENTION_BUCKETS
        places = [(index + 0.5) * width for index in range(len(counts))]
        axes.bar(places, list(map(float, counts)), width=0.9 * width, color=AFTER)
        axes.set_xlim(0, 1)
        axes.set_xlabel("fraction of visual tokens kept")
        axes.set_ylabel("answers")
        axes.yaxis.set_major_formatter(lambda value, _: si_number(value))

    return _svg(title, 2.4, draw)


def over_time(title: str, moments: Sequence[tuple[datetime, float, float]]) -> str:
    """Answers a second, and the share of worker time spent waiting for input."""

    def draw(axes: Axes) -> None:
        width = moments[1][0] - moments[0][0]
        last = moments[-1]
        ends = [*moments, (last[0] + width, *last[1:])]  # the last one has a width, too
        when = date2num([at for at, _, _ in ends])  # type: ignore[no-untyped-call]
        rates = [rate for _, rate, _ in ends]
        axes.step(when, rates, where="post", color=AFTER)
        axes.fill_between(when, rates, step="post", color=AFTER, alpha=0.25)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("answers/s")
        locator = AutoDateLocator(minticks=2, maxticks=TIME_TICKS)  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
        other = axes.twinx()
        other.step(when, [100 * waiting for _, _, waiting in ends], where="post", color=THIRD)
        other.set_ylim(0, 100)
        other.set_ylabel("waiting for input, %", color=THIRD)
        other.spines["right"].set_visible(True)
        axes.patch.set_visible(False)  # the second pair of axes turned it on again

    return _svg(title, 2.4, draw)


def front(title: str, points: Sequence[Point]) -> str:
    """Quality against time with intervals; the points on the Pareto front are joined."""

    def draw(axes: Axes) -> None:
        best = sorted((p for p in points if p.on_front), key=lambda p: p.milliseconds)
        axes.plot(
            [p.milliseconds for p in best], [p.quality for p in best], color=AFTER, linewidth=1
        )
        for point in points:
            colour = AFTER if point.on_front else BEFORE
            axes.plot([point.milliseconds] * 2, [point.low, point.high], color=colour, linewidth=1)
            axes.plot([point.milliseconds], [point.quality], marker="o", color=colour)
            axes.annotate(
                point.name, (point.milliseconds, point.quality), xytext=(5, -11),
                textcoords="offset points", fontsize=8, color=INK,
            )  # fmt: skip
        axes.margins(x=0.2)
        axes.set_xlabel("milliseconds a row")
        axes.set_ylabel("quality, 95 %")

    return _svg(title, 3.2, draw)


def tuning_chart(tuning: Tuning) -> str:
    """The Pareto front of a tuning."""
    points = [
        Point(
            name=item.setting.name,
            milliseconds=1e3 * item.seconds_per_row,
            quality=item.quality.mean,
            low=item.quality.low,
            high=item.quality.high,
            on_front=item.on_front,
        )
        for item in tuning.measured
    ]
    return front("Quality against time", points)


def _tidy_bars(axes: Axes, largest: float, unit: str) -> None:
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * largest or 1)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_formatter(lambda value, _: si_number(value))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", length=0)


def _svg(title: str, height: float, draw: Callable[[Axes], None]) -> str:
    """A chart as an inline SVG element, with a label for screen readers."""
    key = re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for placeholder, name in VARIABLES.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    # One page holds several charts, so their ids must differ.
    svg = re.sub(r'id="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\1{key}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()
