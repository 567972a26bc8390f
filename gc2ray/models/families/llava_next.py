"""LLaVA-NeXT: CLIP or SigLIP views, "spatial_unpad" packing.

The backbones (Vicuna, Mistral, Llama-3, Granite) differ in the language model only. Features are
the hidden states that the config names (layer -2 as a rule). Layers behind them are run only as far
as the scores need: up to the input of the last one.

Not covered: the feature strategy "full" with a class token, pruned or quantised towers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import Geometry, canvas_geometry
from gc2ray.core.config.compression import Score
from gc2ray.models.base import Family, VisionSide
from gc2ray.models.image_processor import AnyRes, pinpoints_of, view_pixels
from gc2ray.models.layers.tower import hidden_states
from gc2ray.models.processor import Processor
from gc2ray.models.shape import Tower


class LlavaNext(Family):
    """Cropping and geometry; see `gc2ray.models.base.Family`."""

    cropping: AnyRes

    def __init__(self, config: Any, processor: Processor) -> None:
        vision, images = config.vision_config, processor.image_processor
        side = vision.image_size // vision.patch_size
        self._side = (side, side)
        self.cropping = AnyRes(
            **vars(view_pixels(images, vision.image_size)), pinpoints=pinpoints_of(images)
        )
        self.processor = processor
        self.image_token_id = int(config.image_token_id)
        self.tower = Tower.from_config(config)

    def geometry(self, size: tuple[int, int], *, alone: bool = True) -> Geometry:  # noqa: ARG002
        """The thumbnail and the crops of a canvas, without the padding that centred the image."""
        return canvas_geometry(self.canvas(size))

    def canvas(self, size: tuple[int, int]) -> Canvas:
        """The canvas of an image of (height, width) pixels."""
        return Canvas.from_image_size(size, self.cropping.grid(size), self._side)


class LlavaNextVision(VisionSide):
    """Tower and projector of a `LlavaNextForConditionalGeneration`; see `VisionSide`."""

    def __init__(self, model: Any, family: LlavaNext, score: Score) -> None:
        inner, named = model.model, model.config.vision_feature_layer
        self._family, self._tower = family, inner.vision_tower
        super().__init__(self._tower.encoder.layers, inner.multi_modal_projector, family, score)
        count = len(self.layers)
        named = [named] if isinstance(named, int) else list(named)
        self._feature_states = [index + count + 1 if index < 0 else index for index in named]
        self.newline = inner.image_newline

    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `VisionSide`; features (V, N, D of all named layers) are not projected yet."""
        state, class_token = self._tower.embeddings(pixels), self._family.tower.class_token
        if class_token:
            state = self._tower.pre_layrnorm(state)
        last, first = len(self.layers) - 1, int(class_token)
        wanted = {*self._feature_states, last}
        states = hidden_states(self.layers, state, wanted, attention_mask=None)
        features = torch.cat([states[index][:, first:] for index in self._feature_states], dim=-1)
        return features, self.scores(states[last], features)
