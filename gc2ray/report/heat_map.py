"""A picture of what a method kept of an image: for people who want to see it.

Four panels: the image; the thumbnail's scores, which command the crops; how many tokens each crop
keeps of its own; and the image with what was dropped darkened. Tokens that show no image are left
out, as the model never sees them. They come as one PNG, or one by one for a page that has its own
words about them.

Not covered: merged tokens, of which each stands at the centre of its cell.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gc2ray.compression.canvas import Canvas

DROPPED = 0.22
"""Brightness of what was dropped."""
WIDTH_INCHES, DOTS = 11.0, 120
PANEL_INCHES = (1.6, 8.0)
"""Lowest and highest."""
LINE = 110
"""Characters of a line of text."""
ALONE_INCHES, ALONE_DOTS, ALONE_POINTS = 5.0, 120, 18
"""Of a panel of its own: its width, dots in each, and letters that can be read on a phone."""


@dataclass(frozen=True, eq=False)
class TokenMap:
    """An image as a method saw it.

    Attributes:
        image: Pixels, uint8 (H, W, 3).
        canvas: Where it lies among its tokens.
        scores: Of the thumbnail's tokens, float (N,).
        kept: Which tokens of each view were kept, bool (V, N), the thumbnail first.
        captions: Lines that tell what it is about, the first one which row it is.
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


def _drawable(text: str) -> str:
    """A model may write anything; no font has control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


@dataclass(frozen=True)
class Panel:
    """One of the four, alone: what it shows, in words, and WebP."""

    title: str
    webp: bytes


def heat_map(looked: TokenMap) -> bytes:
    """The picture, as PNG."""
    lines = [line for text in looked.captions for line in textwrap.wrap(_drawable(text), LINE)]
    panel = _height(looked, WIDTH_INCHES / 2)
    size = (WIDTH_INCHES, 2 * (panel + 0.4) + 0.2 * len(lines) + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    with mpl.rc_context({"text.parse_math": False}):
        figure.suptitle("\n".join(lines), fontsize=10, ha="left", x=0.02)
        for axes, draw in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
            axes.set_axis_off()
            axes.set_title(draw(axes, looked), fontsize=10)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=DOTS, metadata={"Software": None})
    return sink.getvalue()


def panels(looked: TokenMap) -> Iterator[Panel]:
    """Each of the four alone, without words around it."""
    for draw in _PANELS:
        figure = Figure(figsize=(ALONE_INCHES, _height(looked, ALONE_INCHES)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        with mpl.rc_context({"text.parse_math": False, "font.size": ALONE_POINTS}):
            title = draw(axes, looked)
            axes.set_box_aspect(None)
            axes.set_aspect("auto")
            sink = io.BytesIO()
            figure.savefig(sink, format="webp", dpi=ALONE_DOTS, pil_kwargs={"quality": 80})
        yield Panel(title, sink.getvalue())


def _height(looked: TokenMap, width_inches: float) -> float:
    """Inches of a panel so wide."""
    rows, columns = looked.image.shape[:2]
    return float(np.clip(width_inches * rows / columns, *PANEL_INCHES))


def _image(axes: Axes, looked: TokenMap) -> str:
    axes.imshow(looked.image)
    return f"image, {looked.image.shape[1]} x {looked.image.shape[0]} pixels"


def _commander(axes: Axes, looked: TokenMap) -> str:
    height, width = looked.image.shape[:2]
    axes.imshow(looked.image, extent=(0, width, height, 0))
    scores = looked.scores.reshape(looked.canvas.side)
    axes.imshow(scores, extent=(0, width, height, 0), cmap="viridis", alpha=0.65)
    low, high = (f"{end:.2g}" for end in (scores.min(), scores.max()))
    return f"the thumbnail's scores, the commander: {low} (dark) to {high} (yellow)"


def _budgets(axes: Axes, looked: TokenMap) -> str:
    """The share that each crop keeps of its own tokens."""
    thumbnail, *full = looked.canvas.tokens_per_view()
    kept = looked.kept_per_view
    shares = [part / max(1, whole) for part, whole in zip(kept[1:], full, strict=True)]
    axes.imshow(np.array(shares).reshape(looked.canvas.grid), cmap="cividis", vmin=0, aspect="auto")
    axes.set_box_aspect(_height(looked, ALONE_INCHES) / ALONE_INCHES)
    middle = (max(shares) if shares else 0) / 2
    for place, share in enumerate(shares):
        row, column = divmod(place, looked.canvas.grid[1])
        text = f"crop {place + 1}\n{kept[place + 1]} of {full[place]}\n{share:.1%}"
        colour = "white" if share < middle else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    return f"kept of each crop; of the thumbnail {kept[0]} of {thumbnail}"


def _kept(axes: Axes, looked: TokenMap) -> str:
    height, width = looked.image.shape[:2]
    kept = looked.covered()
    light = np.where(kept, 1.0, DROPPED)
    if not kept.size:  # so thin that no token shows it
        light = np.full((1, 1), DROPPED)
    rows = np.minimum(np.arange(height) * light.shape[0] // height, light.shape[0] - 1)
    columns = np.minimum(np.arange(width) * light.shape[1] // width, light.shape[1] - 1)
    shown = looked.image * light[rows][:, columns, None]
    axes.imshow(shown.astype(np.uint8))
    return f"what the crops keep: {int(kept.sum())} of {kept.size} tokens"


_PANELS: tuple[Callable[[Axes, TokenMap], str], ...] = (_image, _commander, _budgets, _kept)
