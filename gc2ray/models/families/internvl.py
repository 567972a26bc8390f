"""InternVL3 and InternVL3.5: views of InternViT, whose patches are merged in square blocks.

An image is stretched to the grid of views whose aspect ratio is nearest to its own. The thumbnail
comes last; an image of a single view has none. One mark stands before the tokens of all views, and
one behind. A block's score is the mean of its patches'.

Not covered: videos, views that are not square, features of several layers (nor by transformers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from gc2ray.compression.geometry import Geometry, ViewGrid, crop_views, literal
from gc2ray.core.config.compression import Score
from gc2ray.models.base import Family, VisionSide
from gc2ray.models.image_processor import Cut, Resize, ViewPixels, view_pixels
from gc2ray.models.layers.tower import hidden_states, in_blocks
from gc2ray.models.processor import Processor
from gc2ray.models.shape import Tower


@dataclass(frozen=True)
class StretchedGrid(ViewPixels):
    """GOT-OCR2's cropping, which InternVL's processor always turns on, whatever the files say.

    Attributes:
        least: Crops of an image at least.
        most: Crops of an image at most.
    """

    least: int
    most: int

    def cut(self, size: tuple[int, int], *, alone: bool = True) -> Cut:  # noqa: ARG002
        """See `Cropping.cut`."""
        rows, columns = grid = self.grid(size)
        canvas = Resize(rows * self.tile, columns * self.tile)
        return Cut((canvas,), grid, thumbnail=rows * columns if grid != (1, 1) else None)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Crop rows and columns: of equally near ratios the most that the image fills by half."""
        height, width = size
        grids = _grids(self.least, self.most)
        gaps = [abs(width / height - columns / rows) for rows, columns in grids]
        least = min(gaps)
        nearest = [grid for grid, gap in zip(grids, gaps, strict=True) if gap == least]
        pixels, tile = height * width, self.tile**2
        return next((g for g in nearest[:0:-1] if math.prod(g) * tile < 2 * pixels), nearest[0])


@lru_cache(maxsize=1024)
def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns that crops may stand in, few crops first, then few columns."""
    sides = range(1, most + 1)
    grids = [(row, column) for column in sides for row in sides if least <= row * column <= most]
    return tuple(sorted(grids, key=math.prod)) or ((1, 1),)


@lru_cache(maxsize=1024)
def _geometry(grid: tuple[int, int], side: int, marks: tuple[int, ...]) -> Geometry:
    """Crops, a thumbnail behind several, and marks at both ends."""
    views = crop_views(grid, (side, side))
    thumbnail = len(views) if len(views) > 1 else None
    if thumbnail is not None:
        views.append(ViewGrid.whole(side, side))
    start, end = map(literal, marks)
    return Geometry.from_entries(views, thumbnail, [start, *range(len(views) * side**2), end])


class InternVL(Family):
    """Cropping and geometry; see `gc2ray.models.base.Family`."""

    cropping: StretchedGrid
    stock_arguments = MappingProxyType({"crop_to_patches": True})

    def __init__(self, config: Any, processor: Processor) -> None:
        vision, images = config.vision_config, processor.image_processor
        tokenizer, layers = processor.tokenizer, vision.num_hidden_layers
        tile, patch = vision.image_size[0], vision.patch_size[0]
        self.cropping = StretchedGrid(
            **vars(view_pixels(images, tile)), least=images.min_patches, most=images.max_patches
        )
        self.processor, self.image_token_id = processor, processor.image_token_id
        self.markers = (tokenizer.start_image_token, tokenizer.end_image_token)
        self._marks = tuple(tokenizer.convert_tokens_to_ids(list(self.markers)))
        named = config.vision_feature_layer
        self.state = named if named >= 0 else layers + 1 + named
        self.merge = round(1 / config.downsample_ratio)
        self.side = tile // patch // self.merge
        block, text = self.merge**2, config.text_config.hidden_size
        self.tower = Tower(
            layers,
            max(self.state, layers - 1),
            vision.hidden_size,
            vision.intermediate_size,
            patches=self.side**2 * block,
            pixels=vision.num_channels * patch**2,
            text_width=text,
            merge=block,
            layers_behind=((block * vision.hidden_size, text), (text, text)),
        )

    def geometry(self, size: tuple[int, int], *, alone: bool = True) -> Geometry:  # noqa: ARG002
        """See `Family.geometry`."""
        return _geometry(self.cropping.grid(size), self.side, self._marks)


class InternVLVision(VisionSide):
    """Tower and projector of an `InternVLForConditionalGeneration`; see `VisionSide`."""

    def __init__(self, model: Any, family: InternVL, score: Score) -> None:
        inner, self._tower, self._family = model.model, model.model.vision_tower, family
        super().__init__(self._tower.encoder.layer, inner.multi_modal_projector, family, score)
        behind_norm = model.config.vision_feature_layer == -1  # any other is a layer's plain output
        self._norm = self._tower.layernorm if behind_norm else nn.Identity()

    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `VisionSide`; features (V, tokens, D of a block's patches) are not projected yet."""
        family, last = self._family, len(self.layers) - 1
        states = hidden_states(self.layers, self._tower.embeddings(pixels), {family.state, last})
        features = self._norm(states[family.state])[:, 1:]
        scores = self.scores(states[last], features)[..., None]
        merged, scores = (in_blocks(each, family.side, family.merge) for each in (features, scores))
        return merged.flatten(2), scores.mean((2, 3))
