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
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from gc2ray.compression.geometry import Geometry, ViewGrid

DROPPED = 0.22
"""Brightness of dropped tokens."""
WIDTH_INCHES, DOTS = 11.0, 120
PANEL_INCHES = (1.6, 8.0)
"""Lowest and highest."""
LINE = 110
"""Characters of a line of text."""
MISSING = "\N{WHITE SQUARE}"
"""Drawn in the place of a letter that the font lacks."""
SINGLE_INCHES, SINGLE_DOTS, SINGLE_POINTS = 5.0, 120, 18
"""A single panel: width, dots an inch, and a font size that can be read on a phone."""


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The tokens that a method kept of an image.

    Attributes:
        image: Pixels, uint8 (H, W, 3).
        geometry: Views of the image.
        scores: Scores of the thumbnail's tokens, float (M,), or of the only view's.
        kept: Which tokens of the views were kept, bool (N,), view after view.
        captions: Lines about the row, the first with its key and prompt.
    """

    image: np.ndarray
    geometry: Geometry
    scores: np.ndarray
    kept: np.ndarray
    captions: Sequence[str]

    @property
    def kept_per_view(self) -> list[int]:
        """Kept tokens of each view."""
        return [int(view.sum()) for view in np.split(self.kept, self.geometry.starts[1:])]

    @property
    def drawn(self) -> tuple[int, ...]:
        """Indices of the views that are drawn on the image: the crops, or the only view."""
        return self.geometry.crops or (0,)

    @property
    def thumbnail(self) -> ViewGrid:
        """The view of `scores`."""
        return self.geometry.views[self.geometry.thumbnail or 0]

    def covered(self) -> np.ndarray:
        """Which tokens of the drawn views were kept, where they show the image, bool (h, w)."""
        first = self.geometry.views[self.drawn[0]]
        covered = np.zeros((first.height, first.width), dtype=bool)
        parts = np.split(self.kept, self.geometry.starts[1:])
        for index in self.drawn:
            view = self.geometry.views[index]
            kept = parts[index].reshape(view.rows, view.columns)
            top, left = max(0, view.top), max(0, view.left)
            bottom = max(top, min(view.top + view.rows, first.height))
            right = max(left, min(view.left + view.columns, first.width))
            covered[top:bottom, left:right] = kept[
                top - view.top : bottom - view.top, left - view.left : right - view.left
            ]
        return covered


def _drawable(text: str) -> str:
    """Text without what a model may write and the font lacks: controls, or Chinese."""
    letters = get_font(findfont(FontProperties())).get_charmap()
    printable = (char if char.isprintable() else " " for char in text)
    return "".join(char if ord(char) in letters else MISSING for char in printable)


@dataclass(frozen=True)
class Panel:
    """A single panel: its title, and the image as WebP."""

    title: str
    webp: bytes


def heat_map(token_maps: Sequence[TokenMap]) -> bytes:
    """The four panels of each image of a row as one PNG, with what is said about the row."""
    texts = [text for token_map in token_maps for text in token_map.captions]
    lines = [line for text in texts for line in textwrap.wrap(_drawable(text), LINE)]
    heights = [_height(token_map, WIDTH_INCHES / 2) for token_map in token_maps]
    size = (WIDTH_INCHES, 2 * sum(height + 0.4 for height in heights) + 0.2 * len(lines) + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    with mpl.rc_context({"text.parse_math": False}):
        figure.suptitle("\n".join(lines), fontsize=10, ha="left", x=0.02)
        ratios = [height for height in heights for _ in range(2)]
        grid = figure.subplots(2 * len(token_maps), 2, height_ratios=ratios)
        for index, token_map in enumerate(token_maps):
            for axes, draw in zip(grid[2 * index : 2 * index + 2].flat, _PANELS, strict=True):
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
    view = token_map.thumbnail
    scores = token_map.scores.reshape(view.rows, view.columns)
    axes.imshow(scores, extent=(0, width, height, 0), cmap="viridis", alpha=0.65)
    low, high = (f"{end:.2g}" for end in (scores.min(), scores.max()))
    whose = "thumbnail" if token_map.geometry.thumbnail is not None else "only view"
    return f"the {whose}'s scores: {low} (dark) to {high} (yellow)"


def _budgets(axes: Axes, token_map: TokenMap) -> str:
    """The share that each drawn view keeps of its own tokens."""
    geometry, kept = token_map.geometry, token_map.kept_per_view
    full = geometry.valid_per_view
    shares = [kept[index] / max(1, full[index]) for index in token_map.drawn]
    most, colours = max(shares) or 1.0, mpl.colormaps["cividis"]
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_box_aspect(_height(token_map, SINGLE_INCHES) / SINGLE_INCHES)
    size = mpl.rcParams["font.size"] * min(1.0, 3 / len(shares) ** 0.5)
    for number, (index, share) in enumerate(zip(token_map.drawn, shares, strict=True), start=1):
        top, left, bottom, right = np.clip(geometry.views[index].box, 0, 1)
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, facecolor=colours(share / most))
        )
        name = f"crop {number}" if len(geometry.views) > 1 else "only view"
        text = f"{name}\n{kept[index]} of {full[index]}\n{share:.1%}"
        colour = "white" if share < most / 2 else "black"
        middle = (left + right) / 2, (top + bottom) / 2
        axes.text(*middle, text, ha="center", va="center", color=colour, fontsize=size)
    if geometry.thumbnail is None or not geometry.crops:
        return f"tokens kept of the only view: {kept[0]} of {full[0]}"
    of_thumbnail = f"{kept[geometry.thumbnail]} of {full[geometry.thumbnail]}"
    return f"tokens kept in each crop; in the thumbnail {of_thumbnail}"


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
    what = "crops" if len(token_map.geometry.views) > 1 else "only view"
    return f"tokens kept in the {what}: {int(kept.sum())} of {kept.size}"


_PANELS: tuple[Callable[[Axes, TokenMap], str], ...] = (_image, _scores, _budgets, _kept)
