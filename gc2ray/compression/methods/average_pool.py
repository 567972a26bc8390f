"""Average pooling to the token budget: the honest downsampling baseline.

Each view's covered rectangle of h x w tokens becomes p x q, p = floor(h sqrt(r)), q as large as the
budget int(h w r) allows, at least one token; cells as in adaptive average pooling. Features are
averaged before the projector. In the sequence a pooled token has the position of the centre of its
cell.

Not covered: pooling across crops; a crop edge stays a cell edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.compression.base import MaskCompressor, ViewBatch
from gc2ray.compression.canvas import Canvas
from gc2ray.compression.selection import Selection
from gc2ray.compression.views import Views


@dataclass(frozen=True)
class AveragePool(MaskCompressor):
    """Average neighbouring tokens until the budget holds."""

    name: ClassVar[str] = "pool"

    def many(self, images: Sequence[Views]) -> list[Selection]:
        selections = super().many(images)
        if self.retention == 1:
            return selections
        return [
            Selection(selection.token_index, self._pooled(image, selection.token_index))
            for image, selection in zip(images, selections, strict=True)
        ]

    def keep(self, batch: ViewBatch) -> Tensor:
        kept = torch.zeros_like(batch.valid)
        first = 0
        for image in batch.images:
            for view, rectangle in enumerate(_rectangles(image.canvas, image.thumbnail)):
                rows, columns = self._pooled_shape(rectangle)
                at_rows = _centres(rectangle[0], rows, kept.device)
                at_columns = _centres(rectangle[1], columns, kept.device)
                index = at_rows[:, None] * image.canvas.side[1] + at_columns[None, :]
                kept[first + view, index.flatten()] = True
            first += len(image.valid_per_view)
        return kept

    def bounds(self, canvas: Canvas) -> tuple[int, int]:
        if self.retention == 1:
            return super().bounds(canvas)
        kept = sum(
            math.prod(self._pooled_shape(rectangle))
            for rectangle in _rectangles(canvas, thumbnail=0)
        )
        return kept, kept

    def _pooled_shape(self, rectangle: tuple[tuple[int, int], tuple[int, int]]) -> tuple[int, int]:
        (top, bottom), (left, right) = rectangle
        height, width = bottom - top, right - left
        if height * width == 0:
            return 0, 0
        budget = max(1, int(height * width * self.retention))
        rows = min(budget, max(1, math.floor(height * math.sqrt(self.retention))))
        return rows, min(width, budget // rows)

    def _pooled(self, image: Views, source: Tensor) -> Tensor:
        """Features of the cells, put at the cells' centres and gathered like any selection."""
        pooled = image.features.clone()  # (V, N, D)
        height, width = image.canvas.side
        for view, rectangle in enumerate(_rectangles(image.canvas, image.thumbnail)):
            (top, bottom), (left, right) = rectangle
            shape = self._pooled_shape(rectangle)
            if shape[0] == 0:
                continue
            grid = image.features[view].view(height, width, -1)[top:bottom, left:right]
            cells = F.adaptive_avg_pool2d(grid.permute(2, 0, 1), shape)  # (D, p, q)
            at_rows = _centres(rectangle[0], shape[0], source.device)
            at_columns = _centres(rectangle[1], shape[1], source.device)
            index = (at_rows[:, None] * width + at_columns[None, :]).flatten()
            pooled[view, index] = cells.flatten(1).transpose(0, 1)
        return pooled.flatten(0, 1).index_select(0, source.clamp_min(0))


def _rectangles(
    canvas: Canvas, thumbnail: int | None
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Covered (rows, columns) of every view; the thumbnail is covered whole."""
    crops = canvas.crop_rectangles()
    if thumbnail is None:
        return crops
    return [((0, canvas.side[0]), (0, canvas.side[1])), *crops]


def _centres(span: tuple[int, int], parts: int, device: torch.device) -> Tensor:
    """Index of the middle of each of `parts` equal parts of a span; distinct, as parts <= span."""
    length = span[1] - span[0]
    return span[0] + (torch.arange(parts, device=device) * 2 + 1) * length // max(2 * parts, 1)
