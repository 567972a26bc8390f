"""Model architectures, one file each, and how they are loaded.

To add one: a class with the methods of `Family` in a file of its own, a line in `FAMILIES` under
the config's `model_type`. The parity tests run over the registry's tiny models.

Security: `trust_remote_code` is off and weights are read from safetensors only, so loading a model
runs none of its code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from gc2ray.errors import ConfigError
from gc2ray.families.family import Family, Loaded
from gc2ray.families.llava_next import LlavaNext

FAMILIES: dict[str, Callable[[Any, Any], Family]] = {"llava_next": LlavaNext}


def load(path: str, *, revision: str | None, dtype: str, device: str) -> Loaded:
    """Load a checkpoint from a directory or the Hugging Face hub.

    Args:
        path: Directory, or hub id.
        revision: Commit or tag of a hub id.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu`, `cuda`, `cuda:1`, …

    Raises:
        ConfigError: There is no such model, it is of another architecture, or it has no
            safetensors weights.
    """
    where = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **where)
        if config.model_type not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise ConfigError(
                f"recipe.model.path: {path} is a {config.model_type} model; supported: {known}"
            )
        processor = AutoProcessor.from_pretrained(path, **where)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, **where
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"recipe.model.path: {path} cannot be loaded: {first_line}") from error
    model.to(device).eval()
    family = FAMILIES[config.model_type](model, processor)
    family.freeze()
    return Loaded(model, processor, family)
