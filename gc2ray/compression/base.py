"""`Compressor`: a compression method, a frozen dataclass that turns `Views` into a `Selection`.

Most methods only choose which tokens to keep: they subclass `MaskCompressor` and implement `keep`.
It takes a `ViewBatch`, the views of several images one after the other, so that one set of tensor
operations serves them all; no method loops over tokens or waits for single numbers.

Not covered: methods that read the prompt (they set `reads_prompt`), methods inside the language
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.selection import Selection, everything, reading_order
from gc2ray.compression.views import Views


@dataclass(frozen=True, eq=False)
class ViewBatch:
    """The views of several images of one model, concatenated.

    Attributes:
        images: The images.
        scores: float32 (sum of V, N).
        valid: bool (sum of V, N).
        counts: Valid tokens of each view, int64 (sum of V,).
        crops: Indices of the views that are crops, int64 (C,).
        crop_owner: Index of each crop's image, int64 (C,).
        thumbnails: Indices of the views that are thumbnails, int64, in order of their images.
    """

    images: tuple[Views, ...]
    scores: Tensor
    valid: Tensor
    counts: Tensor
    crops: Tensor
    crop_owner: Tensor
    thumbnails: Tensor

    @staticmethod
    def from_images(images: Sequence[Views]) -> ViewBatch:
        """Concatenate the views of images, features apart."""
        counts = [count for image in images for count in image.valid_per_view]
        crops: list[int] = []
        owner: list[int] = []
        thumbnails: list[int] = []
        first = 0
        for index, image in enumerate(images):
            if image.thumbnail is not None:
                thumbnails.append(first + image.thumbnail)
                first += 1
            crops.extend(range(first, first + image.canvas.crops))
            owner.extend([index] * image.canvas.crops)
            first += image.canvas.crops
        device = images[0].scores.device
        host = torch.tensor([*counts, *crops, *owner, *thumbnails]).to(device)  # one copy
        lengths = [len(counts), len(crops), len(owner), len(thumbnails)]
        tensors = torch.split(host, lengths)
        return ViewBatch(
            images=tuple(images),
            scores=torch.cat([image.scores for image in images]),
            valid=torch.cat([image.valid for image in images]),
            counts=tensors[0],
            crops=tensors[1],
            crop_owner=tensors[2],
            thumbnails=tensors[3],
        )

    @property
    def valid_scores(self) -> Tensor:
        """Scores with padding at minus infinity."""
        return self.scores.masked_fill(~self.valid, -torch.inf)


class Compressor(ABC):
    """A compression method."""

    name: ClassVar[str]
    reads_prompt: ClassVar[bool] = False
    """Whether the result depends on the text; images are shared between prompts only if not."""

    def __call__(self, views: Views) -> Selection:
        """The tokens kept of one image."""
        return self.many([views])[0]

    @abstractmethod
    def many(self, images: Sequence[Views]) -> list[Selection]:
        """The tokens kept of each of several images, the same as one by one."""

    def bounds(self, canvas: Canvas) -> tuple[int, int]:
        """Least and most visual tokens that are kept, by an image's geometry alone.

        Newlines are not counted. The image has a thumbnail.
        """
        return 0, sum(canvas.tokens_per_view())


@dataclass(frozen=True)
class MaskCompressor(Compressor):
    """A method that keeps or drops whole tokens.

    Attributes:
        retention: Fraction KEPT of each view, in (0, 1]. At 1.0 the image passes untouched, as
            stock transformers packs it. Reports count the tokens that were really kept.
    """

    retention: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.retention <= 1:
            raise ValueError(f"retention is the fraction kept, in (0, 1]; got {self.retention}")

    def many(self, images: Sequence[Views]) -> list[Selection]:
        if not images:
            return []
        if self.retention == 1:
            return [everything(image) for image in images]
        batch = ViewBatch.from_images(images)
        kept, valid = self.keep(batch), batch.valid
        if kept.dtype != torch.bool or kept.shape != valid.shape:
            raise TypeError(
                f"method {self.name}: keep must return bool {tuple(valid.shape)}, one for each "
                f"token of each view; got {kept.dtype} {tuple(kept.shape)}"
            )
        return reading_order(images, kept & valid)  # padding is never kept

    def bounds(self, canvas: Canvas) -> tuple[int, int]:
        kept = sum(self.share(tokens) for tokens in canvas.tokens_per_view())
        return kept, kept

    def share(self, tokens: int) -> int:
        """Tokens kept of a view, where each keeps the same share (`selection.share_of`)."""
        return min(tokens, max(1, int(tokens * self.retention)))

    @abstractmethod
    def keep(self, batch: ViewBatch) -> Tensor:
        """Mark the tokens that are kept, bool (sum of V, N); never padding."""
