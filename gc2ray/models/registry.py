"""Model architectures by the `model_type` of their config.

To add one: a family in a file of its own in `families/` (`gc2ray.models.base` says what it has), a
line in `FAMILIES`, the same `model_type` in `checkpoint.consistency.MODEL_TYPES`, its rules in
`checkpoint.family_rules.FAMILY_RULES`, and what people should know of its models in
`checkpoint.known_models.KNOWN_MODELS`. The contract tests compare a family's tiny checkpoint with
stock transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from gc2ray.core.config.compression import CLASSLESS_SCORE, Score
from gc2ray.core.errors import ConfigError
from gc2ray.models.adapter import ModelAdapter
from gc2ray.models.base import Family, ModelMetadata, VisionSide
from gc2ray.models.families.idefics3 import Idefics3, Idefics3Vision
from gc2ray.models.families.internvl import InternVL, InternVLVision
from gc2ray.models.families.llava_next import LlavaNext, LlavaNextVision
from gc2ray.models.families.llava_onevision import LlavaOnevision, LlavaOnevisionVision
from gc2ray.models.layers.scores import score_products
from gc2ray.models.processor import Processor
from gc2ray.models.shape import ModelShape

MARKED = ((4096, 4096), (1024, 4096), (4096, 1024), (16, 16))
"""Sizes, (height, width), of images whose views are many or one."""

FAMILIES: dict[str, tuple[type[Family], Callable[[Any, Any, Score], VisionSide]]] = {
    "llava_next": (LlavaNext, LlavaNextVision),
    "llava_onevision": (LlavaOnevision, LlavaOnevisionVision),
    "internvl": (InternVL, InternVLVision),
    "idefics3": (Idefics3, Idefics3Vision),
    "smolvlm": (Idefics3, Idefics3Vision),
}


def family_of(config: Any, processor: Processor) -> Family:
    """The family of a model.

    Args:
        config: The model's config.
        processor: The model's processor.

    Raises:
        ConfigError: The text around views has tokens for which the model has no embedding; on a GPU
            the device would be lost.
    """
    family = FAMILIES[config.model_type][0](config, processor)
    rows = int(config.text_config.vocab_size)
    highest = max(max(family.geometry(size).literal_ids, default=0) for size in MARKED)
    if highest >= rows:
        raise ConfigError(
            f"recipe.model.path: the text around an image's views has token {highest}, and the "
            f"text table has {rows} rows, from 0; use the tokenizer that it was published with"
        )
    return family


def metadata_of(
    config: Any, processor: Processor, itemsize: int, score: Score | None = None
) -> ModelMetadata:
    """A model without its weights.

    Args:
        config: The model's config.
        processor: The model's processor.
        itemsize: Bytes of a weight.
        score: As in `adapter_of`.

    Raises:
        ConfigError: The tower cannot score patches so.
    """
    family, _ = _scored_family(config, processor, score)
    return ModelMetadata(ModelShape.of(family.tower, config, itemsize, _parameters(config)), family)


def _parameters(config: Any) -> int:
    """Parameters of a model, made without memory for them."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def adapter_of(model: Any, processor: Processor, score: Score | None = None) -> ModelAdapter:
    """The adapter of a transformers model of a supported architecture.

    Args:
        model: The model.
        processor: Its processor.
        score: How patches are scored; None: as the family does by default.

    Raises:
        ConfigError: The tower cannot score them so.
    """
    vision_class = FAMILIES[model.config.model_type][1]
    family, chosen = _scored_family(model.config, processor, score)
    return ModelAdapter(model, family, vision_class(model, family, chosen), chosen)


def _scored_family(config: Any, processor: Processor, score: Score | None) -> tuple[Family, Score]:
    """A family whose tower counts its scores, and how patches are scored."""
    family = family_of(config, processor)
    chosen, tower = chosen_score(family, score), family.tower
    norms = bool(getattr(config.vision_config, "use_qk_norm", False))
    products = score_products(chosen, tower.patches, tower.width, norms=norms)
    family.tower = replace(tower, score_products=products)
    return family, chosen


def chosen_score(family: Family, score: Score | None) -> Score:
    """How a family's patches are scored: as asked, or the default of its kind of tower.

    Raises:
        ConfigError: The tower has no class token to score by.
    """
    if score == "class_token" and not family.tower.class_token:
        raise ConfigError(
            "recipe.compression.score: the model's vision tower has no class token; leave the "
            "setting out, or choose received, mean_distance, mean_query or distinct"
        )
    return score or ("class_token" if family.tower.class_token else CLASSLESS_SCORE)
