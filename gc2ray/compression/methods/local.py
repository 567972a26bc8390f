"""The same retention for every view, with tokens ranked by the view's own scores.

It is GlobalCom² without the thumbnail's budgets and guidance, as an ablation.
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
