"""What an architecture is to gc2ray: its `Family`, without weights, and its `VisionSide`.

Only a family's file knows the architecture's internals; `gc2ray.models.adapter` makes prompts with
both. `Prompt` is the input for the language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from gc2ray.compression.geometry import Geometry
from gc2ray.core.config.compression import Score
from gc2ray.models.image_processor import Cropping
from gc2ray.models.layers.linear import packed_module
from gc2ray.models.layers.scores import SCORES, ScoreInputs
from gc2ray.models.layers.tower import packed_layers
from gc2ray.models.processor import Processor
from gc2ray.models.shape import ModelShape, Tower


class Family(ABC):
    """A model architecture without weights: how images become views, and how prompts hold them.

    Args:
        config: The model's config.
        processor: The model's processor.

    Attributes:
        cropping: How images are cut into views.
        processor: Tokenizer and chat template.
        image_token_id: Id of an image's placeholder in the chat template's output.
        tower: Sizes of the vision side.
        markers: Texts that stand around views in a prompt; row text must not spell them out.
        stock_arguments: What transformers' image processor is called with beside the images.
    """

    cropping: Cropping
    processor: Processor
    image_token_id: int
    tower: Tower
    markers: tuple[str, ...] = ()
    stock_arguments: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def __init__(self, config: Any, processor: Processor) -> None: ...

    @abstractmethod
    def geometry(self, size: tuple[int, int], *, alone: bool = True) -> Geometry:
        """Views and layout of an image.

        Args:
            size: Height and width in pixels.
            alone: Whether it is the only image of its prompt.
        """


class VisionSide(ABC):
    """Vision tower and projector of a loaded model.

    A family's is made from the transformers model, its `Family` and the name of a score, and gives
    the parts of that model to this one.

    Args:
        layers: The tower's layers.
        projector: What turns kept tokens into what the language model reads.
        family: The model's family.
        score: How patches are scored (`gc2ray.models.layers.scores`).

    Attributes:
        newline: The learned newline vector (D,), or None where the model has none.
    """

    newline: Tensor | None = None

    def __init__(self, layers: Iterable[Any], projector: Any, family: Family, score: Score) -> None:
        self.layers, self.projector = list(layers), projector
        self._last, self._tower_shape, self._score = self.layers[-1], family.tower, SCORES[score]

    def freeze(self) -> None:
        """Optimise for inference; weights must not change afterwards."""
        run = self._tower_shape.run_layers
        self.layers[:run] = packed_layers(self.layers[:run])
        self.projector = packed_module(self.projector)

    def scores(self, state: Tensor, features: Tensor) -> Tensor:
        """Scores of patches, float32 (V, N).

        Args:
            state: The last layer's input, (V, [1 +] N, D).
            features: The patches' features, (V, N, D).
        """
        class_token = self._tower_shape.class_token
        return self._score(ScoreInputs(self._last, state, features, class_token))

    @abstractmethod
    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Run the tower over normalised views.

        Args:
            pixels: (V, 3, T, T).

        Returns:
            Features (V, N, D) and scores, float32 (V, N), of the views' visual tokens.
        """

    def arranged(
        self, features: Tensor, scores: Tensor, geometry: Geometry, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Features and scores of an image's views as the tokens of its geometry: view after view.

        Args:
            features: (V, N, D).
            scores: (V, N).
            geometry: The image's.
            size: The image's height and width in pixels.

        Returns:
            (tokens, D) and (tokens,).
        """
        del size
        return features.reshape(geometry.tokens, -1), scores.reshape(geometry.tokens)

    def project(self, features: Tensor) -> Tensor:
        """Kept tokens, (K, D), as the language model reads them, (K, D_text); a new tensor."""
        projected: Tensor = self.projector(features)
        return projected


@dataclass(frozen=True)
class ModelMetadata:
    """A model without its weights: enough to compute the cost of rows.

    Attributes:
        shape: The model's sizes.
        family: How images become views and tokens.
    """

    shape: ModelShape
    family: Family


@dataclass(frozen=True)
class Prompt:
    """Input of the language model.

    Attributes:
        embeds: Embeddings, (T, D).
        visual: Spans (first, stop) of the images in it.
        positions: Position of every token, (T,), or None for 0..T-1.
        prefix_key: Equal for prompts that start with the same `prefix` tokens; None where no
            other prompt does.
        prefix_images: Images in that beginning, which ends behind the last of them.
        token_ids: Token ids of the text, with an image's placeholder once.
        marker_ids: The different literal tokens in the images' places.
    """

    embeds: Tensor
    visual: tuple[tuple[int, int], ...] = ()
    positions: Tensor | None = None
    prefix_key: str | None = None
    prefix_images: int = 0
    token_ids: tuple[int, ...] = ()
    marker_ids: tuple[int, ...] = ()

    @property
    def penalised_ids(self) -> tuple[int, ...]:
        """All tokens that a repetition penalty counts, as stock counts them."""
        return self.token_ids + self.marker_ids

    def __len__(self) -> int:
        return int(self.embeds.shape[0])

    def until(self, stop: int) -> Prompt:
        """Its first tokens, as a prompt that shares no prefix."""
        positions = None if self.positions is None else self.positions[:stop]
        return Prompt(self.embeds[:stop], self.visual, positions)

    @property
    def prefix(self) -> int:
        """Leading tokens shared by prompts with the same `prefix_key`; 0 without a key."""
        if self.prefix_key is None or not self.prefix_images:
            return 0
        return self.visual[self.prefix_images - 1][1]
