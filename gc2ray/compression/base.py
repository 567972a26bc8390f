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

from gc2ray.compression.geometry import Geometry
from gc2ray.compression.selection import Selection, everything, reading_order
from gc2ray.compression.views import Views


@dataclass(frozen=True, eq=False)
class ViewBatch:
    """The views of several images of one model, concatenated.

    A row of `scores` and `valid` is a view. Views with fewer tokens than the largest have padding
    behind their own; `flat` takes it away.

    Attributes:
        images: The images.
        scores: float32 (sum of V, N).
        valid: bool (sum of V, N), tokens that may be kept.
        counts: Valid tokens of each view, int64 (sum of V,).
        crops: Indices of the views that a thumbnail commands, int64 (C,).
        crop_owner: Of each of them its thumbnail, as an index into `thumbnails`, int64 (C,).
        thumbnails: Indices of the views that command others, int64 (T,).
        token_index: int64 (sum of V, N), the number of each token among those of all images; that
            of padding is any. None where there is no padding: then it is that of the rows.
    """

    images: tuple[Views, ...]
    scores: Tensor
    valid: Tensor
    counts: Tensor
    crops: Tensor
    crop_owner: Tensor
    thumbnails: Tensor
    token_index: Tensor | None = None

    @staticmethod
    def from_images(images: Sequence[Views]) -> ViewBatch:
        """Concatenate the views of images, features apart."""
        counts = [count for image in images for count in image.valid_per_view]
        crops: list[int] = []
        owner: list[int] = []
        thumbnails: list[int] = []
        first = 0
        for image in images:
            geometry = image.geometry
            if geometry.thumbnail is not None and geometry.crops:
                crops.extend(first + crop for crop in geometry.crops)
                owner.extend([len(thumbnails)] * len(geometry.crops))
                thumbnails.append(first + geometry.thumbnail)
            first += len(geometry.views)
        device = images[0].scores.device
        host = torch.tensor([*counts, *crops, *owner, *thumbnails]).to(device)  # one copy
        lengths = [len(counts), len(crops), len(owner), len(thumbnails)]
        tensors = torch.split(host, lengths)
        scores = torch.cat([image.scores for image in images])
        valid = torch.cat([image.index.valid for image in images])
        sizes = [count for image in images for count in image.geometry.counts]
        index, inside = _rows(sizes, device)
        return ViewBatch(
            images=tuple(images),
            scores=scores.view(len(sizes), -1) if index is None else scores[index],
            valid=valid.view(len(sizes), -1) if index is None else valid[index] & inside,
            counts=tensors[0],
            crops=tensors[1],
            crop_owner=tensors[2],
            thumbnails=tensors[3],
            token_index=index,
        )

    @property
    def valid_scores(self) -> Tensor:
        """Scores with padding at minus infinity."""
        return self.scores.masked_fill(~self.valid, -torch.inf)

    def rows(self, values: Tensor) -> Tensor:
        """Values of the tokens of all images, (sum of N,), in rows of views, (sum of V, N)."""
        if self.token_index is None:
            return values.view(self.valid.shape)
        return values[self.token_index]

    def flat(self, mask: Tensor) -> Tensor:
        """A mask over views, (sum of V, N), as one over the tokens of all images, (sum of N,).

        It is False for tokens that may not be kept.
        """
        kept = mask & self.valid
        if self.token_index is None:
            return kept.flatten()
        tokens = sum(image.geometry.tokens for image in self.images)
        flat = torch.zeros(tokens, dtype=torch.bool, device=kept.device)
        flat[self.token_index[kept]] = True
        return flat


def _rows(sizes: Sequence[int], device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Token numbers in rows of views, (V, N), and which of them are there; None if all are."""
    longest = max(sizes)
    inside = torch.ones(len(sizes), longest, dtype=torch.bool, device=device)
    if min(sizes) == longest:
        return None, inside
    counts = torch.tensor(sizes, device=device)[:, None]
    column = torch.arange(longest, device=device)
    inside = column < counts
    return (counts.cumsum(0) - counts + column).masked_fill(~inside, 0), inside


class Compressor(ABC):
    """A compression method."""

    name: ClassVar[str]
    reads_prompt: ClassVar[bool] = False
    """Whether the result depends on the text; images are shared between prompts only if not."""
    keeps_its_share: ClassVar[bool] = False
    """Whether it keeps its retention of an image's tokens, up to a token a view, and not more or
    less in steps."""

    def __call__(self, views: Views) -> Selection:
        """The tokens kept of one image."""
        return self.many([views])[0]

    @abstractmethod
    def many(self, images: Sequence[Views]) -> list[Selection]:
        """The tokens kept of each of several images, the same as one by one."""

    def bounds(self, geometry: Geometry) -> tuple[int, int]:
        """Least and most visual tokens that are kept, by an image's geometry alone.

        Newlines and literals are not counted.
        """
        return 0, geometry.visual_tokens


@dataclass(frozen=True)
class MaskCompressor(Compressor):
    """A method that keeps or drops whole tokens.

    Attributes:
        retention: Fraction KEPT of each view, in (0, 1]. At 1.0 the image passes untouched, as
            stock transformers packs it. Reports count the tokens that were really kept.
    """

    keeps_its_share: ClassVar[bool] = True
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
        return reading_order(images, batch.flat(kept))  # padding is never kept

    def bounds(self, geometry: Geometry) -> tuple[int, int]:
        if self.retention == 1:  # padding that stock reads stays, too
            return geometry.visual_tokens, geometry.visual_tokens
        kept = sum(self.share(tokens) for tokens in geometry.valid_per_view)
        return kept, kept

    def share(self, tokens: int) -> int:
        """Tokens kept of a view, where each keeps the same share (`selection.share_of`)."""
        return min(tokens, max(1, int(tokens * self.retention)))

    @abstractmethod
    def keep(self, batch: ViewBatch) -> Tensor:
        """Mark the tokens that are kept, bool (sum of V, N); never padding."""
