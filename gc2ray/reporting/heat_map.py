"""Draws the tokens that a method kept of an image.

Four panels: the image; the thumbnail's scores, which set the crops' budgets; how many tokens each
crop keeps; and the image with dropped tokens darkened. Padding tokens are left out, because the
model never sees them. The panels come as one PNG, or one by one for a page with its own captions.

Not covered: merged tokens, each of which is drawn at the centre of its cell.
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
"""Brightness of dropped tokens."""
WIDTH_INCHES, DOTS = 11.0, 120
PANEL_INCHES = (1.6, 8.0)
"""Lowest and highest."""
LINE = 110
"""Characters of a line of text."""
SINGLE_INCHES, SINGLE_DOTS, SINGLE_POINTS = 5.0, 120, 18
"""A single panel: width, dots an inch, and a font size that can be read on a phone."""


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The tokens that a method kept of an image.

    Attributes:
        image: Pixels, uint8 (H, W, 3).
        canvas: Geometry of the image and its views.
        scores: Scores of the thumbnail's tokens, float (N,).
        kept: Which tokens of each view were kept, bool (V, N), the thumbnail first.
        captions: Lines about the row, the first with its key and prompt.
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
    """Text without control characters, which a model may write and no font has."""
    return "".join(char if char.isprintable() else " " for char in text)


@dataclass(frozen=True)
class Panel:
    """A single panel: its title, and the image as WebP."""

    title: str
    webp: bytes


def heat_map(token_map: TokenMap) -> bytes:
    """All four panels as one PNG."""
    lines = [line for text in token_map.captions for line in textwrap.wrap(_drawable(text), LINE)]
    panel = _height(token_map, WIDTH_INCHES / 2)
    size = (WIDTH_INCHES, 2 * (panel + 0.4) + 0.2 * len(lines) + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    with mpl.rc_context({"text.parse_math": False}):
        figure.suptitle("\n".join(lines), fontsize=10, ha="left", x=0.02)
        for axes, draw in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
            axes.set_axis_off()
            axes.set_title(draw(axes, token_map), fontsize=10)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=DOTS, metadata={"Software": None})
    return sink.getvalue()


def panels(token_map: TokenMap) -> Iterator[Panel]:
    """The four panels one by one, without captions."""
    for draw in _PANELS:
        figure = Figure(figsize=(SINGLE_INCHES, _height(token_map, SINGLE_INCHES)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        with mpl.rc_context({"text.parse_math": False, "font.size": SINGLE_POINTS}):
            title = draw(axes, token_map)
            axes.set_box_aspect(None)
            axes.set_aspect("auto")
            sink = io.BytesIO()
            figure.savefig(sink, format="webp", dpi=SINGLE_DOTS, pil_kwargs={"quality": 80})
        yield Panel(title, sink.getvalue())


def _height(token_map: TokenMap, width_inches: float) -> float:
    """Height of a panel in inches."""
    rows, columns = token_map.image.shape[:2]
    return float(np.clip(width_inches * rows / columns, *PANEL_INCHES))


def _image(axes: Axes, token_map: TokenMap) -> str:
    axes.imshow(token_map.image)
    return f"image, {token_map.image.shape[1]} x {token_map.image.shape[0]} pixels"


def _scores(axes: Axes, token_map: TokenMap) -> str:
    height, width = token_map.image.shape[:2]
    axes.imshow(token_map.image, extent=(0, width, height, 0))
    scores = token_map.scores.reshape(token_map.canvas.side)
    axes.imshow(scores, extent=(0, width, height, 0), cmap="viridis", alpha=0.65)
    low, high = (f"{end:.2g}" for end in (scores.min(), scores.max()))
    return f"the thumbnail's scores: {low} (dark) to {high} (yellow)"


def _budgets(axes: Axes, token_map: TokenMap) -> str:
    """The share that each crop keeps of its own tokens."""
    thumbnail, *full = token_map.canvas.tokens_per_view()
    kept = token_map.kept_per_view
    shares = [part / max(1, whole) for part, whole in zip(kept[1:], full, strict=True)]
    axes.imshow(
        np.array(shares).reshape(token_map.canvas.grid), cmap="cividis", vmin=0, aspect="auto"
    )
    axes.set_box_aspect(_height(token_map, SINGLE_INCHES) / SINGLE_INCHES)
    middle = (max(shares) if shares else 0) / 2
    for index, share in enumerate(shares):
        row, column = divmod(index, token_map.canvas.grid[1])
        text = f"crop {index + 1}\n{kept[index + 1]} of {full[index]}\n{share:.1%}"
        colour = "white" if share < middle else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    return f"tokens kept in each crop; in the thumbnail {kept[0]} of {thumbnail}"


def _kept(axes: Axes, token_map: TokenMap) -> str:
    height, width = token_map.image.shape[:2]
    kept = token_map.covered()
    light = np.where(kept, 1.0, DROPPED)
    if not kept.size:  # the image is so thin that no token covers it
        light = np.full((1, 1), DROPPED)
    rows = np.minimum(np.arange(height) * light.shape[0] // height, light.shape[0] - 1)
    columns = np.minimum(np.arange(width) * light.shape[1] // width, light.shape[1] - 1)
    darkened = token_map.image * light[rows][:, columns, None]
    axes.imshow(darkened.astype(np.uint8))
    return f"tokens kept in the crops: {int(kept.sum())} of {kept.size}"


_PANELS: tuple[Callable[[Axes, TokenMap], str], ...] = (_image, _scores, _budgets, _kept)
