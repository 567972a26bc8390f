"""A picture of what a method kept of an image: for people who want to see it.

Four panels: the image; the thumbnail's scores, which command the crops; how many tokens each crop
keeps of its own; and the image with what was dropped darkened. Tokens that show no image are left
out, as the model never sees them.

Not covered: merged tokens, of which each stands at the centre of its cell.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gc2ray.canvas import Canvas

DROPPED = 0.22
"""Brightness of what was dropped."""
WIDTH_INCHES, DOTS = 11.0, 120
PANEL_INCHES = (1.6, 8.0)
"""Lowest and highest."""
LINE = 110
"""Characters of a line of text."""


@dataclass(frozen=True, eq=False)
class Looked:
    """An image as a method saw it.

    Attributes:
        image: Pixels, uint8 (H, W, 3).
        canvas: Where it lies among its tokens.
        scores: Of the thumbnail's tokens, float (N,).
        kept: Which tokens of each view were kept, bool (V, N), the thumbnail first.
        captions: Lines that tell what it is about.
    """

    image: np.ndarray
    canvas: Canvas
    scores: np.ndarray
    kept: np.ndarray
    captions: Sequence[str]

    @property
    def kept_per_view(self) -> list[int]:
        """Kept tokens of each view."""
        return [int(count) for count in self.kept.sum(axis=1)]

    def covered(self) -> np.ndarray:
        """Which tokens of the crops were kept, where the image covers them, bool (h, w)."""
        (rows, columns), (height, width) = self.canvas.grid, self.canvas.side
        crops = self.kept[1:].reshape(rows, columns, height, width)
        whole = crops.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
        (top, bottom), (left, right) = self.canvas.rows, self.canvas.columns
        return whole[top:bottom, left:right]


def heat_map(looked: Looked) -> bytes:
    """The picture, as PNG."""
    lines = [line for text in looked.captions for line in textwrap.wrap(text, LINE)]
    height, width = looked.image.shape[:2]
    panel = min(max(WIDTH_INCHES / 2 * height / width, PANEL_INCHES[0]), PANEL_INCHES[1])
    size = (WIDTH_INCHES, 2 * (panel + 0.4) + 0.2 * len(lines) + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    with mpl.rc_context({"text.parse_math": False}):
        figure.suptitle("\n".join(lines), fontsize=10, ha="left", x=0.02)
        (first, second), (third, fourth) = figure.subplots(2, 2)
        _image(first, looked)
        _commander(second, looked)
        _budgets(third, looked)
        _kept(fourth, looked)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=DOTS, metadata={"Software": None})
    return sink.getvalue()


def _image(axes: Axes, looked: Looked) -> None:
    axes.imshow(looked.image)
    axes.set_title(f"image, {looked.image.shape[1]} x {looked.image.shape[0]} pixels", fontsize=10)
    axes.set_axis_off()


def _commander(axes: Axes, looked: Looked) -> None:
    height, width = looked.image.shape[:2]
    axes.imshow(looked.image, extent=(0, width, height, 0))
    scores = looked.scores.reshape(looked.canvas.side)
    drawn = axes.imshow(scores, extent=(0, width, height, 0), cmap="viridis", alpha=0.65)
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.04)
    bar.ax.tick_params(labelsize=8)
    axes.set_title("the thumbnail's scores: the commander", fontsize=10)
    axes.set_axis_off()


def _budgets(axes: Axes, looked: Looked) -> None:
    """The share that each crop keeps of its own tokens."""
    thumbnail, *full = looked.canvas.tokens_per_view()
    kept = looked.kept_per_view
    shares = [part / max(1, whole) for part, whole in zip(kept[1:], full, strict=True)]
    axes.imshow(np.array(shares).reshape(looked.canvas.grid), cmap="cividis", vmin=0, aspect="auto")
    middle = (max(shares) if shares else 0) / 2
    for place, share in enumerate(shares):
        row, column = divmod(place, looked.canvas.grid[1])
        text = f"crop {place + 1}\n{kept[place + 1]} of {full[place]}\n{share:.1%}"
        colour = "white" if share < middle else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_title(f"kept of each crop; of the thumbnail {kept[0]} of {thumbnail}", fontsize=10)
    axes.set_axis_off()


def _kept(axes: Axes, looked: Looked) -> None:
    height, width = looked.image.shape[:2]
    kept = looked.covered()
    light = np.where(kept, 1.0, DROPPED)
    if not kept.size:  # so thin that no token shows it
        light = np.full((1, 1), DROPPED)
    rows = np.minimum(np.arange(height) * light.shape[0] // height, light.shape[0] - 1)
    columns = np.minimum(np.arange(width) * light.shape[1] // width, light.shape[1] - 1)
    shown = looked.image * light[rows][:, columns, None]
    axes.imshow(shown.astype(np.uint8))
    axes.set_title(f"what the crops keep: {int(kept.sum())} of {kept.size} tokens", fontsize=10)
    axes.set_axis_off()
