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
from torch import Tensor

from gc2ray.compression.base import Compressor, ViewBatch
from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import NEWLINE, Geometry, canvas_geometry, canvas_lines
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

    def bounds(self, geometry: Geometry) -> tuple[int, int]:
        """No useful bounds: padding is rounded differently, by the image's size."""
        return 0, geometry.tokens

    def _one(self, image: Views) -> Selection:
        canvas = image.geometry.canvas
        if canvas is None or image.geometry.thumbnail is None:
            raise ValueError(f"{self.name} reproduces LLaVA-NeXT; this model has other views")
        canvas = Canvas.from_image_size(image.size, canvas.grid, canvas.side, digits=None)
        image = replace(image, geometry=canvas_geometry(canvas))
        batch = ViewBatch.from_images([image])
        scales = crop_scales(batch, self.retention, self.temperature)
        counts = (batch.counts[1:].double() * scales).long()
        kept = top_k_mask(combined_scores(batch)[1:], counts)  # (C, N)
        # True index of the u-th valid token of each crop; it is written at index u.
        true_index = (~batch.valid[1:]).to(torch.uint8).argsort(dim=1, stable=True)
        written = kept.gather(1, true_index)
        best = batch.scores[0].argsort(descending=True, stable=True)
        thumbnail = best[: int(len(best) * self.retention)].int()
        return Selection(torch.cat([thumbnail, _crops(canvas, written, true_index)]))


def _crops(canvas: Canvas, written: Tensor, true_index: Tensor) -> Tensor:
    """Emit the written tokens row by row, under their true indices, and all rows' newlines."""
    tokens = canvas.side[0] * canvas.side[1]
    lines = torch.from_numpy(canvas_lines(canvas, 0)).to(written.device)
    order = torch.nn.functional.pad(lines, (0, 1), value=NEWLINE).flatten()
    index, newline = order.clamp_min(0), order == NEWLINE
    source = true_index.flatten()[index] + (index // tokens + 1) * tokens
    source = source.masked_fill(newline, NEWLINE)
    return source[written.flatten()[index] | newline].int()
