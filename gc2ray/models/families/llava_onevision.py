"""LLaVA-OneVision: LLaVA-NeXT's crops, whose canvas is scaled down where it has many tokens.

An image alone in its prompt is cut as in LLaVA-NeXT. A canvas with over 1.21 times the tokens that
the config's `vision_aspect_ratio` allows is scaled down, bilinearly, behind the projector, so that
all tokens have to be projected. A scaled token mixes its neighbours, also across crops, and belongs
to the crop in which its centre lies; a crop may have none. Of several images in a prompt each is
one view, padded to a square, with a newline behind it.

Not covered: videos.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import Geometry, ViewGrid, closed_lines
from gc2ray.models.families.llava_next import LlavaNext, LlavaNextVision
from gc2ray.models.image_processor import AnyRes, Cut, Pad, Resize
from gc2ray.models.processor import Processor

LARGEST_RATIO = 1.1  # a canvas with sides so many times longer than allowed is left as it is


@dataclass(frozen=True)
class SquareOrAnyRes(AnyRes):
    """LLaVA-NeXT's cropping of an image alone in its prompt; each of several is one square."""

    cuts_several_differently = True

    def cut(self, size: tuple[int, int], *, alone: bool = True) -> Cut:
        """See `Cropping.cut`."""
        if alone:
            return super().cut(size)
        square = Pad(max(size), max(size), tuple(int(255 * mean) for mean in self.mean))
        return Cut((square, Resize(self.tile, self.tile)), grid=(1, 1), thumbnail=None)


class LlavaOnevision(LlavaNext):
    """Cropping and geometry; see `gc2ray.models.base.Family`."""

    def __init__(self, config: Any, processor: Processor) -> None:
        super().__init__(config, processor)
        self.cropping = SquareOrAnyRes(**vars(self.cropping))
        self.tower = replace(self.tower, projects_all=True)
        self._allowed_views = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))

    def geometry(self, size: tuple[int, int], *, alone: bool = True) -> Geometry:
        """A thumbnail and the crops of a canvas, or the one view of an image among several."""
        if alone:
            canvas = self.canvas(size)
            return scaled_geometry(canvas, self._scaled(canvas))
        (top, bottom), (left, right) = (_shown(edge, max(size), self._side[0]) for edge in size)
        return square_geometry(ViewGrid(*self._side, -top, -left, bottom - top, right - left))

    def _scaled(self, canvas: Canvas) -> tuple[int, int]:
        """Rows and columns of the scaled canvas, rounded as in transformers."""
        height, width = canvas.height, canvas.width
        ratio = math.sqrt(height * width / (self._allowed_views * canvas.side[0] ** 2))
        if ratio > LARGEST_RATIO:
            return int(height // ratio), int(width // ratio)
        return height, width


@lru_cache(maxsize=1024)
def scaled_geometry(canvas: Canvas, scaled: tuple[int, int]) -> Geometry:
    """The thumbnail, then the rows of a canvas that is scaled to `scaled` rows and columns."""
    rows = _edges(canvas.rows, canvas.side[0], canvas.grid[0], scaled[0])
    columns = _edges(canvas.columns, canvas.side[1], canvas.grid[1], scaled[1])
    views = [ViewGrid.whole(*canvas.side)]
    views += [
        ViewGrid(bottom - top, right - left, top, left, *scaled)
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]
    places = np.arange(scaled[0] * scaled[1]).reshape(scaled)
    order = np.concatenate([_part(places, view).ravel() for view in views[1:]])
    lines = order.argsort().reshape(scaled) + views[0].tokens
    return closed_lines(views, 0, lines)


@lru_cache(maxsize=1024)
def square_geometry(view: ViewGrid) -> Geometry:
    """A view with a newline behind it."""
    return closed_lines([view], None, np.arange(view.tokens)[None])


def _edges(covered: tuple[int, int], side: int, crops: int, scaled: int) -> list[int]:
    """Along an axis, the first scaled token with its centre in each crop, and the end of all."""
    places = (2 * np.arange(scaled) + 1) * (covered[1] - covered[0])  # in tokens, times 2 * scaled
    borders = 2 * scaled * (side * np.arange(crops + 1) - covered[0])
    return [int(edge) for edge in places.searchsorted(borders)]


def _shown(edge: int, longest: int, tokens: int) -> tuple[int, int]:
    """First and last-plus-one token of a square that show any of the image in its middle."""
    before = (longest - edge) // 2
    return before * tokens // longest, -(-(before + edge) * tokens // longest)


class LlavaOnevisionVision(LlavaNextVision):
    """Tower and projector of a `LlavaOnevisionForConditionalGeneration`; see `VisionSide`."""

    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `VisionSide`; features (V, N, D_text) are projected already."""
        features, scores = super().run(pixels)
        return super().project(features), scores

    def arranged(
        self, features: Tensor, scores: Tensor, geometry: Geometry, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """See `VisionSide`: the canvas is scaled, scores like features."""
        if geometry.thumbnail is None:
            return super().arranged(features, scores, geometry, size)
        canvas = self._family.canvas(size)
        tokens = _scaled_tokens(features, canvas, geometry)
        return tokens, _scaled_tokens(scores[..., None], canvas, geometry).flatten()

    def project(self, features: Tensor) -> Tensor:
        """See `VisionSide`; `run` has done it."""
        return features.clone()


def _scaled_tokens(values: Tensor, canvas: Canvas, geometry: Geometry) -> Tensor:
    """Values of the views' tokens, (V, N, C), as those of the geometry's, (tokens, C)."""
    (rows, columns), (height, width) = canvas.grid, canvas.side
    lines = values[1:].view(rows, columns, height, width, -1).permute(4, 0, 2, 1, 3)
    whole = lines.reshape(1, -1, rows * height, columns * width)
    whole = whole[..., slice(*canvas.rows), slice(*canvas.columns)]
    scaled = geometry.views[1].height, geometry.views[1].width
    if whole.shape[2:] != scaled and min(scaled) > 0:
        whole = F.interpolate(whole, scaled, mode="bilinear")
    crops = [_part(whole[0], view).flatten(1).transpose(0, 1) for view in geometry.views[1:]]
    return torch.cat([values[0], *crops])


def _part(values: Any, view: ViewGrid) -> Any:
    """Values of a canvas, (..., rows, columns), of the tokens of a view."""
    rows = slice(view.top, view.top + view.rows)
    return values[..., rows, view.left : view.left + view.columns]
