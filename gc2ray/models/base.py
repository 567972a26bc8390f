"""`ModelAdapter`: the interface of a model architecture, the only code that knows its internals.

`Prompt` is the input that it makes for the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, device

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.selection import OriginalPositions, Selection
from gc2ray.compression.views import Views
from gc2ray.models.image_processor import AnyRes, Tiles
from gc2ray.models.shape import ModelShape, Needs


class ModelAdapter(Protocol):
    """Vision side, projector and text table of a loaded model.

    Args:
        model: The transformers model.
        processor: The model's processor.

    Attributes:
        anyres: How images are cut into views.
        device: Device of the model's tensors.
        shape: The model's sizes.
        max_positions: Longest sequence of prompt and answer, in tokens.
        kv_bytes_per_token: Bytes of KV cache of one token over all layers.
    """

    anyres: AnyRes
    device: device
    shape: ModelShape
    max_positions: int
    kv_bytes_per_token: int

    def __init__(self, model: Any, processor: Any) -> None: ...

    @staticmethod
    def metadata(config: Any, processor: Any, itemsize: int) -> ModelMetadata:
        """The model without its weights.

        Args:
            config: The model's config.
            processor: The model's processor.
            itemsize: Bytes of a weight.
        """

    def needs(self) -> Needs:
        """The memory that the model needs."""

    def freeze(self) -> None:
        """Optimise for inference; weights must not change afterwards."""

    def canvas(self, tiles: Tiles) -> Canvas:
        """The canvas of tokens that the image lies on."""

    def encode(self, tiles: Sequence[Tiles], seeds: Sequence[int]) -> list[Views]:
        """Run the vision tower over the views of several images."""

    def pack(self, views: Sequence[Views], selections: Sequence[Selection]) -> list[Tensor]:
        """Project the selected tokens; per image (K, D), newlines included."""

    def embed(
        self,
        token_ids: Sequence[int],
        images: Sequence[Tensor],
        positions: Sequence[OriginalPositions | None] = (),
    ) -> Prompt:
        """Replace the image placeholders of token ids by packed images.

        Args:
            token_ids: Token ids of the rendered chat prompt.
            images: Packed images, (K, D) each.
            positions: Per image, the positions that its tokens would have if nothing were dropped,
                or None. If any image has them, the prompt has explicit positions.
        """


@dataclass(frozen=True)
class ModelMetadata:
    """A model without its weights: enough to compute the cost of rows.

    Attributes:
        shape: The model's sizes.
        anyres: How images are cut into views.
        side: Token rows and columns of a view.
        processor: Tokenizer and chat template.
        image_token_id: Id of an image's placeholder.
    """

    shape: ModelShape
    anyres: AnyRes
    side: tuple[int, int]
    processor: Any
    image_token_id: int

    def canvas(self, size: tuple[int, int]) -> Canvas:
        """The canvas of tokens of an image of (height, width) pixels."""
        return Canvas.from_image_size(size, self.anyres.grid(size), self.side)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: The transformers model, unchanged.
        processor: Its processor: tokenizer, chat template, image settings.
        adapter: The adapter of its architecture.
        end_tokens: Token ids that end an answer.
        digest: Digest of its files (`gc2ray.models.checkpoint.fetch.model_digest`); empty if none
            was computed.
    """

    model: Any
    processor: Any
    adapter: ModelAdapter
    end_tokens: tuple[int, ...]
    digest: str = ""


@dataclass(frozen=True)
class Prompt:
    """Input of the language model.

    Attributes:
        embeds: Embeddings, (T, D).
        visual: Spans (first, stop) of the images in it.
        positions: Position of every token, (T,), or None for 0..T-1.
        prefix_key: Equal for prompts that start with the same `visual[-1][1]` tokens.
        token_ids: Token ids of the text, with an image's placeholder once; for the repetition
            penalty.
    """

    embeds: Tensor
    visual: tuple[tuple[int, int], ...] = ()
    positions: Tensor | None = None
    prefix_key: str | None = None
    token_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return int(self.embeds.shape[0])

    def until(self, stop: int) -> Prompt:
        """Its first tokens, as a prompt that shares no prefix."""
        positions = None if self.positions is None else self.positions[:stop]
        return Prompt(self.embeds[:stop], self.visual, positions)

    @property
    def prefix(self) -> int:
        """Leading tokens shared by prompts with the same `prefix_key`; 0 without a key."""
        return self.visual[-1][1] if self.prefix_key is not None else 0
