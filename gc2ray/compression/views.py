"""`Views`: an encoded image as a compressor sees it.

A compressor turns it into a `Selection` (`gc2ray.compression.selection`). Its geometry is in
`gc2ray.compression.geometry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gc2ray.compression.geometry import Geometry
from gc2ray.compression.geometry_index import GeometryIndex, geometry_index


@dataclass(frozen=True)
class Views:
    """One encoded image. Tokens of all views stand one view after the other, padding included.

    Attributes:
        features: What becomes of the tokens in the language model after the projector, (N, D).
        scores: Importance of each token, float32 (N,).
        geometry: Views and layout; padding follows from it and never changes.
        size: Height and width of the original image.
        seed: The image's seed, for methods that choose at random.
    """

    features: Tensor
    scores: Tensor
    geometry: Geometry
    size: tuple[int, int]
    seed: int = 0

    def __post_init__(self) -> None:
        tokens = self.geometry.tokens
        if tuple(self.scores.shape) != (tokens,) or self.features.shape[:1] != (tokens,):
            shapes = tuple(self.features.shape), tuple(self.scores.shape)
            raise ValueError(f"features and scores are {shapes}, the geometry has {tokens} tokens")

    @cached_property
    def index(self) -> GeometryIndex:
        """The geometry's tensors on the device of the scores."""
        return geometry_index(self.geometry, self.scores.device)

    @property
    def valid_per_view(self) -> tuple[int, ...]:
        """Valid tokens of each view, on the host."""
        return self.geometry.valid_per_view

    def per_view(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values of all tokens, (N, ...), split into the views: (rows * columns, ...) each."""
        return torch.split(values, list(self.geometry.counts))
