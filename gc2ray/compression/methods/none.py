"""No compression: the image as stock transformers packs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gc2ray.compression.base import Compressor
from gc2ray.compression.geometry import Geometry
from gc2ray.compression.selection import Selection, everything
from gc2ray.compression.views import Views


@dataclass(frozen=True)
class NoCompression(Compressor):
    """Keep everything."""

    name: ClassVar[str] = "none"

    def many(self, images: Sequence[Views]) -> list[Selection]:
        return [everything(image) for image in images]

    def bounds(self, geometry: Geometry) -> tuple[int, int]:
        return geometry.visual_tokens, geometry.visual_tokens
