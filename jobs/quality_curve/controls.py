"""Methods that must do badly, so that the others' accuracy means something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from gc2ray.compression.base import Compressor
from gc2ray.compression.geometry import Geometry
from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.compression.selection import Selection
from gc2ray.compression.views import Views


@dataclass(frozen=True)
class Blind(Compressor):
    """No image at all: the question alone."""

    name: ClassVar[str] = "no image"

    def many(self, images: Sequence[Views]) -> list[Selection]:
        return [Selection(torch.empty(0, dtype=torch.int32)) for _ in images]


@dataclass(frozen=True)
class ForeignScores(Compressor):
    """GlobalCom², but with the scores of the image before it that has the same geometry."""

    name: ClassVar[str] = "foreign scores"
    retention: float = 0.1
    temperature: float = 10.0
    _before: dict[Geometry, Tensor] = field(default_factory=dict, repr=False)

    def many(self, images: Sequence[Views]) -> list[Selection]:
        inner = GlobalCom2(self.retention, self.temperature)
        strangers = []
        for image in images:
            # The first of its kind has nobody before it: its own scores, in another order.
            other = self._before.get(image.geometry, _turned_round(image))
            self._before[image.geometry] = image.scores
            strangers.append(replace(image, scores=other))
        return inner.many(strangers)


def _turned_round(image: Views) -> Tensor:
    """An image's scores, the last of each view first."""
    return torch.cat([view.flip(0) for view in image.per_view(image.scores)])
