"""Average pooling to the token budget: the honest downsampling baseline.

Each view's covered rectangle of h x w tokens becomes p x q, p = floor(h sqrt(r)), q as large as the
budget int(h w r) allows, at least one token; cells as in adaptive average pooling. Features are
averaged before the projector, save where a model's family projects all of them first. In the
sequence a pooled token has the position of the centre of its cell.

Not covered: pooling across crops; a crop edge stays a cell edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.compression.base import MaskCompressor, ViewBatch
from gc2ray.compression.geometry import Geometry
from gc2ray.compression.selection import Selection
from gc2ray.compression.views import Views


@dataclass(frozen=True)
class AveragePool(MaskCompressor):
    """Average neighbouring tokens until the budget holds."""

    name: ClassVar[str] = "pool"
    keeps_its_share: ClassVar[bool] = False  # it divides views into whole cells

    def many(self, images: Sequence[Views]) -> list[Selection]:
        selections = super().many(images)
        if self.retention == 1:
            return selections
        return [
            replace(selection, features=self._pooled(image))
            for image, selection in zip(images, selections, strict=True)
        ]

    def keep(self, batch: ViewBatch) -> Tensor:
        kept = torch.zeros_like(batch.valid)
        first = 0
        for image in batch.images:
            for view, cells in enumerate(self._cells(image.geometry)):
                kept[first + view, torch.from_numpy(cells.centres()).to(kept.device)] = True
            first += len(image.geometry.views)
        return kept

    def bounds(self, geometry: Geometry) -> tuple[int, int]:
        if self.retention == 1:
            return super().bounds(geometry)
        kept = sum(math.prod(cells.shape) for cells in self._cells(geometry))
        return kept, kept

    def _cells(self, geometry: Geometry) -> Iterator[_Cells]:
        for view, valid in zip(
            geometry.views, np.split(geometry.valid, geometry.starts[1:]), strict=True
        ):
            shown = valid.reshape(view.rows, view.columns)
            rows, columns = (_span(np.asarray(shown.any(axis=axis))) for axis in (1, 0))
            yield _Cells(rows, columns, view.columns, self._pooled_shape(rows, columns))

    def _pooled_shape(self, rows: tuple[int, int], columns: tuple[int, int]) -> tuple[int, int]:
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        if height * width == 0:
            return 0, 0
        budget = max(1, int(height * width * self.retention))
        pooled_rows = min(budget, max(1, math.floor(height * math.sqrt(self.retention))))
        return pooled_rows, min(width, budget // pooled_rows)

    def _pooled(self, image: Views) -> Tensor:
        """Features of the cells, put at the cells' centres."""
        pooled = image.features.clone()  # (N, D)
        views = zip(
            image.per_view(image.features), image.per_view(pooled), self._cells(image.geometry),
            strict=True,
        )  # fmt: skip
        for features, out, cells in views:
            if cells.shape[0] == 0:
                continue
            (top, bottom), (left, right) = cells.rows, cells.columns
            grid = features.view(-1, cells.width, features.shape[-1])[top:bottom, left:right]
            means = F.adaptive_avg_pool2d(grid.permute(2, 0, 1), cells.shape)  # (D, p, q)
            at = torch.from_numpy(cells.centres()).to(out.device)
            out[at] = means.flatten(1).transpose(0, 1)
        return pooled


@dataclass(frozen=True)
class _Cells:
    """The cells of a view.

    Attributes:
        rows: First and last-plus-one token row that may be kept.
        columns: Likewise.
        width: Token columns of the view.
        shape: Rows and columns of cells.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    width: int
    shape: tuple[int, int]

    def centres(self) -> np.ndarray:
        """Index of the token at each cell's centre; distinct, as cells are no more than tokens."""
        rows, columns = (
            span[0] + (np.arange(parts) * 2 + 1) * (span[1] - span[0]) // max(2 * parts, 1)
            for span, parts in zip((self.rows, self.columns), self.shape, strict=True)
        )
        index: np.ndarray = (rows[:, None] * self.width + columns[None, :]).ravel()
        return index


def _span(shown: np.ndarray) -> tuple[int, int]:
    """First and last-plus-one True of a mask whose True are neighbours; (0, 0) if there is none."""
    where = np.flatnonzero(shown)
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
