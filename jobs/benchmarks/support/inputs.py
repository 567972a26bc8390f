"""What benchmarks share: photographs, a tiny model, and its geometry."""

from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gc2ray.demo.photos import jpeg, opened_photos
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.families.tiny import TinySpec, build_tiny

REAL_GEOMETRY = TinySpec(image_size=336, patch_size=14, vision=(64, 4, 4), text=(128, 3, 4, 4))
"""336-pixel views of 24 x 24 patches and the five pinpoints, as in LLaVA-NeXT-7B; tiny widths."""
IN_PROPORTION = TinySpec(
    image_size=336,
    patch_size=14,
    vision=(96, 6, 3),
    vision_ffn=384,
    text=(512, 8, 8, 8),
    text_ffn=1376,
    table=32_000,
    spread=0.04,
)
"""As LLaVA-NeXT-7B in small: a quarter of the layers, an eighth of the language model's width, and
a tower of that depth, as wide as gives it and the projector the 7B's share of all operations."""
TILE = REAL_GEOMETRY.image_size
SIDE = TILE // REAL_GEOMETRY.patch_size
"""Token rows and columns of a view."""
XGA = (1024, 768)


def opened(data: bytes) -> Image.Image:
    """An image as a user of stock transformers would open it."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def photographs(size: tuple[int, int] | None = None) -> list[bytes]:
    """The sample photographs as RGB JPEGs, in their own sizes or all in one (width, height)."""
    return [
        jpeg(image.resize(size or image.size, Image.Resampling.BICUBIC), 90)
        for image in opened_photos()
    ]


@cache
def tiny_model() -> LoadedModel:
    """A random LLaVA-NeXT: real geometry, tiny widths."""
    return _loaded(REAL_GEOMETRY)


@cache
def model_in_proportion() -> LoadedModel:
    """A random LLaVA-NeXT with real geometry, whose parts cost what a 7B's do in proportion.

    It never ends an answer by itself.
    """
    loaded = _loaded(IN_PROPORTION)
    loaded.model.generation_config.eos_token_id = None
    return loaded


def conditions(model: Any) -> str:
    """What a model runs under, the same for all that are compared."""
    dtype, attention = str(model.dtype).removeprefix("torch."), model.config._attn_implementation
    return f"{dtype}, {attention}, torch threads: {torch.get_num_threads()}"


def _loaded(spec: TinySpec) -> LoadedModel:
    with tempfile.TemporaryDirectory(prefix="gc2ray-bench-") as directory:
        path = build_tiny(Path(directory), spec)
        return loading.load(str(path), revision=None, dtype="float32", device="cpu")
