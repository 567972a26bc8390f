"""How a selection is laid out for the language model: its newlines, and its positions.

The paper's way is the default and no work: tokens are numbered 0..T-1 as they are read, and the
newlines are the method's own, one per canvas row that keeps a token. `Packing` says otherwise.

A selection does not say which canvas row a newline closes; it follows from their number. Where
there is one for each row of the canvas (`globalcom2-reference`) or for each row that the image
covers (retention 1.0), they close those rows in order. Else a newline closes the row of the crop
token before it, or the first covered row where there is none. Tokens stand on their own rows; the
reference writes them to others, but their places in the uncompressed image are their own.

Not covered: thumbnails that come last, newlines between the rows of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gc2ray.compression.canvas import NEWLINE, Canvas
from gc2ray.compression.canvas_index import canvas_index
from gc2ray.compression.selection import OriginalPositions, Selection
from gc2ray.compression.views import Views
from gc2ray.core.config.compression import Newlines, Positions

THUMBNAIL_ROW = -1
"""The row that the thumbnail's tokens stand on: before the canvas."""


@dataclass(frozen=True)
class Packing:
    """A policy of packing.

    Attributes:
        positions: `compact` numbers what is read 0..T-1. `original` gives each token the position
            that it would have if nothing were dropped, bare newlines included.
        newlines: `kept_rows` leaves what the method emits. `all` is one behind every canvas row
            that the image covers, `none` is none.
    """

    positions: Positions = "compact"
    newlines: Newlines = "kept_rows"

    def apply(self, views: Sequence[Views], selections: Sequence[Selection]) -> list[Selection]:
        """The selections with the newlines of this policy; tokens stay in their order."""
        if self.newlines == "kept_rows":
            return list(selections)
        if self.newlines == "none":
            return [_without_newlines(selection) for selection in selections]
        return [_with_all_newlines(*pair) for pair in zip(views, selections, strict=True)]

    def places(
        self, views: Sequence[Views], selections: Sequence[Selection]
    ) -> list[OriginalPositions | None]:
        """Places of what `apply` gave, one per image; None where tokens are numbered as read."""
        if self.positions == "compact":
            return [None] * len(selections)
        return [_places(*pair) for pair in zip(views, selections, strict=True)]


@dataclass(frozen=True, eq=False)
class _Uncompressed:
    """Where everything stands in an uncompressed image; made once per geometry and device.

    Attributes:
        rows: Canvas row of each token place, int64 (V * N,); the thumbnail's is `THUMBNAIL_ROW`.
        tokens: Place of each token in the sequence, int64 (V * N,).
        newlines: Place of each canvas row's newline, int64 (R,).
        length: Tokens and newlines of the sequence.

    What is not in the sequence, being padding, has the place of what stands before it.
    """

    rows: Tensor
    tokens: Tensor
    newlines: Tensor
    length: int


@lru_cache(maxsize=4096)
def _uncompressed(canvas: Canvas, thumbnail: int | None, device: torch.device) -> _Uncompressed:
    plan = canvas_index(canvas, thumbnail, device)
    order, newline = plan.order.long(), plan.order == NEWLINE
    present = torch.where(newline, plan.image_rows, plan.valid.flatten()[order.clamp_min(0)])
    places = (present.cumsum(0) - 1).clamp_min(0)
    canvas_rows = canvas.grid[0] * canvas.side[0]
    row_of = plan.row_of.masked_fill(plan.row_of == canvas_rows, THUMBNAIL_ROW)
    by_token = order[~newline].argsort()
    return _Uncompressed(
        rows=row_of[~newline][by_token],
        tokens=places[~newline][by_token],
        newlines=places[newline],
        length=int(present.sum()),
    )


def _whole(views: Views) -> _Uncompressed:
    return _uncompressed(views.canvas, views.thumbnail, views.scores.device)


def _lines(views: Views, source: Tensor) -> Tensor:
    """Canvas row that each token is written to and each newline closes, int64 (K,), ascending."""
    whole, canvas, newline = _whole(views), views.canvas, source == NEWLINE
    own = whole.rows[source.clamp_min(0)].masked_fill(newline, THUMBNAIL_ROW)
    closed_before = newline.cumsum(0) - newline.long()
    count = int(newline.sum())
    if count == len(whole.newlines):  # one for each row of the canvas: rows are counted
        return torch.where((own == THUMBNAIL_ROW) & ~newline, own, closed_before)
    lines = own.cummax(0).values
    if count == canvas.height:  # one for each covered row
        return torch.where(newline, closed_before + canvas.rows[0], lines)
    return torch.where(newline, lines.clamp_min(canvas.rows[0]), lines)


def _places(views: Views, selection: Selection) -> OriginalPositions:
    whole, source = _whole(views), selection.source
    newline = source == NEWLINE
    closed = _lines(views, source).masked_fill(~newline, 0)
    index = torch.where(newline, whole.newlines[closed], whole.tokens[source.clamp_min(0)])
    return OriginalPositions(index, whole.length)


def _without_newlines(selection: Selection) -> Selection:
    token = selection.source != NEWLINE
    features = selection.features
    return Selection(selection.source[token], None if features is None else features[token])


def _with_all_newlines(views: Views, selection: Selection) -> Selection:
    """Each token moves behind the newlines of the covered rows before its own."""
    first, height = views.canvas.rows[0], views.canvas.height
    token = selection.source != NEWLINE
    lines = _lines(views, selection.source)[token]
    target = torch.arange(len(lines), device=lines.device) + (lines - first).clamp(0, height)
    source = selection.source.new_full((len(lines) + height,), NEWLINE)
    source[target] = selection.source[token]
    if selection.features is None:
        return Selection(source)
    features = selection.features.new_zeros(len(source), selection.features.shape[1])
    features[target] = selection.features[token]
    return Selection(source, features)
