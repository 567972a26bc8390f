"""Every view for itself: the same retention everywhere, ranked by the view's own scores.

The ablation of GlobalCom² without its commander.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gc2ray.compression.base import MaskCompressor, ViewBatch
from gc2ray.compression.selection import share_of, top_k_mask


@dataclass(frozen=True)
class Local(MaskCompressor):
    """Keep each view's best-scored tokens."""

    name: ClassVar[str] = "local"

    def keep(self, batch: ViewBatch) -> Tensor:
        return top_k_mask(batch.valid_scores, share_of(batch.counts, self.retention))
