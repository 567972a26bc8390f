"""Evenly spaced tokens of each view: the i-th valid one where floor((i + 1) r) > floor(i r)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gc2ray.compression.base import MaskCompressor, ViewBatch


@dataclass(frozen=True)
class Uniform(MaskCompressor):
    """Keep evenly spaced tokens; a view too small for its first step keeps its first token."""

    name: ClassVar[str] = "uniform"

    def keep(self, batch: ViewBatch) -> Tensor:
        index = batch.valid.cumsum(dim=1).double() - 1
        steps = ((index + 1) * self.retention).floor() > (index * self.retention).floor()
        kept = steps & batch.valid
        is_empty = ~kept.any(dim=1, keepdim=True)
        return kept | (is_empty & batch.valid & (index == 0))
