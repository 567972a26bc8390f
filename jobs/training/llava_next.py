"""Training's view of the first model: CLIP tower, class token, thumbnail first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gc2ray.compression.geometry import NEWLINE
from gc2ray.compression.selection import everything
from gc2ray.compression.views import Views
from gc2ray.core.config.input import ImageLimits
from gc2ray.core.records import ImageRef
from gc2ray.demo.scenes import Box, Scene
from gc2ray.demo.spec import demo_anyres, demo_spec
from gc2ray.engine.prompt_builder import load_tiles
from gc2ray.models.families.tiny import untrained
from gc2ray.models.image_processor import Tiles, fitted_size
from gc2ray.models.processor import Processor
from gc2ray.models.registry import adapter_of
from jobs.training.dialogues import VISUAL
from jobs.training.labels import ViewLabels, colour_shares, kind_shares
from jobs.training.pocket import ShownImage


class LlavaNextCutter:
    """See `jobs.training.pocket.Cutter`."""

    def __init__(self) -> None:
        self._anyres = demo_anyres()
        self.tile, self.patch = self._anyres.tile, demo_spec().patch_size

    def cut(self, image: bytes) -> Tiles:
        return load_tiles(ImageRef(image), self._anyres, ImageLimits())

    def boxes_in_views(self, scene: Scene, boxes: Sequence[Box]) -> list[np.ndarray]:
        at = np.array(boxes, dtype=float).reshape(-1, 4)
        height, width = scene.size
        thumbnail_scale = np.array([self.tile / width, self.tile / height] * 2)
        canvas = self._anyres.canvas_size(scene.size)
        fitted = fitted_size(scene.size, canvas)
        scale = np.array([fitted[1] / width, fitted[0] / height] * 2)
        corner = np.array([(canvas[1] - fitted[1]) // 2, (canvas[0] - fitted[0]) // 2] * 2)
        on_canvas = at * scale + corner
        rows, columns = self._anyres.grid(scene.size)
        crops = [
            on_canvas - np.array([column * self.tile, row * self.tile] * 2)
            for row in range(rows)
            for column in range(columns)
        ]
        return [at * thumbnail_scale, *crops]


class LlavaNextTower(nn.Module):
    """All layers of a CLIP tower: features of layer -2, and the last layer's class token."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        tower.set_attn_implementation("eager")  # 65 tokens: faster than a fused kernel on CPUs
        self.tower = tower
        self.mean: Tensor
        self.deviation: Tensor
        anyres = demo_anyres()
        self.register_buffer("mean", 255 * torch.tensor(anyres.mean).view(3, 1, 1))
        self.register_buffer("deviation", 255 * torch.tensor(anyres.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `jobs.training.pocket.TowerRun`."""
        tower = self.tower
        values = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.deviation
        state = tower.pre_layrnorm(tower.embeddings(values))
        for layer in tower.encoder.layers[:-1]:
            state = layer(state, attention_mask=None)
        last = tower.encoder.layers[-1](state, attention_mask=None)
        return state[:, 1:], tower.post_layernorm(last[:, 0])


class LlavaNextPacker:
    """See `jobs.training.pocket.Packer`; the newline is a visual token that shows nothing."""

    def __init__(self, model: Any, processor: Processor) -> None:
        self._model = model
        self._adapter = adapter_of(model, processor)

    def parameters(self) -> Iterator[nn.Parameter]:
        inner = self._model.model
        yield inner.image_newline
        for part in (inner.multi_modal_projector, inner.language_model, self._model.lm_head):
            yield from part.parameters()

    def language(self) -> Any:
        return self._model.model.language_model

    def notes(self, text: str) -> str:
        return text

    def pack(
        self, tiles: Sequence[Tiles], labels: Sequence[ViewLabels], features: Tensor
    ) -> list[ShownImage]:
        parts = features.split([len(image.pixels) for image in tiles])  # type: ignore[no-untyped-call]
        views = [
            Views(
                part.flatten(0, 1),
                part.new_zeros(part.shape[:2]).flatten(),
                self._adapter.family.geometry(image.size),
                image.size,
            )
            for image, part in zip(tiles, parts, strict=True)
        ]
        selections = [everything(view) for view in views]
        packed = self._adapter.pack(views, selections)
        return [
            _shown(embeds, chosen.entries, seen)
            for embeds, chosen, seen in zip(packed, selections, labels, strict=True)
        ]


class LlavaNextPocket:
    """See `jobs.training.pocket.Pocket`."""

    tower_batch = 1.0

    def __init__(self) -> None:
        self.cutter = LlavaNextCutter()

    def untrained(self, seed: int) -> tuple[Any, Any]:
        return untrained(replace(demo_spec(), seed=seed))

    def tower(self, model: Any) -> LlavaNextTower:
        return LlavaNextTower(model.model.vision_tower)

    def packer(self, model: Any, processor: Processor) -> LlavaNextPacker:
        return LlavaNextPacker(model, processor)


def quarters(source: Tensor) -> Tensor:
    """Chances of top, bottom, left and right, (K, 4): certain in the thumbnail, even in crops."""
    spec = demo_spec()
    side = spec.image_size // spec.patch_size
    row, column = source % side**2 // side, source % side
    lower, right = (row >= side // 2).float(), (column >= side // 2).float()
    wanted = torch.stack([1 - lower, lower, 1 - right, right], dim=1)
    return wanted.where((source < side**2)[:, None], torch.full_like(wanted, 0.5))


def _shown(embeds: Tensor, source: Tensor, labels: ViewLabels) -> ShownImage:
    """Visual tokens with the labels of the patches that they come from."""
    index = source.clamp_min(0).long().cpu()
    seen = (source.cpu() != NEWLINE)[:, None].float()
    kinds, colours = (
        (torch.from_numpy(shares).flatten(0, 1)[index] * seen).to(embeds.device)
        for shares in (kind_shares(labels.kinds), colour_shares(labels.colours))
    )
    places = quarters(source.to(embeds.device))
    return ShownImage([VISUAL] * len(embeds), embeds, kinds, colours, places)
