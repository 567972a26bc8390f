"""`CanvasIndex`: the index tensors that follow from the geometry of a canvas.

They are made once per geometry and device, as a job has few different ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gc2ray.compression.canvas import NEWLINE, Canvas


@dataclass(frozen=True, eq=False)
class CanvasIndex:
    """Index tensors of a canvas, with a thumbnail or without.

    Attributes:
        valid: bool (V, N).
        valid_per_view: Valid tokens of each view.
        order: int32 (E,): every token of the image and every newline in emitted order, padding
            included, newlines as `NEWLINE`; thumbnail, then canvas rows.
        row_of: int64 (E,): canvas row of each entry; the thumbnail has an extra row, the last.
        image_rows: bool (E,): entries on canvas rows that the image covers, and the thumbnail.
        region_of: int64 (N,): crop of the region that each thumbnail token lies in.
        row_weights: float32 (C, h, h): bilinear weights, crop token row from thumbnail row.
        column_weights: float32 (C, w, w): bilinear weights of columns, likewise.
    """

    valid: Tensor
    valid_per_view: tuple[int, ...]
    order: Tensor
    row_of: Tensor
    image_rows: Tensor
    region_of: Tensor
    row_weights: Tensor
    column_weights: Tensor


@lru_cache(maxsize=4096)
def canvas_index(canvas: Canvas, thumbnail: int | None, device: torch.device) -> CanvasIndex:
    """The index tensors of a geometry, cached."""
    valid = _valid(canvas, thumbnail)
    order, row_of = _emission(canvas, thumbnail)
    rows = torch.arange(canvas.grid[0] * canvas.side[0] + 1)
    covered = (rows >= canvas.rows[0]) & (rows < canvas.rows[1])
    covered[-1] = True
    return CanvasIndex(
        valid=valid.to(device),
        valid_per_view=tuple(valid.sum(dim=1).tolist()),
        order=order.to(device=device, dtype=torch.int32),
        row_of=row_of.to(device),
        image_rows=covered[row_of].to(device),
        region_of=_regions(canvas).to(device),
        row_weights=_crop_weights(canvas, axis=0).to(device),
        column_weights=_crop_weights(canvas, axis=1).to(device),
    )


def _valid(canvas: Canvas, thumbnail: int | None) -> Tensor:
    crops = torch.zeros(canvas.crops, *canvas.side, dtype=torch.bool)
    for crop, ((top, bottom), (left, right)) in enumerate(canvas.crop_rectangles()):
        crops[crop, top:bottom, left:right] = True
    flat = crops.flatten(1)
    return flat if thumbnail is None else torch.cat([torch.ones_like(flat[:1]), flat])


def _emission(canvas: Canvas, thumbnail: int | None) -> tuple[Tensor, Tensor]:
    """Emitted order of all tokens and newlines, and the canvas row of each."""
    (grid_rows, grid_columns), (height, width) = canvas.grid, canvas.side
    tokens, rows = height * width, grid_rows * height
    first_crop = 0 if thumbnail is None else 1
    index = (torch.arange(canvas.crops * tokens) + first_crop * tokens).view(
        grid_rows, grid_columns, height, width
    )
    lines = index.permute(0, 2, 1, 3).reshape(rows, grid_columns * width)
    lines = torch.cat([lines, torch.full((rows, 1), NEWLINE)], dim=1)
    row_of = torch.arange(rows)[:, None].expand_as(lines).flatten()
    order = lines.flatten()
    if thumbnail is not None:
        order = torch.cat([torch.arange(tokens) + thumbnail * tokens, order])
        row_of = torch.cat([torch.full((tokens,), rows), row_of])
    return order, row_of


def _regions(canvas: Canvas) -> Tensor:
    """Equal parts of the thumbnail, one per crop; the last takes the remainder."""

    def part(side: int, parts: int) -> Tensor:
        return (torch.arange(side) // max(side // parts, 1)).clamp_max(parts - 1)

    rows, columns = part(canvas.side[0], canvas.grid[0]), part(canvas.side[1], canvas.grid[1])
    return (rows[:, None] * canvas.grid[1] + columns[None, :]).flatten()


def _crop_weights(canvas: Canvas, axis: int) -> Tensor:
    """Per crop, weights that resample the thumbnail to the covered canvas, along one axis.

    Bilinear, corners not aligned: output pixel i of n reads the thumbnail at (i + 1/2) s/n - 1/2.
    Rows of tokens that show no image are zero.
    """
    side = canvas.side[axis]
    first, stop = (canvas.rows, canvas.columns)[axis]
    weights = torch.zeros(canvas.grid[axis] * side, side)
    if stop > first:
        at = (torch.arange(stop - first) + 0.5) * (side / (stop - first)) - 0.5
        at = at.clamp_min(0)
        low = at.floor().long().clamp_max(side - 1)
        high = (low + 1).clamp_max(side - 1)
        lines = torch.arange(first, stop)
        weights.index_put_((lines, low), 1 - (at - low), accumulate=True)
        weights.index_put_((lines, high), at - low, accumulate=True)
    per_part = weights.view(canvas.grid[axis], side, side)
    others = canvas.grid[1 - axis]
    if axis == 0:
        return per_part.repeat_interleave(others, dim=0)
    return per_part.repeat(others, 1, 1)
