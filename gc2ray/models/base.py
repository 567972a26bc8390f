"""What a model architecture brings: `ModelAdapter`, the only code that knows a model's insides.

`Prompt` is what the language model then reads.
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

    Attributes:
        anyres: How images are cut for it.
        device: Where its tensors are.
        shape: Its sizes.
        max_positions: Longest sequence of prompt and answer, in tokens.
        kv_bytes_per_token: KV cache of one token over all layers.
    """

    anyres: AnyRes
    device: device
    shape: ModelShape
    max_positions: int
    kv_bytes_per_token: int

    def needs(self) -> Needs:
        """How much memory the model takes."""

    def freeze(self) -> None:
        """Get ready for inference only: weights will not change any more."""

    def canvas(self, tiles: Tiles) -> Canvas:
        """Where the image lies on its canvas of tokens."""

    def encode(self, tiles: Sequence[Tiles], seeds: Sequence[int]) -> list[Views]:
        """Run the vision tower over the views of several images."""

    def pack(self, views: Sequence[Views], selections: Sequence[Selection]) -> list[Tensor]:
        """Project what was kept; per image (K, D), newlines included."""

    def embed(
        self,
        token_ids: Sequence[int],
        images: Sequence[Tensor],
        places: Sequence[OriginalPositions | None] = (),
    ) -> Prompt:
        """Put packed images where the token ids have their image placeholders.

        Args:
            token_ids: Of the rendered chat prompt.
            images: Packed images, (K, D) each.
            places: Per image, where its tokens would stand if nothing were dropped, or None. Where
                any are known, the prompt has positions of its own.
        """


@dataclass(frozen=True)
class ModelMetadata:
    """What is known of a model without its weights: enough to count what rows will cost.

    Attributes:
        shape: Its sizes.
        anyres: How images are cut for it.
        side: Token rows and columns of a view.
        processor: Tokenizer and chat template.
        image_token_id: The placeholder of an image.
    """

    shape: ModelShape
    anyres: AnyRes
    side: tuple[int, int]
    processor: Any
    image_token_id: int

    def canvas(self, size: tuple[int, int]) -> Canvas:
        """Where an image of (height, width) pixels lies on its canvas of tokens."""
        return Canvas.from_image_size(size, self.anyres.grid(size), self.side)


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: The transformers model, untouched.
        processor: Its processor: tokenizer, chat template, image settings.
        family: Our view of it.
        end_tokens: Ids that end an answer.
        digest: Which model it is (`gc2ray.models.checkpoint.fetch.digest`); empty where nobody has
        looked.
    """

    model: Any
    processor: Any
    family: ModelAdapter
    end_tokens: tuple[int, ...]
    digest: str = ""


@dataclass(frozen=True)
class Prompt:
    """What the language model reads.

    Attributes:
        embeds: (T, D).
        visual: Spans (first, stop) of the images in it.
        positions: Position of every token, (T,), or None for 0..T-1.
        prefix_key: Equal for prompts that start with the same `visual[-1][1]` tokens.
        token_ids: Of its text, with an image's placeholder once; only who counts repetitions asks.
    """

    embeds: Tensor
    visual: tuple[tuple[int, int], ...] = ()
    positions: Tensor | None = None
    prefix_key: str | None = None
    token_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return int(self.embeds.shape[0])

    def until(self, stop: int) -> Prompt:
        """Its first tokens, which nobody shares."""
        positions = None if self.positions is None else self.positions[:stop]
        return Prompt(self.embeds[:stop], self.visual, positions)

    @property
    def prefix(self) -> int:
        """Tokens that prompts with the same `prefix_key` begin with; 0 without a key."""
        return self.visual[-1][1] if self.prefix_key is not None else 0
