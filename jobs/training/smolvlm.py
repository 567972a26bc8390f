"""Training's view of the second model: no class token, merged patches, thumbnail last.

The tower's losses act on what the connector gets, the features behind the last layer's norm. With
no class token, their mean stands for the view: patches of background then learn to look for things
as well, and carry what the view shows.

A visual token is named after all that its patches show, in equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gc2ray.compression.geometry import LITERAL
from gc2ray.core.config.input import ImageLimits
from gc2ray.core.records import ImageRef
from gc2ray.demo.scenes import Box, Scene
from gc2ray.demo.spec import smolvlm_cropping, smolvlm_spec
from gc2ray.engine.prompt_builder import load_tiles
from gc2ray.models.families.idefics3 import Idefics3
from gc2ray.models.families.tiny_smolvlm import untrained_smolvlm
from gc2ray.models.image_processor import Tiles
from gc2ray.models.processor import Processor
from jobs.training.dialogues import VISUAL
from jobs.training.labels import ViewLabels, colour_shares, kind_shares
from jobs.training.pocket import ShownImage

HALF = 127.5
"""Mean and deviation of pixels, of 255."""


class SmolVlmCutter:
    """See `jobs.training.pocket.Cutter`."""

    def __init__(self) -> None:
        self._cropping = smolvlm_cropping()
        self.tile, self.patch = self._cropping.tile, smolvlm_spec().patch

    def cut(self, image: bytes) -> Tiles:
        return load_tiles(ImageRef(image), self._cropping, ImageLimits())

    def boxes_in_views(self, scene: Scene, boxes: Sequence[Box]) -> list[np.ndarray]:
        at = np.array(boxes, dtype=float).reshape(-1, 4)
        height, width = scene.size
        _, canvas = self._cropping.resizes(scene.size)
        rows, columns = self._cropping.grid(scene.size)
        on_canvas = at * np.array([canvas[1] / width, canvas[0] / height] * 2)
        crops = [
            on_canvas - np.array([column * self.tile, row * self.tile] * 2)
            for row in range(rows)
            for column in range(columns)
        ]
        return [*crops, at * np.array([self.tile / width, self.tile / height] * 2)]


class SmolVlmTower(nn.Module):
    """All layers of the tower and its norm."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        tower.set_attn_implementation("eager")  # few tokens, as in the first model
        self.tower = tower

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `jobs.training.pocket.TowerRun`."""
        tower = self.tower
        values = pixels.permute(0, 3, 1, 2).float() / HALF - 1
        side = values.shape[-1] // tower.patch_size
        everywhere = torch.ones(len(values), side, side, dtype=torch.bool, device=values.device)
        state = tower.embeddings(pixel_values=values, patch_attention_mask=everywhere)
        for layer in tower.encoder.layers:
            state = layer(state, None)
        features = tower.post_layernorm(state)
        return features, features.mean(dim=1)


class SmolVlmPacker:
    """See `jobs.training.pocket.Packer`; markers are tokens of the text."""

    def __init__(self, model: Any, processor: Processor) -> None:
        self._model = model
        self._family = Idefics3(model.config, processor)

    def parameters(self) -> Iterator[nn.Parameter]:
        inner = self._model.model
        for part in (inner.connector, inner.text_model, self._model.lm_head):
            yield from part.parameters()

    def language(self) -> Any:
        return self._model.model.text_model

    def notes(self, text: str) -> str:
        """With what parts them from the words before and behind: the template has nothing there."""
        return f" {text}\n"

    def pack(
        self, tiles: Sequence[Tiles], labels: Sequence[ViewLabels], features: Tensor
    ) -> list[ShownImage]:
        merged = self._model.model.connector(features)
        parts = merged.split([len(image.pixels) for image in tiles])
        return [
            self._shown(image, seen, part)
            for image, seen, part in zip(tiles, labels, parts, strict=True)
        ]

    def _shown(self, tiles: Tiles, labels: ViewLabels, merged: Tensor) -> ShownImage:
        """One image; `merged` is (V, N, D_text)."""
        kinds, colours = (
            merged_shares(shares, self._family.merge).to(merged.device)
            for shares in (kind_shares(labels.kinds), colour_shares(labels.colours))
        )
        places = _places(len(merged), merged.shape[1]).to(merged.device)
        entries = self._family.geometry(tiles.size).entries.tolist()
        marks = [VISUAL if entry >= 0 else LITERAL - entry for entry in entries]
        return ShownImage(marks, merged.flatten(0, 1), kinds, colours, places)


class SmolVlmPocket:
    """See `jobs.training.pocket.Pocket`."""

    tower_batch = 0.6

    def __init__(self) -> None:
        self.cutter = SmolVlmCutter()

    def untrained(self, seed: int) -> tuple[Any, Any]:
        return untrained_smolvlm(replace(smolvlm_spec(), seed=seed))

    def tower(self, model: Any) -> SmolVlmTower:
        return SmolVlmTower(model.model.vision_model)

    def packer(self, model: Any, processor: Processor) -> SmolVlmPacker:
        return SmolVlmPacker(model, processor)


def merged_shares(shares: np.ndarray, scale: int) -> Tensor:
    """Shares (V, N, L) of patches to shares of the tokens they make, float32 (K, L).

    Patches that show nothing do not count.
    """
    views, patches, names = shares.shape
    side = int(patches**0.5)
    blocks = shares.reshape(views, side // scale, scale, side // scale, scale, names)
    total = blocks.sum(axis=(2, 4)).reshape(-1, names)
    return torch.from_numpy(total / total.sum(axis=1, keepdims=True).clip(1))


def _places(views: int, tokens: int) -> Tensor:
    """Chances of top, bottom, left and right, (K, 4): certain in the thumbnail, even in crops."""
    side = int(tokens**0.5)
    row, column = torch.arange(tokens) // side, torch.arange(tokens) % side
    lower, right = (row >= side // 2).float(), (column >= side // 2).float()
    thumbnail = torch.stack([1 - lower, lower, 1 - right, right], dim=1)
    return torch.cat([torch.full(((views - 1) * tokens, 4), 0.5), thumbnail])
