"""`GeometryIndex`: the tensors that follow from a geometry, made once per geometry and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gc2ray.compression.geometry import LITERAL, NEWLINE, Geometry, ViewGrid

CACHED = 1024
"""Geometries whose tensors are kept: up to 100 KB each, and a job has few different ones."""


@dataclass(frozen=True, eq=False)
class GeometryIndex:
    """Index tensors of a geometry. The lines are those that its learned newlines close.

    Attributes:
        entries: int32 (E,), the layout.
        line_of: int64 (E,), the line of each entry; the last is that of entries in no line, above
            all the thumbnail's tokens.
        lines: Lines, the last one included.
        valid: bool (N,), tokens that may be kept.
        spans: int64 (E, 2), of each literal the first view it stands for and one behind the last.
        region_of: int64 (M,), of each thumbnail token the crop in whose region it lies, counted
            among the crops; empty without a thumbnail or crops.
        row_weights: float32 (C, H, h): bilinear weights, crop token row from thumbnail row; rows
            behind those of a crop are zero. H is at least 1, even where no crop has a token.
        column_weights: float32 (C, W, w), bilinear weights of columns, likewise.
    """

    entries: Tensor
    line_of: Tensor
    lines: int
    valid: Tensor
    spans: Tensor
    region_of: Tensor
    row_weights: Tensor
    column_weights: Tensor


@lru_cache(maxsize=CACHED)
def geometry_index(geometry: Geometry, device: torch.device) -> GeometryIndex:
    """The index tensors of a geometry, cached."""
    line_of, lines = _lines(geometry)

    def tensor(values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values.copy()).to(device)

    return GeometryIndex(
        entries=tensor(geometry.entries),
        line_of=tensor(line_of),
        lines=lines,
        valid=tensor(geometry.valid),
        spans=tensor(_spans(geometry)),
        region_of=_regions(geometry).to(device),
        row_weights=_weights(geometry, axis=0).to(device),
        column_weights=_weights(geometry, axis=1).to(device),
    )


def _lines(geometry: Geometry) -> tuple[npt.NDArray[np.int64], int]:
    """The line of each entry, and the number of lines; a newline closes the line before it."""
    newline = geometry.entries == NEWLINE
    count = int(newline.sum())
    line_of = np.cumsum(newline) - newline  # newlines before the entry
    first = 0 if geometry.thumbnail is None else geometry.starts[geometry.thumbnail]
    stop = first + (0 if geometry.thumbnail is None else geometry.counts[geometry.thumbnail])
    outside = (geometry.entries >= first) & (geometry.entries < stop)
    line_of[outside | (geometry.entries <= LITERAL)] = count
    return line_of.astype(np.int64), count + 1


def _spans(geometry: Geometry) -> npt.NDArray[np.int64]:
    spans = np.tile(np.array([0, len(geometry.views)]), (len(geometry.entries), 1))
    if geometry.spans:
        spans = np.frombuffer(geometry.spans, dtype=np.int16).reshape(-1, 2).astype(np.int64)
        spans[:, 1] += 1
    return spans.astype(np.int64)


def _regions(geometry: Geometry) -> Tensor:
    """The crop of each thumbnail token.

    On a canvas these are equal parts of the thumbnail, whatever the padding, and the last takes the
    remainder, as the paper has it. Elsewhere it is the crop that shows the token's centre.
    """
    if geometry.thumbnail is None or not geometry.crops:
        return torch.zeros(0, dtype=torch.int64)
    own, canvas = geometry.views[geometry.thumbnail], geometry.canvas
    if canvas is not None:
        rows, columns = (
            _equal_parts(own.rows, canvas.grid[0]),
            _equal_parts(own.columns, canvas.grid[1]),
        )
        return (rows[:, None] * canvas.grid[1] + columns[None, :]).flatten()
    centres_y = (np.arange(own.rows) + 0.5) / own.rows
    centres_x = (np.arange(own.columns) + 0.5) / own.columns
    distances = []
    for index in geometry.crops:
        top, left, bottom, right = geometry.views[index].box
        outside_y = np.maximum(0, np.maximum(top - centres_y, centres_y - bottom))
        outside_x = np.maximum(0, np.maximum(left - centres_x, centres_x - right))
        distances.append(outside_y[:, None] + outside_x[None, :])
    nearest = np.stack(distances).argmin(axis=0).ravel()  # the first of equals; 0 where it is shown
    return torch.from_numpy(nearest)


def _equal_parts(side: int, parts: int) -> Tensor:
    return (torch.arange(side) // max(side // parts, 1)).clamp_max(parts - 1)


def _weights(geometry: Geometry, axis: int) -> Tensor:
    """Per crop, weights that read the thumbnail at the centres of the crop's tokens, along an axis.

    Bilinear, corners not aligned: token i of the image's n reads the thumbnail's s at
    (i + 1/2) s/n - 1/2. Rows of tokens that show no image are zero.
    """
    if geometry.thumbnail is None or not geometry.crops:
        return torch.zeros(0, 0, 0)
    own, crops = geometry.views[geometry.thumbnail], [geometry.views[i] for i in geometry.crops]
    side = (own.rows, own.columns)[axis]
    most = max(1, *(_along(view, axis)[0] for view in crops))
    weights = torch.zeros(len(crops), most, side)
    for crop, view in enumerate(crops):
        count, first, whole = _along(view, axis)
        index = torch.arange(count)
        covered = (index + first >= 0) & (index + first < whole)
        lines = index[covered]
        at = ((lines + first + 0.5) * (side / max(1, whole)) - 0.5).clamp_min(0)
        low = at.floor().long().clamp_max(side - 1)
        high = (low + 1).clamp_max(side - 1)
        weights[crop].index_put_((lines, low), 1 - (at - low), accumulate=True)
        weights[crop].index_put_((lines, high), at - low, accumulate=True)
    return weights


def _along(view: ViewGrid, axis: int) -> tuple[int, int, int]:
    """Tokens of a view along an axis, the place of the first in the image, and the image's."""
    if axis == 0:
        return view.rows, view.top, view.height
    return view.columns, view.left, view.width
