"""LLaVA-NeXT: CLIP views, class-token scores, "spatial_unpad" packing.

The backbones (Vicuna, Mistral, Llama-3) differ in the language model only, of which this module
uses the text table and a few numbers of the config.

* Features are the hidden states that the config names (layer -2 as a rule). Layers behind them are
  run only as far as the scores need: up to the input of the last one.
* Scores are the class token's row of the last layer's attention, before the softmax, averaged over
  heads. `mean_h(scale q_h k_h) = scale/H q k` over the full width, and k is linear in the input, so
  the row folds to one product per token, `(W_k^T q) x + q b_k`: no keys, no heads, float32.
* Views of a batch go through the tower flat, (sum of V, 3, T, T), without padded crops.
* Only kept tokens are projected.
* On a CPU the linear layers of tower and projector run prepacked (`freeze`, see
  `gc2ray.models.layers.linear`), and attention is compiled where it can be
  (`gc2ray.models.layers.cpu_attention`).

The model is read, never changed: nothing is patched, hooked or replaced.

Not covered: towers without a class token, the feature strategy "full", pruned or quantised towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from gc2ray.compression.canvas import NEWLINE, Canvas
from gc2ray.compression.selection import OriginalPositions, Selection
from gc2ray.compression.views import Views
from gc2ray.core.errors import BadRow, Status
from gc2ray.models.base import ModelMetadata, Prompt
from gc2ray.models.image_processor import AnyRes, Tiles, anyres_from_processor
from gc2ray.models.layers.cpu_attention import (
    CompiledAttention,
    MaskPattern,
    SequenceTable,
    kernel_for,
)
from gc2ray.models.layers.linear import Linear, packed_module
from gc2ray.models.shape import CPU_TOWER_VIEWS, GPU_TOWER_VIEWS, ModelShape, Needs

QUICK_GELU = 1.702
"""The factor in OpenAI's fast approximation of GELU, as transformers has it."""


class LlavaNext:
    """A loaded `LlavaNextForConditionalGeneration`; see `gc2ray.models.base.ModelAdapter`."""

    def __init__(self, model: Any, processor: Any) -> None:
        inner, config = model.model, model.config
        metadata = self.metadata(config, processor, inner.image_newline.dtype.itemsize)
        self._weights = sum(parameter.nbytes for parameter in model.parameters())
        self._tower = inner.vision_tower
        self._layers = list(self._tower.encoder.layers)
        self._projector = inner.multi_modal_projector
        self._newline: Tensor = inner.image_newline
        self._text_table = model.get_input_embeddings()
        self._image_token_id = metadata.image_token_id
        self._feature_states = _feature_states(config, len(self._tower.encoder.layers))
        self.device: torch.device = self._newline.device
        self.dtype: torch.dtype = self._newline.dtype
        self.shape, self.anyres, self._side = metadata.shape, metadata.anyres, metadata.side
        self._pixels = pixel_table(self.anyres).to(self.device, self.dtype)
        self.max_positions = self.shape.text.max_positions
        self.kv_bytes_per_token = self.shape.kv_bytes_per_token

    @staticmethod
    def metadata(config: Any, processor: Any, itemsize: int) -> ModelMetadata:
        """See `gc2ray.models.base.ModelAdapter.metadata`."""
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        anyres = anyres_from_processor(processor.image_processor, config)
        shape, token = ModelShape.from_config(config, itemsize), int(config.image_token_id)
        return ModelMetadata(shape, anyres, (side, side), processor, token)

    def needs(self) -> Needs:
        """The memory that the model needs; its weights may be of several dtypes."""
        return replace(self.shape.needs(), weights=self._weights)

    def freeze(self) -> None:
        """Prepack linear layers where that is faster; weights must not change afterwards."""
        run = max(*self._feature_states, len(self._layers) - 1)
        self._layers[:run] = [packed_module(layer, _replacement) for layer in self._layers[:run]]
        self._projector = packed_module(self._projector)

    def canvas(self, tiles: Tiles) -> Canvas:
        """The canvas of tokens that the image lies on."""
        return Canvas.from_image_size(tiles.size, tiles.grid, self._side)

    def encode(self, tiles: Sequence[Tiles], seeds: Sequence[int]) -> list[Views]:
        """Run the tower; `features` (V, N, D_vision) are not projected yet."""
        pixels = torch.from_numpy(np.concatenate([image.pixels for image in tiles]))
        at_once = GPU_TOWER_VIEWS if self.device.type == "cuda" else CPU_TOWER_VIEWS
        parts = [self._run_tower(part) for part in pixels.split(at_once)]  # type: ignore[no-untyped-call]  # torch's split is
        counts = [len(image.pixels) for image in tiles]
        features = torch.split(torch.cat([part[0] for part in parts]), counts)
        scores = torch.split(torch.cat([part[1] for part in parts]), counts)
        return [
            Views(features[i], scores[i], self.canvas(image), image.size, seed=seeds[i])
            for i, image in enumerate(tiles)
        ]

    def _run_tower(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (V, T, T, 3) to features (V, N, D) and scores (V, N)."""
        last = len(self._layers) - 1
        wanted = {*self._feature_states, last}
        states: dict[int, Tensor] = {}
        state = self._tower.pre_layrnorm(self._tower.embeddings(self._normalised(pixels)))
        for index in range(max(wanted) + 1):
            if index > 0:
                state = self._layers[index - 1](state, attention_mask=None)
            if index in wanted:
                states[index] = state
        features = torch.cat([states[index][:, 1:] for index in self._feature_states], dim=-1)
        return features, class_token_scores(self._tower.encoder.layers[last], states[last])

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
        """Gather, project in one call, insert newlines; per image (K, D_text)."""
        rows = [_gathered(view, chosen) for view, chosen in zip(views, selections, strict=True)]
        packed = self._projector(torch.cat(rows))
        newlines = torch.cat([chosen.token_index for chosen in selections]) == NEWLINE
        packed[newlines] = self._newline
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
        marks = [i for i, token in enumerate(token_ids) if token == self._image_token_id]
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


class _FeedForward(nn.Module):
    """A CLIP layer's feed-forward part with `x sigmoid(1.702 x)` between its two products.

    That is `silu(1.702 x) / 1.702`: one pass in place, as the products take the factors over. It
    takes 5 to 13 % less time than with passes for the factors (4 views, width 96, one thread).
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self._first = Linear.from_layers(mlp.fc1, product=QUICK_GELU, shift=QUICK_GELU)
        self._second = Linear.from_layers(mlp.fc2, product=1 / QUICK_GELU)

    def forward(self, inputs: Tensor) -> Tensor:
        return self._second(F.silu(self._first(inputs), inplace=True))


class _ViewAttention(nn.Module):
    """A CLIP layer's attention, all heads of all views in one call of compiled code."""

    def __init__(self, attention: Any, compiled: CompiledAttention) -> None:
        super().__init__()
        self._inputs = Linear.from_layers(attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = Linear.from_layers(attention.out_proj)
        self._size = int(attention.head_dim)
        self._pattern = MaskPattern(float(attention.scale), causal=False)
        self._attend = compiled

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """(V, N, D) to (V, N, D); attention weights are not returned."""
        views, tokens, width = hidden_states.shape
        queries, keys, values = (
            part.view(views * tokens, -1, self._size)
            for part in self._inputs.each(hidden_states.flatten(0, 1))
        )
        table = SequenceTable.from_sequences(
            [(view * tokens, tokens, tokens) for view in range(views)]
        )
        out = self._attend(
            queries, keys.transpose(0, 1), values.transpose(0, 1), table, self._pattern
        )
        return self._output(out.view(views, tokens, width)), None


def _replacement(module: nn.Module) -> nn.Module | None:
    """The module that replaces a submodule of a tower layer, or None to keep it."""
    if isinstance(module, CLIPMLP) and isinstance(module.activation_fn, QuickGELUActivation):
        return _FeedForward(module)
    if isinstance(module, CLIPAttention):
        weight = module.q_proj.weight
        compiled = kernel_for(module.head_dim, weight.dtype, weight.device)
        return None if compiled is None else _ViewAttention(module, compiled)
    return None


def class_token_scores(layer: Any, state: Tensor) -> Tensor:
    """Mean over heads of the class token's attention logits to every patch, float32 (V, N).

    Args:
        layer: The CLIP encoder layer of the scores; it is not run.
        state: The layer's input, (V, 1 + N, D), class token first.
    """
    attention, norm = layer.self_attn, layer.layer_norm1
    size = state.shape[-1:]
    x = F.layer_norm(state.float(), size, norm.weight.float(), norm.bias.float(), norm.eps)
    query = F.linear(x[:, 0], attention.q_proj.weight.float(), attention.q_proj.bias.float())
    folded = query @ attention.k_proj.weight.float()  # (V, D)
    shift = query @ attention.k_proj.bias.float()  # (V,): equal within a view, not between views
    logits: Tensor = torch.einsum("vnd,vd->vn", x[:, 1:], folded) + shift[:, None]
    return logits * float(attention.scale / attention.num_heads)


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
    if selection.features is not None:
        return selection.features.to(views.features.dtype)
    return views.features.flatten(0, 1).index_select(0, selection.token_index.clamp_min(0))


def _feature_states(config: Any, layers: int) -> tuple[int, ...]:
    """Indices of the hidden states that make the features; 0 is the input of the first layer."""
    named = config.vision_feature_layer
    named = [named] if isinstance(named, int) else list(named)
    return tuple(index + layers + 1 if index < 0 else index for index in named)


def pixel_table(anyres: AnyRes) -> Tensor:
    """Normalised value of each byte, float32 (3, 256), bit-equal to the HF numpy processor.

    The processor rescales in float64, rounds to float32, then normalises in float32.
    """
    bytes_ = torch.arange(256, dtype=torch.float64)
    rescaled = (bytes_ * anyres.rescale).to(torch.float32)
    mean = torch.tensor(anyres.mean, dtype=torch.float32)[:, None]
    std = torch.tensor(anyres.std, dtype=torch.float32)[:, None]
    return (rescaled - mean) / std
