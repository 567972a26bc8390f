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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.compression.base import MaskCompressor, ViewBatch
from gc2ray.compression.geometry import Geometry
from gc2ray.compression.selection import share_of, top_k_mask
from gc2ray.compression.views import Views

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

    def bounds(self, geometry: Geometry) -> tuple[int, int]:
        """The thumbnail keeps its share; crops divide theirs, which hardly changes the sum.

        With the whole softmax on one crop the sum is largest or smallest, as it is concave in it
        (shares are clipped at 1); rounding down takes less than a token of each crop.
        """
        if geometry.thumbnail is None or not geometry.crops or self.retention == 1:
            return super().bounds(geometry)
        crops = [geometry.valid_per_view[crop] for crop in geometry.crops]
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
        own = self.share(geometry.valid_per_view[geometry.thumbnail])
        return own + low, own + max(low, high)

    def keep(self, batch: ViewBatch) -> Tensor:
        budgets = torch.full_like(batch.counts, self.retention, dtype=torch.float64)
        budgets[batch.crops] = crop_scales(batch, self.retention, self.temperature)
        return top_k_mask(combined_scores(batch), share_of(batch.counts, budgets))


def crop_scales(batch: ViewBatch, retention: float, temperature: float) -> Tensor:
    """Retention of every crop, float64 (C,): retention * (1 + softmax - mean), clipped at 1.

    Source: the paper's section 3.2; sums in float64, which the fixtures need.
    """
    commanded, owner, crops = _commanded(batch), batch.crop_owner, len(batch.crops)
    if not commanded:
        return batch.scores.new_zeros(0, dtype=torch.float64)
    region, first = [], 0
    for image in commanded:
        region.append(image.index.region_of + first)
        first += len(image.geometry.crops)
    thumbnails = torch.cat([_thumbnail(image) for image in commanded])
    sums = thumbnails.new_zeros(crops, dtype=torch.float64)
    sums.index_add_(0, torch.cat(region), thumbnails.double())

    def per_image(values: Tensor) -> Tensor:
        return values.new_zeros(len(commanded)).index_add_(0, owner, values)

    peak = sums.new_full((len(commanded),), -torch.inf).scatter_reduce_(0, owner, sums, "amax")
    exps = ((sums - peak[owner]) / temperature).exp()
    softmax = exps / (per_image(exps) + EPSILON)[owner]
    mean = per_image(softmax) / per_image(torch.ones_like(softmax))
    return (retention * (1 + softmax - mean[owner])).clamp_max(1)


def combined_scores(batch: ViewBatch) -> Tensor:
    """The scores that rank tokens, (sum of V, N); padding at minus infinity.

    Thumbnails, and views that none commands, keep their own scores. Crops add two maps of unit
    length: their own scores, and the thumbnail's, sampled bilinearly at the centres of their
    tokens.
    """
    ranked = batch.valid_scores
    if len(batch.crops):
        padding = ~batch.valid[batch.crops]
        ranked[batch.crops] = (
            _unit(batch.scores[batch.crops], padding) + _unit(_guidance(batch), padding)
        ).masked_fill_(padding, -torch.inf)
    return ranked


def _guidance(batch: ViewBatch) -> Tensor:
    """The thumbnails' scores at the centres of the crops' tokens, (C, N)."""
    commanded = _commanded(batch)
    rows = _joined([image.index.row_weights for image in commanded])
    columns = _joined([image.index.column_weights for image in commanded])
    maps = [_thumbnail(image).view(1, *_shape(image)) for image in commanded]
    thumbnails = _joined(maps)[batch.crop_owner]
    # Products of small matrices take all geometries in one batch; F.interpolate takes one each.
    sampled = torch.bmm(torch.bmm(rows, thumbnails), columns.transpose(1, 2))  # (C, H, W)
    widths = [image.geometry.views[i].columns for image in commanded for i in image.geometry.crops]
    tokens, width = batch.valid.shape[1], sampled.shape[2]
    if min(widths) == width and sampled[0].numel() == tokens:
        return sampled.flatten(1)
    token = torch.arange(tokens, device=sampled.device)
    own = torch.tensor(widths, device=sampled.device).clamp_min(1)[:, None]
    at = (token // own * width + token % own).clamp_max(max(0, sampled[0].numel() - 1))
    return sampled.flatten(1).gather(1, at)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches of matrices as one, smaller ones with zeros behind."""
    height, width = (max(part.shape[axis] for part in parts) for axis in (1, 2))
    return torch.cat(
        [F.pad(part, (0, width - part.shape[2], 0, height - part.shape[1])) for part in parts]
    )


def _unit(scores: Tensor, padding: Tensor) -> Tensor:
    """Rows scaled to unit length over the tokens that are not padding."""
    return F.normalize(scores.masked_fill(padding, 0), dim=1)


def _commanded(batch: ViewBatch) -> list[Views]:
    """The images whose thumbnail commands crops."""
    return [
        image
        for image in batch.images
        if image.geometry.thumbnail is not None and image.geometry.crops
    ]


def _thumbnail(image: Views) -> Tensor:
    """The thumbnail's scores, (M,)."""
    return image.per_view(image.scores)[image.geometry.thumbnail or 0]


def _shape(image: Views) -> tuple[int, int]:
    view = image.geometry.views[image.geometry.thumbnail or 0]
    return view.rows, view.columns
