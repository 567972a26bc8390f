"""`ModelAdapter`: from cut images to prompts, with any family's vision side.

* Views of a batch go through the tower flat, (sum of V, 3, T, T), without padded crops.
* Only kept tokens are projected.
* The model is read, never changed: nothing is patched, hooked or replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gc2ray.compression.geometry import LITERAL, NEWLINE, Geometry
from gc2ray.compression.geometry_index import geometry_index
from gc2ray.compression.selection import OriginalPositions, Selection
from gc2ray.compression.views import Views
from gc2ray.core.config.compression import Score
from gc2ray.core.errors import BadRow, Status
from gc2ray.models.base import Family, Prompt, VisionSide
from gc2ray.models.image_processor import Cropping, Tiles
from gc2ray.models.processor import Processor
from gc2ray.models.shape import CPU_TOWER_VIEWS, GPU_TOWER_VIEWS, ModelShape, Needs

SCORE_DEVIATION = 3.0
"""Of standardised scores. At 1 the paper's temperature of 10 makes budgets too much alike: on the
demo's SmolVLM 3 was clearly better, which at this deviation is 9."""


class ModelAdapter:
    """Vision side, projector and text table of a loaded model.

    Args:
        model: The transformers model.
        family: Its family.
        vision: Its vision side.
        score: How its vision side scores patches.

    Attributes:
        family: The model's family.
        device: Device of the model's tensors.
        dtype: Dtype of its embeddings.
        shape: The model's sizes.
        max_positions: Longest sequence of prompt and answer, in tokens.
        kv_bytes_per_token: Bytes of KV cache of one token over all layers.
    """

    def __init__(self, model: Any, family: Family, vision: VisionSide, score: Score) -> None:
        self.family = family
        self._standardised = score != "class_token"
        self._vision = vision
        parameters = list(model.parameters())
        self._weights = sum(parameter.nbytes for parameter in parameters)
        self._text_table = model.get_input_embeddings()
        self.device: torch.device = self._text_table.weight.device
        self.dtype: torch.dtype = self._text_table.weight.dtype
        self.shape = ModelShape.of(
            family.tower, model.config, self.dtype.itemsize, sum(map(torch.numel, parameters))
        )
        self._pixels = pixel_table(family.cropping).to(self.device, self.dtype)
        self.max_positions = self.shape.text.max_positions
        self.kv_bytes_per_token = self.shape.kv_bytes_per_token

    def needs(self) -> Needs:
        """The memory that the model needs; its weights may be of several dtypes."""
        return replace(self.shape.needs(), weights=self._weights)

    def freeze(self) -> None:
        """Optimise for inference; weights must not change afterwards."""
        self._vision.freeze()

    @property
    def tower_views(self) -> int:
        """Views that go through the vision tower at once."""
        return GPU_TOWER_VIEWS if self.device.type == "cuda" else CPU_TOWER_VIEWS

    def encode(self, tiles: Sequence[Tiles], seeds: Sequence[int]) -> list[Views]:
        """Run the vision tower over the views of several images; nothing is projected yet."""
        pixels = torch.from_numpy(np.concatenate([image.pixels for image in tiles]))
        parts = [
            self._vision.run(self._normalised(part))
            for part in pixels.split(self.tower_views)  # type: ignore[no-untyped-call]  # torch's is
        ]
        counts = [len(image.pixels) for image in tiles]
        features = torch.split(torch.cat([part[0] for part in parts]), counts)
        scores = torch.split(torch.cat([part[1] for part in parts]), counts)
        views = []
        for image, own, rated, seed in zip(tiles, features, scores, seeds, strict=True):
            geometry = self.family.geometry(image.size, alone=image.alone)
            flat = self._vision.arranged(own, rated, geometry, image.size)
            views.append(self._views(*flat, geometry, image, seed))
        return views

    def _views(
        self, features: Tensor, scores: Tensor, geometry: Geometry, image: Tiles, seed: int
    ) -> Views:
        """An encoded image. Scores are standardised over it, unless they are the class token's.

        GlobalCom²'s temperature was tuned to the class token's logits. Other scores have other
        scales: softmaxed ones would give every crop the same budget, whatever the image shows. So
        they are brought to a scale at which that temperature is right.
        """
        if self._standardised:
            scores = standardised(scores, geometry_index(geometry, scores.device).valid)
        return Views(features, scores, geometry, image.size, seed)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Bytes to normalised values by table, on the device: bit-equal to the processor's."""
        if self.device.type == "cuda":  # a copy from pinned memory does not block the decoder
            pixels = pixels.pin_memory()
        pixels = pixels.to(self.device, non_blocking=True)
        out = self._pixels.new_empty(len(pixels), 3, *pixels.shape[1:3])
        for channel, table in enumerate(self._pixels):
            index = pixels[..., channel].int().flatten()
            out[:, channel] = table.index_select(0, index).view(out[:, channel].shape)
        return out

    def pack(self, views: Sequence[Views], selections: Sequence[Selection]) -> list[Tensor]:
        """Gather, project in one call, insert newlines and literals; per image (K, D_text)."""
        rows = [_gathered(view, chosen) for view, chosen in zip(views, selections, strict=True)]
        packed = self._vision.project(torch.cat(rows))
        entries = torch.cat([chosen.entries for chosen in selections])
        if self._vision.newline is not None:
            packed[entries == NEWLINE] = self._vision.newline
        if any(view.geometry.literals for view in views):
            texts = self._text_table((LITERAL - entries.long()).clamp_min(0))
            packed = torch.where((entries <= LITERAL)[:, None], texts, packed)
        return list(torch.split(packed, [len(part) for part in rows]))

    def embed(
        self,
        token_ids: Sequence[int],
        images: Sequence[Tensor],
        positions: Sequence[OriginalPositions | None] = (),
    ) -> Prompt:
        """Text embeddings with each placeholder replaced by its packed image.

        Raises:
            ValueError: The number of placeholders is not the number of images.
            BadRow: The model has no embedding for a token.
        """
        rows = self._text_table.num_embeddings
        if max(token_ids) >= rows:  # on a GPU the device would be lost
            tokens = (
                f"the prompt has token {max(token_ids)}, and the model's text table {rows} rows"
            )
            raise BadRow(Status.FAILED, f"{tokens}: its tokenizer is another model's")
        marks = [i for i, token in enumerate(token_ids) if token == self.family.image_token_id]
        if len(marks) != len(images):
            raise ValueError(f"{len(marks)} image placeholders for {len(images)} images")
        text = self._text_table(torch.tensor(token_ids, device=self.device))
        parts: list[Tensor] = []
        visual: list[tuple[int, int]] = []
        before, length = 0, 0
        for mark, image in zip(marks, images, strict=True):
            length += mark - before
            parts += [text[before:mark], image]
            visual.append((length, length + len(image)))
            before, length = mark + 1, length + len(image)
        embeds = torch.cat([*parts, text[before:]])
        return Prompt(embeds, tuple(visual), _positions(embeds, visual, positions))


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: The transformers model, unchanged.
        processor: Its processor: tokenizer, chat template, image settings.
        adapter: Its vision side and text table.
        end_tokens: Token ids that end an answer.
        digest: Digest of its files (`gc2ray.models.checkpoint.fetch.model_digest`); empty if none
            was computed.
    """

    model: Any
    processor: Processor
    adapter: ModelAdapter
    end_tokens: tuple[int, ...]
    digest: str = ""


def _positions(
    embeds: Tensor, visual: Sequence[tuple[int, int]], originals: Sequence[OriginalPositions | None]
) -> Tensor | None:
    """Positions of a prompt (T,) in which images have their uncompressed lengths."""
    if all(original is None for original in originals):
        return None
    positions = torch.arange(len(embeds), device=embeds.device)
    for (first, stop), original in zip(visual, originals, strict=True):
        if original is not None:
            compact = torch.arange(stop - first, device=embeds.device)
            positions[first:stop] += original.index - compact
            positions[stop:] += original.length - (stop - first)
    return positions


def _gathered(views: Views, selection: Selection) -> Tensor:
    """What is projected, (K, D); rows of newlines and literals are written over."""
    features = views.features
    if selection.features is not None:
        features = selection.features.to(features.dtype)
    return features.index_select(0, selection.entries.clamp_min(0))


def standardised(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores of an image, (N,), with mean 0 and `SCORE_DEVIATION` over its valid tokens."""
    weights = valid.to(scores.dtype)  # and not `scores[valid]`, for which a GPU would be waited for
    tokens = weights.sum()
    centred = scores - (scores * weights).sum() / tokens
    deviation = ((centred.square() * weights).sum() / tokens).sqrt()
    return centred * (SCORE_DEVIATION / deviation.clamp_min(torch.finfo(scores.dtype).eps))


def pixel_table(cropping: Cropping) -> Tensor:
    """Normalised value of each byte, float32 (3, 256), bit-equal to the HF numpy processor.

    The processor rescales in float64, rounds to float32, then normalises in float32.
    """
    bytes_ = torch.arange(256, dtype=torch.float64)
    rescaled = (bytes_ * cropping.rescale).to(torch.float32)
    mean = torch.tensor(cropping.mean, dtype=torch.float32)[:, None]
    std = torch.tensor(cropping.std, dtype=torch.float32)[:, None]
    return (rescaled - mean) / std
