"""`Geometry`: what follows from an image's size alone, for any model that cuts images into views.

Each view is a grid of visual tokens, as the language model counts them (after merging in the
tower), that shows some part of the image. The `layout` is what stock transformers puts in the
image's place in the prompt, entry by entry: visual tokens, learned newlines, literal tokens such as
`<row_1_col_2>`. What a compressor keeps is a selection of these entries.

Token numbers count the views' tokens one view after the other, each in raster order, padding
included. Sizes are (height, width), as in transformers.

Nothing here needs torch, so that counting tokens is cheap; the tensors that follow from a geometry
are in `gc2ray.compression.geometry_index`.

Not covered: views that overlap without covering the image, video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gc2ray.compression.canvas import Canvas

NEWLINE = -1
"""A learned newline in a layout."""
LITERAL = -2
"""The highest number that stands for a literal token in a layout; see `literal`."""

T = TypeVar("T")
Box = tuple[float, float, float, float]
"""Top, left, bottom, right, in heights and widths of the image."""
Spans = dict[int, tuple[int, int]]
"""The views of literal tokens by their place: first and last view."""


def literal(token_id: int) -> int:
    """A token of the tokenizer as an entry of a layout."""
    return LITERAL - token_id


@dataclass(frozen=True)
class ViewGrid:
    """The tokens of a view, and where they lie in the image.

    All numbers are tokens of this view. A token shows the image if its row is in [0, `height`) and
    its column in [0, `width`), counted from the image's corner; the others are padding.

    Attributes:
        rows: Token rows of the view.
        columns: Token columns of the view.
        top: Row of its first token in the image; negative where the view begins with padding.
        left: Column of its first token, likewise.
        height: Rows of the whole image.
        width: Columns of the whole image.
    """

    rows: int
    columns: int
    top: int
    left: int
    height: int
    width: int

    @staticmethod
    def whole(rows: int, columns: int) -> ViewGrid:
        """A view that shows the whole image, as thumbnails do."""
        return ViewGrid(rows, columns, 0, 0, rows, columns)

    @property
    def tokens(self) -> int:
        """Tokens of the view, padding included."""
        return self.rows * self.columns

    @property
    def box(self) -> Box:
        """The part of the image that the view shows; it leaves [0, 1] where it shows padding."""
        height, width = max(1, self.height), max(1, self.width)
        bottom, right = self.top + self.rows, self.left + self.columns
        return self.top / height, self.left / width, bottom / height, right / width

    def shows(self) -> npt.NDArray[np.bool_]:
        """Which tokens show the image, (rows * columns,)."""
        rows = np.arange(self.top, self.top + self.rows)
        columns = np.arange(self.left, self.left + self.columns)
        inside_rows = (rows >= 0) & (rows < self.height)
        inside_columns = (columns >= 0) & (columns < self.width)
        shown: npt.NDArray[np.bool_] = (inside_rows[:, None] & inside_columns[None, :]).ravel()
        return shown


@dataclass(frozen=True)
class Geometry:
    """Views and layout of an image; equal geometries have equal hashes.

    Attributes:
        views: The views, in the order of the tower.
        thumbnail: Index of the view that shows the whole image beside others, or None. It commands
            the budgets of the others.
        layout: int32 (E,) as bytes: what stock puts in the image's place, in order. A token number,
            `NEWLINE`, or `literal(token id)`.
        spans: int16 (E, 2) as bytes: of each literal the first and the last view that it stands
            for; empty: each stands for all views.
        canvas: The canvas that LLaVA-NeXT cuts its crops from; None in other models.
    """

    views: tuple[ViewGrid, ...]
    thumbnail: int | None
    layout: bytes
    spans: bytes = b""
    canvas: Canvas | None = None

    @staticmethod
    def from_entries(
        views: Sequence[ViewGrid],
        thumbnail: int | None,
        entries: npt.ArrayLike,
        spans: Spans | None = None,
        canvas: Canvas | None = None,
    ) -> Geometry:
        """A geometry from the numbers of its layout.

        Args:
            views: The views.
            thumbnail: Index of the thumbnail, or None.
            entries: The layout, (E,).
            spans: By place in the layout, the views that a literal stands for; all of them where it
                is not named.
            canvas: See `Geometry`.
        """
        layout = np.asarray(entries, dtype=np.int32)
        packed = b""
        if spans:
            owners = np.tile(np.array([0, len(views) - 1], dtype=np.int16), (len(layout), 1))
            for place, span in spans.items():
                owners[place] = span
            packed = owners.tobytes()
        return Geometry(tuple(views), thumbnail, layout.tobytes(), packed, canvas)

    @cached_property
    def entries(self) -> npt.NDArray[np.int32]:
        """The layout as numbers, (E,)."""
        return np.frombuffer(self.layout, dtype=np.int32)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each view, padding included."""
        return tuple(view.tokens for view in self.views)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Number of the first token of each view."""
        return tuple(accumulate(self.counts[:-1], initial=0))

    @property
    def tokens(self) -> int:
        """Tokens of all views, padding included."""
        return sum(self.counts)

    @property
    def crops(self) -> tuple[int, ...]:
        """Indices of the views other than the thumbnail."""
        return tuple(index for index in range(len(self.views)) if index != self.thumbnail)

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Tokens that may be kept, (N,): those that stand in the layout and show the image."""
        present = np.zeros(self.tokens, dtype=bool)
        present[self.entries[self.entries >= 0]] = True
        shown = np.concatenate([view.shows() for view in self.views])
        valid: npt.NDArray[np.bool_] = present & shown
        return valid

    @cached_property
    def valid_per_view(self) -> tuple[int, ...]:
        """Valid tokens of each view."""
        before = np.pad(self.valid.cumsum(), (1, 0))  # valid tokens before each token
        starts = np.array(self.starts)
        sums: list[int] = (before[starts + self.counts] - before[starts]).tolist()
        return tuple(sums)

    @cached_property
    def full_per_view(self) -> tuple[int, ...]:
        """Tokens of each view in the uncompressed prompt; some models keep padding there."""
        visual = self.entries[self.entries >= 0]
        views = np.searchsorted(self.starts, visual, side="right") - 1
        return tuple(np.bincount(views, minlength=len(self.views)).tolist())

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the uncompressed prompt."""
        return sum(self.full_per_view)

    @cached_property
    def newlines(self) -> int:
        """Learned newlines of the uncompressed image."""
        return int((self.entries == NEWLINE).sum())

    @cached_property
    def literals(self) -> int:
        """Literal tokens of the uncompressed image."""
        return int((self.entries <= LITERAL).sum())

    @cached_property
    def literal_ids(self) -> tuple[int, ...]:
        """The different literal tokens of the uncompressed image, by token id."""
        literals = self.entries[self.entries <= LITERAL]
        return tuple((LITERAL - np.unique(literals)).tolist())

    def thumbnail_first(self, per_view: Sequence[T]) -> tuple[T | None, ...]:
        """What belongs to each view, as the output lists it: thumbnail first, None if none."""
        first = None if self.thumbnail is None else per_view[self.thumbnail]
        return (first, *(per_view[index] for index in self.crops))


def crop_views(grid: tuple[int, int], side: tuple[int, int]) -> list[ViewGrid]:
    """Crops in raster order that cover the image exactly, without padding.

    Args:
        grid: Crop rows and columns.
        side: Token rows and columns of a crop.
    """
    (rows, columns), (height, width) = grid, side
    return [
        ViewGrid(height, width, row * height, column * width, rows * height, columns * width)
        for row in range(rows)
        for column in range(columns)
    ]


@lru_cache(maxsize=1024)
def canvas_geometry(canvas: Canvas, *, thumbnail: bool = True) -> Geometry:
    """The thumbnail, the crops of a canvas, and the canvas row by row with a newline behind each.

    Args:
        canvas: The canvas.
        thumbnail: Whether there is a thumbnail, before the crops.
    """
    (rows, columns), (height, width) = canvas.grid, canvas.side
    (top, bottom), (left, right) = canvas.rows, canvas.columns
    first = height * width * thumbnail
    views = [ViewGrid.whole(height, width)] * thumbnail
    views += [
        ViewGrid(
            height, width, row * height - top, column * width - left, canvas.height, canvas.width
        )
        for row in range(rows)
        for column in range(columns)
    ]
    lines = canvas_lines(canvas, first)[top:bottom, left:right]
    return closed_lines(views, 0 if thumbnail else None, lines, canvas)


def closed_lines(
    views: Sequence[ViewGrid],
    thumbnail: int | None,
    lines: npt.NDArray[np.integer],
    canvas: Canvas | None = None,
) -> Geometry:
    """A geometry with the thumbnail's tokens first, then lines with a newline behind each.

    Args:
        views: The views.
        thumbnail: 0, or None: there is none.
        lines: Token numbers, (lines, tokens of a line).
        canvas: See `Geometry`.
    """
    first = 0 if thumbnail is None else views[thumbnail].tokens
    closed = np.pad(lines, ((0, 0), (0, 1)), constant_values=NEWLINE)
    entries = np.concatenate([np.arange(first), closed.ravel()])
    return Geometry.from_entries(views, thumbnail, entries, canvas=canvas)


def canvas_lines(canvas: Canvas, first: int) -> npt.NDArray[np.int64]:
    """Token numbers of a canvas in its rows, (rows, columns), padding included.

    Args:
        canvas: The canvas.
        first: Number of the first crop's first token.
    """
    (rows, columns), (height, width) = canvas.grid, canvas.side
    index = np.arange(canvas.crops * height * width).reshape(rows, columns, height, width) + first
    return index.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
