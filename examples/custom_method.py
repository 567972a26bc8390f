"""A compression method of your own: keep the middle of every view.

Run it from this folder, or with this folder on PYTHONPATH:

    gc2ray run job.yaml output=NEW_OUTPUT \
        recipe.compression.method=custom_method:CenterCrop recipe.compression.allow_code=true
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gc2ray.compression.base import MaskCompressor, ViewBatch
from gc2ray.compression.selection import share_of, top_k_mask


@dataclass(frozen=True)
class CenterCrop(MaskCompressor):
    """Keep of each view the share `retention` of its tokens that lie nearest to its middle."""

    name: ClassVar[str] = "center-crop"

    def keep(self, batch: ViewBatch) -> Tensor:
        """Mark what is kept, bool (V, N): V views of all images of the batch, N tokens of each."""
        views = [view for image in batch.images for view in image.geometry.views]
        nearness = torch.full(batch.valid.shape, -torch.inf)
        for row, view in zip(nearness, views, strict=True):  # a view may have less than N tokens
            down = torch.arange(view.rows) - (view.rows - 1) / 2
            right = torch.arange(view.columns) - (view.columns - 1) / 2
            row[: view.tokens] = -(down[:, None] ** 2 + right**2).flatten()
        shown = nearness.to(batch.valid.device).masked_fill(~batch.valid, -torch.inf)  # no padding
        return top_k_mask(shown, share_of(batch.counts, self.retention))
