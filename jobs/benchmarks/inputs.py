"""What benchmarks share: photographs, a tiny model, and its geometry."""

from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gc2ray import families
from gc2ray.families.family import Loaded
from gc2ray.families.tiny import TinySpec, build_tiny
from jobs.photos import jpeg, opened_photos

REAL_GEOMETRY = TinySpec(image_size=336, patch_size=14, vision=(64, 4, 4), text=(128, 3, 4, 4))
"""336-pixel views of 24 x 24 patches and the five pinpoints, as in LLaVA-NeXT-7B; tiny widths."""
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
def tiny_model() -> Loaded:
    """A random LLaVA-NeXT: real geometry, tiny widths."""
    with tempfile.TemporaryDirectory(prefix="gc2ray-bench-") as directory:
        path = build_tiny(Path(directory), REAL_GEOMETRY)
        return families.load(str(path), revision=None, dtype="float32", device="cpu")


def conditions(model: Any) -> str:
    """What a model runs under, the same for all that are compared."""
    dtype, attention = str(model.dtype).removeprefix("torch."), model.config._attn_implementation
    return f"{dtype}, {attention}, torch threads: {torch.get_num_threads()}"
