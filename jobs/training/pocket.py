"""What differs between the demo's models where they are trained: one `Pocket` each.

The scenes, the questions, the losses and the loop are the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from gc2ray.demo.scenes import Box, Scene
from gc2ray.models.image_processor import Tiles
from gc2ray.models.processor import Processor


class Cutter(Protocol):
    """Cuts pictures into views; no model is needed, so that other processes can do it."""

    @property
    def tile(self) -> int:
        """Side of a view in pixels."""

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""

    def cut(self, image: bytes) -> Tiles:
        """The views of an image file, in the order in which the model gets them."""

    def boxes_in_views(self, scene: Scene, boxes: Sequence[Box]) -> list[np.ndarray]:
        """The boxes in the pixels of each view, in that order; (K, 4) each."""


class TowerRun(Protocol):
    """A tower with what training needs of it; a module."""

    tower: nn.Module

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (V, T, T, 3) to features (V, N, D), and what stands for the view, (V, D)."""


@dataclass(frozen=True)
class ShownImage:
    """What a language model gets in the place of an image.

    Attributes:
        marks: `VISUAL` or a token id, in order.
        embeds: (K, D_text), the visual tokens', K of them.
        kinds: (K, kinds), the share of each in what a token shows; zeros where it shows none.
        colours: (K, colours), likewise.
        places: (K, 4), chances of top, bottom, left and right.
    """

    marks: list[int]
    embeds: Tensor
    kinds: Tensor
    colours: Tensor
    places: Tensor


class Packer(Protocol):
    """From features to what the language model gets."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that is trained beside the tower."""

    def language(self) -> nn.Module:
        """The language model, without its head."""

    def notes(self, text: str) -> str:
        """Notes in words as they stand in the image's place."""

    def pack(
        self, tiles: Sequence[Tiles], labels: Sequence[Any], features: Tensor
    ) -> list[ShownImage]:
        """Each image's visual tokens, with the labels of what they show."""


class Pocket(Protocol):
    """One of the demo's models."""

    @property
    def cutter(self) -> Cutter:
        """Cuts pictures for it."""

    @property
    def tower_batch(self) -> float:
        """Scenes in the first stage's batches, as a share of the stage's: larger views, fewer."""

    def untrained(self, seed: int) -> tuple[Any, Any]:
        """Model and transformers' processor or its like, with weights from `seed`."""

    def tower(self, model: Any) -> Any:
        """The model's tower, a `TowerRun`."""

    def packer(self, model: Any, processor: Processor) -> Packer:
        """What comes behind the tower."""
