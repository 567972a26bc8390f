"""`Views`: an encoded image as a compressor sees it, a global thumbnail and a grid of local crops.

A compressor turns it into a `Selection` (`gc2ray.compression.selection`). Its geometry is in
`gc2ray.compression.canvas`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.canvas_index import canvas_index


@dataclass(frozen=True)
class Views:
    """One encoded image.

    Attributes:
        features: Input of the projector, (V, N, D).
        scores: Importance of each token, float32 (V, N); LLaVA-NeXT: the class token's attention.
        canvas: Geometry; padding follows from it and never changes.
        size: Height and width of the original image.
        thumbnail: Index of the global view (0), or None where there is none.
        seed: The image's seed, for methods that choose at random.
    """

    features: Tensor
    scores: Tensor
    canvas: Canvas
    size: tuple[int, int]
    thumbnail: int | None = 0
    seed: int = 0

    def __post_init__(self) -> None:
        views = self.canvas.crops + (self.thumbnail is not None)
        if self.thumbnail not in (0, None):
            raise ValueError(f"thumbnail is view {self.thumbnail}; only the first view can be it")
        expected = (views, self.canvas.side[0] * self.canvas.side[1])
        if tuple(self.scores.shape) != expected or tuple(self.features.shape[:2]) != expected:
            shapes = tuple(self.features.shape), tuple(self.scores.shape)
            raise ValueError(f"features and scores are {shapes}, the canvas has (V, N) {expected}")

    @property
    def tokens_per_view(self) -> int:
        """N: tokens of one view, padding included."""
        return int(self.scores.shape[1])

    @property
    def valid(self) -> Tensor:
        """Which tokens show the image, bool (V, N)."""
        return canvas_index(self.canvas, self.thumbnail, self.scores.device).valid

    @property
    def valid_per_view(self) -> tuple[int, ...]:
        """Valid tokens of each view, on the host."""
        return canvas_index(self.canvas, self.thumbnail, self.scores.device).valid_per_view
