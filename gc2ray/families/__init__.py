"""Model architectures, one file each, and how they are loaded.

To add one: a class with the methods of `Family` in a file of its own, a line in `FAMILIES` under
the config's `model_type`. The parity tests run over the registry's tiny models.

Security: `trust_remote_code` is off and weights are read from safetensors only, so loading a model
runs none of its code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from gc2ray.decoding.decoder import end_tokens
from gc2ray.errors import ConfigError
from gc2ray.families.family import Loaded, Outline
from gc2ray.families.llava_next import LlavaNext

FAMILIES: dict[str, type[LlavaNext]] = {"llava_next": LlavaNext}


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
    with _loading(path):
        config, processor = _described(path, where)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, **where
        )
    model.to(device).eval()
    family = FAMILIES[config.model_type](model, processor)
    family.freeze()
    return Loaded(model, processor, family, end_tokens(model))


def outline(path: str, *, dtype: str) -> Outline:
    """What a checkpoint's directory says of the model, without its weights.

    Raises:
        ConfigError: As `load`.
    """
    with _loading(path):
        config, processor = _described(path, {"trust_remote_code": False})
    return FAMILIES[config.model_type].outline(config, processor, getattr(torch, dtype).itemsize)


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Turn what transformers raises into an error that names the model."""
    try:
        yield
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"recipe.model.path: {path} cannot be loaded: {first_line}") from error


def _described(path: str, where: Mapping[str, Any]) -> tuple[Any, Any]:
    """Config and processor."""
    config = AutoConfig.from_pretrained(path, **where)
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(
            f"recipe.model.path: {path} is a {config.model_type} model; supported: {known}"
        )
    # Pillow's image processor, also where torchvision is at hand: its resizing is another.
    return config, AutoProcessor.from_pretrained(path, backend="pil", **where)
