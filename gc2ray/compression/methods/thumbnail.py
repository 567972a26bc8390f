"""The thumbnail alone: the baseline that dynamic cropping has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gc2ray.compression.base import Compressor, ViewBatch
from gc2ray.compression.canvas import Canvas
from gc2ray.compression.selection import Selection, reading_order
from gc2ray.compression.views import Views


@dataclass(frozen=True)
class ThumbnailOnly(Compressor):
    """Drop all crops, keep the whole thumbnail; there is no retention to set."""

    name: ClassVar[str] = "thumbnail"

    def many(self, images: Sequence[Views]) -> list[Selection]:
        if not images:
            return []
        batch = ViewBatch.from_images(images)
        keep = torch.zeros_like(batch.valid)
        keep[batch.thumbnails] = True
        return reading_order(images, keep)

    def bounds(self, canvas: Canvas) -> tuple[int, int]:
        thumbnail = canvas.tokens_per_view()[0]
        return thumbnail, thumbnail
