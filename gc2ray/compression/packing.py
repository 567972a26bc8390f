"""`Packing`: the newlines and positions of a selection in the language model's input.

The default is the paper's, and needs no work: tokens are numbered 0..T-1 as they are read, and the
newlines are those that the method emits, one per canvas row that keeps a token.

A selection does not say which canvas row a newline closes; it follows from their number. Where
there is one for each row of the canvas (`globalcom2-reference`) or for each row that the image
covers (retention 1.0), they close those rows in order. Else a newline closes the row of the crop
token before it, or the first covered row where there is none. A token's original position is that
of its own row, even where the reference writes the token to another.

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
"""The row of the thumbnail's tokens: before the canvas."""


@dataclass(frozen=True)
class Packing:
    """Settings of packing.

    Attributes:
        positions: `compact` numbers tokens 0..T-1 as they are read. `original` gives each token the
            position that it would have if nothing were dropped, bare newlines included.
        newlines: `kept_rows` keeps the newlines that the method emits. `all` puts one behind every
            canvas row that the image covers, `none` puts none.
    """

    positions: Positions = "compact"
    newlines: Newlines = "kept_rows"

    def apply(self, views: Sequence[Views], selections: Sequence[Selection]) -> list[Selection]:
        """The selections with the newlines of this packing; tokens stay in their order."""
        if self.newlines == "kept_rows":
            return list(selections)
        if self.newlines == "none":
            return [_without_newlines(selection) for selection in selections]
        return [_with_all_newlines(*pair) for pair in zip(views, selections, strict=True)]

    def original_positions(
        self, views: Sequence[Views], selections: Sequence[Selection]
    ) -> list[OriginalPositions | None]:
        """Positions of what `apply` returned, one per image; None where they are compact."""
        if self.positions == "compact":
            return [None] * len(selections)
        return [_original_positions(*pair) for pair in zip(views, selections, strict=True)]


@dataclass(frozen=True, eq=False)
class _Uncompressed:
    """Positions in an uncompressed image; made once per geometry and device.

    Attributes:
        rows: Canvas row of each token, int64 (V * N,); the thumbnail's is `THUMBNAIL_ROW`.
        tokens: Position of each token in the sequence, int64 (V * N,).
        newlines: Position of each canvas row's newline, int64 (R,).
        length: Tokens and newlines of the sequence.

    Padding, which is not in the sequence, has the position of the token before it.
    """

    rows: Tensor
    tokens: Tensor
    newlines: Tensor
    length: int


@lru_cache(maxsize=4096)
def _uncompressed(canvas: Canvas, thumbnail: int | None, device: torch.device) -> _Uncompressed:
    index = canvas_index(canvas, thumbnail, device)
    order, newline = index.order.long(), index.order == NEWLINE
    present = torch.where(newline, index.image_rows, index.valid.flatten()[order.clamp_min(0)])
    positions = (present.cumsum(0) - 1).clamp_min(0)
    canvas_rows = canvas.grid[0] * canvas.side[0]
    row_of = index.row_of.masked_fill(index.row_of == canvas_rows, THUMBNAIL_ROW)
    by_token = order[~newline].argsort()
    return _Uncompressed(
        rows=row_of[~newline][by_token],
        tokens=positions[~newline][by_token],
        newlines=positions[newline],
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


def _original_positions(views: Views, selection: Selection) -> OriginalPositions:
    whole, source = _whole(views), selection.token_index
    newline = source == NEWLINE
    closed = _lines(views, source).masked_fill(~newline, 0)
    index = torch.where(newline, whole.newlines[closed], whole.tokens[source.clamp_min(0)])
    return OriginalPositions(index, whole.length)


def _without_newlines(selection: Selection) -> Selection:
    token = selection.token_index != NEWLINE
    features = selection.features
    return Selection(selection.token_index[token], None if features is None else features[token])


def _with_all_newlines(views: Views, selection: Selection) -> Selection:
    """Each token moves behind the newlines of the covered rows before its own."""
    first, height = views.canvas.rows[0], views.canvas.height
    token = selection.token_index != NEWLINE
    lines = _lines(views, selection.token_index)[token]
    target = torch.arange(len(lines), device=lines.device) + (lines - first).clamp(0, height)
    source = selection.token_index.new_full((len(lines) + height,), NEWLINE)
    source[target] = selection.token_index[token]
    if selection.features is None:
        return Selection(source)
    features = selection.features.new_zeros(len(source), selection.features.shape[1])
    features[target] = selection.features[token]
    return Selection(source, features)
