"""The thumbnail alone: the baseline that dynamic cropping has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gc2ray.compression.base import Compressor, ViewBatch
from gc2ray.compression.geometry import Geometry
from gc2ray.compression.selection import Selection, reading_order
from gc2ray.compression.views import Views


@dataclass(frozen=True)
class ThumbnailOnly(Compressor):
    """Drop all crops, keep the whole thumbnail; there is no retention to set.

    An image without a thumbnail has one view as a rule, and keeps it.
    """

    name: ClassVar[str] = "thumbnail"

    def many(self, images: Sequence[Views]) -> list[Selection]:
        if not images:
            return []
        batch = ViewBatch.from_images(images)
        keep = torch.ones_like(batch.valid)
        keep[batch.crops] = False
        return reading_order(images, batch.flat(keep))

    def bounds(self, geometry: Geometry) -> tuple[int, int]:
        if geometry.thumbnail is None:
            kept = sum(geometry.valid_per_view)
            return kept, kept
        kept = geometry.valid_per_view[geometry.thumbnail]
        return kept, kept
