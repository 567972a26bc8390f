"""Accuracy against visual tokens as a plot, one line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "globalcom2": "#0072B2", "globalcom2-reference": "#56B4E9", "local": "#009E73",
    "pool": "#E69F00", "uniform": "#CC79A7", "random": "#D55E00", "downsample": "#888888",
    "thumbnail": "#000000",
}  # fmt: skip
"""Okabe and Ito's, which colour-blind readers tell apart, and grey."""
TICKS = (5, 10, 20, 40, 80, 160, 320)
NEAR = 1.5
"""Ticks are drawn within the tokens measured, times and over this."""


def plot(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw as SVG; same data, same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "gc2ray", "font.size": 10})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    for method in COLOURS:
        _draw(axes, method, [point for point in points if point["method"] == method])
    drawn = [point["tokens"] for point in points if point["method"] in COLOURS]
    ticks = [tick for tick in TICKS if min(drawn) / NEAR < tick < max(drawn) * NEAR]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens a row that the language model reads (newlines included)")
    axes.set_ylabel("exact match, %, with 95% intervals")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw(axes: Any, method: str, points: Sequence[Mapping[str, Any]]) -> None:
    """The line of a method, if it was measured."""
    if not points:
        return
    points = sorted(points, key=lambda point: float(point["tokens"]))
    spread = [
        [100 * (point["mean"] - point["low"]) for point in points],
        [100 * (point["high"] - point["mean"]) for point in points],
    ]
    axes.errorbar(
        [point["tokens"] for point in points], [100 * point["mean"] for point in points],
        yerr=spread, color=COLOURS[method], label=method, capsize=2, linewidth=1.6,
        marker="D" if method == "thumbnail" else "o", markersize=4,
    )  # fmt: skip
