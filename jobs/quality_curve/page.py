"""The measured curve as Markdown for `docs/quality.md`, and as a plot.

Everything is rendered from one JSON document (`docs/quality.json`), so that a test can tell whether
the page still says what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- quality: made by `make quality` -->", "<!-- end of quality -->"
COLOURS = {
    "globalcom2": "#0072B2", "globalcom2-reference": "#56B4E9", "local": "#009E73",
    "pool": "#E69F00", "uniform": "#CC79A7", "random": "#D55E00", "thumbnail": "#000000",
}  # fmt: skip
"""Okabe and Ito's, which colour-blind readers tell apart."""
TICKS = (10, 20, 40, 80, 160, 320)


def render(document: Mapping[str, Any]) -> str:
    """Everything between the page's marks."""
    parts = [
        BEGIN,
        _heading(document),
        "![Exact match against visual tokens a row](quality.svg)",
        _curve(document["points"]),
        _differences(document["differences"]),
        _topics(document["topics"]),
        *([packings(document["packings"])] if "packings" in document else []),
        _commander(document),
        END,
    ]
    return "\n\n".join(parts)


def inserted(text: str, document: Mapping[str, Any]) -> str:
    """The page with the rendered document in place of what is between its marks.

    Raises:
        ValueError: It has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/quality.md lacks the lines {BEGIN} and {END}")
    return before + render(document) + after


def _heading(document: Mapping[str, Any]) -> str:
    return (
        f"`make quality` on {document['hardware']}, {document['date']}: {document['rows']:,} "
        "held-out rows of the demo model, float32, greedy. Exact match with 95% bootstrap "
        "intervals; below it the visual tokens a row that the language model really reads, "
        "newlines included."
    )


def _curve(points: Sequence[Mapping[str, Any]]) -> str:
    swept = [point for point in points if point["method"] in COLOURS]
    retentions = sorted({p["retention"] for p in swept}, reverse=True)
    by = {(p["method"], p["retention"]): p for p in swept}
    lines = ["| method | " + " | ".join(f"{r:g}" for r in retentions) + " |"]
    lines.append("|---" * (len(retentions) + 1) + "|")
    for method in COLOURS:
        cells = []
        for retention in retentions:
            point = by.get((method, retention))
            cells.append(f"{_interval(point)}<br>{point['tokens']:.0f}" if point else "")
        if any(cells):
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(differences: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| paired difference, points of exact match | at 0.1 | at 0.05 |", "|---|---|---|"]
    names = list(dict.fromkeys(item["name"] for item in differences))
    for name in names:
        cells = {item["retention"]: item for item in differences if item["name"] == name}
        row = [_points(cells[r]) if r in cells else "" for r in (0.1, 0.05)]
        lines.append(f"| {name} | {row[0]} | {row[1]} |")
    return "\n".join(lines)


def _topics(topics: Mapping[str, Mapping[str, float]]) -> str:
    names = list(next(iter(topics.values())))
    lines = [
        "| exact match by topic | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for label, by_topic in topics.items():
        lines.append(f"| {label} | " + " | ".join(f"{by_topic[n]:.3f}" for n in names) + " |")
    return "\n".join(lines)


def packings(measured: Sequence[Mapping[str, Any]]) -> str:
    """Policies of packing; differences are to the first of each retention, the paper's way."""
    lines = [
        "| `globalcom2` | positions | newlines | exact match | tokens | difference | `where` "
        "| difference |",
        "|---" * 8 + "|",
    ]
    for item in measured:
        differences = [
            _points(item[name]) if name in item else ""
            for name in ("difference", "where_difference")
        ]
        cells = (
            f"at {item['retention']:g}", item["positions"], item["newlines"], _interval(item),
            f"{item['tokens']:.0f}", differences[0], f"{item['where']:.3f}", differences[1],
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _commander(document: Mapping[str, Any]) -> str:
    shares = document["far_from_uniform"]
    cells = ", ".join(f"{float(t):g}: {share:.0%}" for t, share in shares.items())
    tried = "; ".join(
        f"{item['temperature']:g}: {_points(item)}" for item in document["temperatures"]
    )
    return (
        "Share of crops whose budget differs from uniform by more than a fifth, by temperature: "
        f"{cells}. Chosen on {document['validation_rows']:,} validation rows at 0.1 by the rule "
        "*10, the paper's, unless another is better beyond doubt*; differences from 10, in points: "
        f"{tried}. Used: {document['temperature']:g}."
    )


def _interval(item: Mapping[str, Any]) -> str:
    return f"{item['mean']:.3f} [{item['low']:.3f}, {item['high']:.3f}]"


def _points(item: Mapping[str, Any]) -> str:
    """A difference in points, bold where its interval excludes 0."""
    low, high = 100 * item["low"], 100 * item["high"]
    text = f"{100 * item['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Accuracy against visual tokens, one line a method, as SVG; same data, same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "gc2ray", "font.size": 10})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    for method, colour in COLOURS.items():
        points = sorted(
            (p for p in document["points"] if p["method"] == method), key=lambda p: p["tokens"]
        )
        if not points:
            continue
        tokens = [p["tokens"] for p in points]
        means = [100 * p["mean"] for p in points]
        spread = [
            [100 * (p["mean"] - p["low"]) for p in points],
            [100 * (p["high"] - p["mean"]) for p in points],
        ]
        axes.errorbar(
            tokens, means, yerr=spread, color=colour, label=method, capsize=2, linewidth=1.6,
            marker="D" if method == "thumbnail" else "o", markersize=4,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens a row that the language model reads (newlines included)")
    axes.set_ylabel("exact match, %, with 95% intervals")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
