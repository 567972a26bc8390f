"""GlobalCom² as in its authors' implementation, mistakes included; for parity, not for use.

Given the scores, selection and packing equal the reference's in float32 on all fixtures in
`tests/compression/golden`: thumbnail tokens by descending score; crop tokens chosen over the valid
tokens, then written at that index of the padded crop; one newline for every row of the padded grid;
no least count, so a crop may keep nothing; padding cut without rounding; retention 1.0 still drops
tokens.

Not reproduced: its cast of the result to float16, its mixing of scores between the images of a
batch, the exception for images without valid crop tokens (this gives the thumbnail and bare
newlines), and its own choice of the crop grid, which the model's processor makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gc2ray.compression.base import Compressor, ViewBatch
from gc2ray.compression.canvas import NEWLINE, Canvas
from gc2ray.compression.canvas_index import canvas_index
from gc2ray.compression.methods.globalcom2 import GlobalCom2, combined_scores, crop_scales
from gc2ray.compression.selection import Selection, top_k_mask
from gc2ray.compression.views import Views


@dataclass(frozen=True)
class GlobalCom2Reference(Compressor):
    """The reference implementation's selection and packing.

    Attributes:
        retention: Nominal fraction KEPT, in (0, 1].
        temperature: See `GlobalCom2`.
    """

    name: ClassVar[str] = "globalcom2-reference"
    retention: float = 0.25
    temperature: float = 10.0

    def __post_init__(self) -> None:
        GlobalCom2(self.retention, self.temperature)  # the same settings, checked once

    def many(self, images: Sequence[Views]) -> list[Selection]:
        return [self._one(image) for image in images]

    def bounds(self, canvas: Canvas) -> tuple[int, int]:
        """No useful bounds: padding is rounded differently, by the image's size."""
        views = canvas.tokens_per_view()
        return 0, len(views) * views[0]

    def _one(self, image: Views) -> Selection:
        canvas = Canvas.from_image_size(
            image.size, image.canvas.grid, image.canvas.side, digits=None
        )
        image = replace(image, canvas=canvas)
        batch = ViewBatch.from_images([image])
        scales = crop_scales(batch, self.retention, self.temperature)
        counts = (batch.counts[1:].double() * scales).long()
        kept = top_k_mask(combined_scores(batch)[1:], counts)  # (C, N)
        # True index of the u-th valid token of each crop; it is written at index u.
        true_index = (~batch.valid[1:]).to(torch.uint8).argsort(dim=1, stable=True)
        written = kept.gather(1, true_index)
        return Selection(torch.cat([self._thumbnail(image), _crops(image, written, true_index)]))

    def _thumbnail(self, image: Views) -> torch.Tensor:
        best = image.scores[0].argsort(descending=True, stable=True)
        return best[: int(image.tokens_per_view * self.retention)].int()


def _crops(image: Views, written: torch.Tensor, true_index: torch.Tensor) -> torch.Tensor:
    """Emit the written tokens row by row, under their true indices, and all rows' newlines."""
    tokens = image.tokens_per_view
    order = canvas_index(image.canvas, image.thumbnail, image.scores.device).order[tokens:].long()
    index = (order - tokens).clamp_min(0)
    newline = order == NEWLINE
    source = true_index.flatten()[index] + (index // tokens + 1) * tokens
    source = source.masked_fill(newline, NEWLINE)
    return source[written.flatten()[index] | newline].int()
