"""Random tokens: the baseline that any score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gc2ray.compression.base import MaskCompressor, ViewBatch
from gc2ray.compression.selection import share_of, top_k_mask


@dataclass(frozen=True)
class Random(MaskCompressor):
    """Keep random tokens of each view, which depend on the image and the recipe's seed only."""

    name: ClassVar[str] = "random"

    def keep(self, batch: ViewBatch) -> Tensor:
        # On the host, so that every device gets the same tokens.
        random = [
            torch.rand(image.scores.shape, generator=torch.Generator().manual_seed(image.seed))
            for image in batch.images
        ]
        scores = batch.rows(torch.cat(random).to(batch.scores.device))
        ranked = scores.masked_fill(~batch.valid, -torch.inf)
        return top_k_mask(ranked, share_of(batch.counts, self.retention))
