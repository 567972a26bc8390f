"""One budget for all images of a row: those that differ most from the others keep more.

The rule is VidCom²'s for the frames of a video (arXiv 2505.14454): an image's share is raised or
lowered by the softmax over the images' uniqueness, minus the mean cosine of its tokens to the mean
of all images' tokens, at temperature 0.01. Shares are then scaled so that all images together keep
what they would keep of budgets of their own; what an image would get above all that it has goes to
the others. For images of a row nothing is published; docs/quality.md has what it brings to the
demo's models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.compression.base import Compressor
from gc2ray.compression.geometry import Geometry
from gc2ray.compression.selection import Selection, reading_order
from gc2ray.compression.views import Views

TEMPERATURE = 0.01


@dataclass(frozen=True)
class WholeShare(Compressor):
    """Keep all that an image of a compressed row shows: neither padding nor bare newlines."""

    name: ClassVar[str] = "whole-share"

    def many(self, images: Sequence[Views]) -> list[Selection]:
        if not images:
            return []
        return reading_order(images, torch.cat([image.index.valid for image in images]))

    def bounds(self, geometry: Geometry) -> tuple[int, int]:
        shown = sum(geometry.valid_per_view)
        return shown, shown


def row_shares(images: Sequence[Views], retention: float) -> list[float]:
    """The retention of each image of a row.

    Args:
        images: The row's images, encoded by one model.
        retention: Of the row, in (0, 1].
    """
    units = [F.normalize(_leading(image).float(), dim=-1) for image in images]
    mean = F.normalize(torch.cat([unit.mean(0, keepdim=True) for unit in units]).mean(0), dim=0)
    uniqueness = torch.stack([-(unit @ mean).mean() for unit in units])
    softmax = (uniqueness.double() / TEMPERATURE).softmax(0).tolist()
    counts = [sum(image.valid_per_view) for image in images]
    return scaled_shares([1 + share - 1 / len(images) for share in softmax], counts, retention)


def share_bounds(counts: Sequence[int], retention: float) -> list[tuple[float, float]]:
    """The least and the highest retention that each image of a row can get.

    An image gets most where it alone is unlike the others, and least where the largest of the
    others is. For the least, that other one is counted with its full share, also where it is above
    1: the overflow goes to the row's images only while one image takes it all, and not where two
    are somewhat unlike, so this is below every share that occurs.

    Args:
        counts: Tokens of each image that may be kept.
        retention: Of the row.
    """
    number, bounds = len(counts), []
    for image in range(number):
        most = scaled_shares(_favouring(image, number), counts, retention)[image]
        other = max((i for i in range(number) if i != image), key=counts.__getitem__)
        least = _scaled(_favouring(other, number), counts, retention * sum(counts))[image]
        bounds.append((min(1.0, least), most))
    return bounds


def _favouring(image: int, number: int) -> list[float]:
    """Weights of a row's images where one is unlike all others."""
    return [1 + (index == image) - 1 / number for index in range(number)]


def scaled_shares(weights: Sequence[float], counts: Sequence[int], retention: float) -> list[float]:
    """Retentions in the proportions of weights that keep as many tokens as one for all would.

    An image that would get more than it has keeps all of it; the others share what is left.

    Args:
        weights: Of each image.
        counts: Tokens of each image that may be kept.
        retention: The one for all.
    """
    shares = dict.fromkeys(range(len(weights)), 1.0)
    open_ = list(shares)
    while open_:
        whole = sum(counts[index] for index in shares if index not in open_)
        left = retention * sum(counts) - whole
        scaled = _scaled([weights[i] for i in open_], [counts[i] for i in open_], left)
        shares.update(zip(open_, (min(1.0, share) for share in scaled), strict=True))
        still = [index for index, share in zip(open_, scaled, strict=True) if share <= 1]
        if still == open_:
            break
        open_ = still
    return list(shares.values())


def _scaled(weights: Sequence[float], counts: Sequence[int], tokens: float) -> list[float]:
    """Shares in the proportions of weights that keep so many tokens, where they may be above 1."""
    weighted = sum(weight * count for weight, count in zip(weights, counts, strict=True))
    return [weight * tokens / weighted for weight in weights]


def _leading(image: Views) -> Tensor:
    """Features of the view that shows the whole image, or of all views, (M, D)."""
    features = image.per_view(image.features)
    if image.geometry.thumbnail is not None:
        return features[image.geometry.thumbnail]
    return image.features[image.index.valid]
