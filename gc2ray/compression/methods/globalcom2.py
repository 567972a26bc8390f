"""GlobalCom²: the thumbnail decides how many tokens each crop keeps, and which.

Liu et al., "Global Compression Commander", AAAI 2026, arXiv 2501.05179, section 3. The thumbnail
keeps its best-scored tokens. The scores in its region of each crop, summed and put through a
softmax with `temperature`, raise or lower the crop's retention; within a crop the crop's own scores
and the thumbnail's, resampled to the crop, are each brought to unit length over the valid tokens
and added.

Where this differs from the authors' implementation (`globalcom2-reference` reproduces that), each
difference with its test in `tests/compression/test_compression.py`:

1. Thumbnail tokens are in raster order, not by score (`test_thumbnail_in_raster_order`).
2. Kept crop tokens have their true positions (`test_kept_tokens_stand_where_they_were`).
3. One newline per canvas row that keeps a token (`test_one_newline_per_row_that_keeps_a_token`).
4. Every view that shows anything keeps at least one token (`test_every_view_keeps_a_token`).
5. Padding is cut with transformers' rounding (`test_unpadding_rounds_as_transformers`).
6. Crop grids are those of the HF processor, which breaks ties for tiny images differently
   (`tests/models/test_image_processor.py`, agreement of `AnyRes` with transformers).
7. Images without any valid crop token do not raise (`test_extreme_aspect_ratios`).
8. Batches give what single images give (`test_many_equals_one_by_one`).
9. Retention 1.0 is the identity (`test_retention_one_is_the_identity`).
10. Ties go to the lower index (`test_ties_go_to_the_lower_index`).

Kept as they are, because the published numbers rest on them: regions are equal parts of the
thumbnail whatever the padding, their scores are summed, not averaged, and the share clipped at 1
is not redistributed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.compression.base import MaskCompressor, ViewBatch
from gc2ray.compression.canvas import Canvas
from gc2ray.compression.canvas_index import canvas_index
from gc2ray.compression.selection import share_of, top_k_mask

EPSILON = 1e-8
"""Added to the softmax's denominator, as in the paper's equation."""
ROUNDING = 1e-3
"""More than the rounding error of a sum of shares."""


@dataclass(frozen=True)
class GlobalCom2(MaskCompressor):
    """Keep the tokens that thumbnail and crop rank highest, in numbers that the thumbnail sets.

    Attributes:
        temperature: Temperature of the softmax over the crops' summed scores; larger is more even.
    """

    name: ClassVar[str] = "globalcom2"
    temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}")

    def bounds(self, canvas: Canvas) -> tuple[int, int]:
        """The thumbnail keeps its share; crops divide theirs, which hardly changes the sum.

        With the whole softmax on one crop the sum is largest or smallest, as it is concave in it
        (shares are clipped at 1); rounding down takes less than a token of each crop.
        """
        thumbnail, *crops = canvas.tokens_per_view()
        if self.retention == 1:
            return thumbnail + sum(crops), thumbnail + sum(crops)
        views, covered = len(crops), sum(tokens > 0 for tokens in crops)

        def kept(favoured: int) -> float:
            scales = [self.retention * (1 + (i == favoured) - 1 / views) for i in range(views)]
            return sum(n * min(1.0, scale) for n, scale in zip(crops, scales, strict=True))

        least = min(kept(favoured) for favoured in range(views))
        base = self.retention * (1 - 1 / views)
        most = base * sum(crops) + self.retention * max(crops)
        lifted = sum(n > 0 and base * n < 1 for n in crops)  # may be raised to one token
        low = max(covered, math.ceil(least - ROUNDING) - covered)
        high = min(sum(crops), math.floor(most + ROUNDING) + lifted)
        own = self.share(thumbnail)
        return own + low, own + max(low, high)

    def keep(self, batch: ViewBatch) -> Tensor:
        budgets = torch.full_like(batch.counts, self.retention, dtype=torch.float64)
        budgets[batch.crops] = crop_scales(batch, self.retention, self.temperature)
        return top_k_mask(combined_scores(batch), share_of(batch.counts, budgets))


def crop_scales(batch: ViewBatch, retention: float, temperature: float) -> Tensor:
    """Retention of every crop, float64 (C,): retention * (1 + softmax - mean), clipped at 1.

    Source: the paper's section 3.2; sums in float64, which the fixtures need.
    """
    thumbnails, owner = _thumbnails(batch), batch.crop_owner
    images, crops = len(batch.images), len(batch.crops)
    region, first = [], 0
    for image in batch.images:
        index = canvas_index(image.canvas, image.thumbnail, image.scores.device)
        region.append(index.region_of + first)
        first += image.canvas.crops
    sums = thumbnails.new_zeros(crops, dtype=torch.float64)
    sums.index_add_(0, torch.cat(region), thumbnails.double().flatten())

    def per_image(values: Tensor) -> Tensor:
        return values.new_zeros(images).index_add_(0, owner, values)

    peak = sums.new_full((images,), -torch.inf).scatter_reduce_(0, owner, sums, "amax")
    exps = ((sums - peak[owner]) / temperature).exp()
    softmax = exps / (per_image(exps) + EPSILON)[owner]
    mean = per_image(softmax) / per_image(torch.ones_like(softmax))
    return (retention * (1 + softmax - mean[owner])).clamp_max(1)


def combined_scores(batch: ViewBatch) -> Tensor:
    """The scores that rank tokens, (sum of V, N); padding at minus infinity.

    Thumbnails keep their own scores. Crops add two maps of unit length: their own scores, and the
    thumbnail's, resampled bilinearly to the covered canvas.
    """
    images = batch.images
    indexes = [canvas_index(image.canvas, image.thumbnail, image.scores.device) for image in images]
    rows = torch.cat([index.row_weights for index in indexes])
    columns = torch.cat([index.column_weights for index in indexes])
    thumbnails = _thumbnails(batch)[batch.crop_owner].view(-1, *images[0].canvas.side)
    # Products of small matrices take all geometries in one batch; F.interpolate takes one each.
    guidance = torch.bmm(torch.bmm(rows, thumbnails), columns.transpose(1, 2)).flatten(1)
    padding = ~batch.valid[batch.crops]
    ranked = batch.valid_scores
    ranked[batch.crops] = (
        _unit(batch.scores[batch.crops], padding) + _unit(guidance, padding)
    ).masked_fill_(padding, -torch.inf)
    return ranked


def _unit(scores: Tensor, padding: Tensor) -> Tensor:
    """Rows scaled to unit length over the tokens that are not padding."""
    return F.normalize(scores.masked_fill(padding, 0), dim=1)


def _thumbnails(batch: ViewBatch) -> Tensor:
    """The thumbnails' scores, (B, N).

    Raises:
        ValueError: An image has none.
    """
    if any(image.thumbnail is None for image in batch.images):
        raise ValueError("globalcom2 needs a thumbnail; this image has crops only")
    return batch.scores[batch.thumbnails]
