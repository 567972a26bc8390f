"""JPEG to tiles, against the Hugging Face processor.

Our tiles are bytes, which the device normalises by table; the processor's are normalised floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from gc2ray.core.config.input import ImageLimits
from gc2ray.core.records import ImageRef
from gc2ray.data.image_decoding import decode
from gc2ray.engine.prompt_builder import load_tiles
from gc2ray.models.adapter import pixel_table
from gc2ray.models.image_processor import Cropping, tile
from jobs.benchmarks import Line, goal
from jobs.benchmarks.support.inputs import TILE, XGA, opened, photographs, tiny_model
from jobs.benchmarks.support.timing import Work, in_turn, median_ratio

TURNS = 5
SPEED_UP = 2


def run() -> list[Line]:
    """Photographs in one size, and in their own."""
    return [*_compare("1024x768", photographs(XGA)), *_compare("native sizes", photographs())]


def _compare(name: str, data: Sequence[bytes]) -> list[Line]:
    cropping, mode = tiny_model().adapter.family.cropping, ImageLimits()
    images = [decode(item, mode) for item in data]
    stock: Any = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}
    )
    for image, item in zip(images, data, strict=True):
        ours, theirs = _normalised(image, cropping), stock(opened(item), return_tensors="pt")
        if not torch.equal(ours, theirs.pixel_values[0, : len(ours)]):
            raise RuntimeError("our tiles are not bit-equal to the processor's")
    whole: dict[str, Work] = {
        "ours": lambda: [len(load_tiles(ImageRef(item), cropping, mode).pixels) for item in data],
        "stock": lambda: [len(stock(opened(item), return_tensors="pt")) for item in data],
    }
    decoded: dict[str, Work] = {
        "ours": lambda: [len(tile(image, cropping).pixels) for image in images],
        "stock": lambda: [len(stock(image, return_tensors="pt")) for image in images],
    }
    figures = _figures(whole, len(data))
    met = goal(f"ratio at least {SPEED_UP}", met=figures["ratio"] >= SPEED_UP)
    return [
        Line(f"{name}, {len(data)} photographs: JPEG to tiles", figures, met),
        Line(f"{name}: without decoding", _figures(decoded, len(data))),
    ]


def _figures(works: dict[str, Work], images: int) -> dict[str, float]:
    """Images a second of one core."""
    times = in_turn(works, TURNS)
    rates = {f"{name}_images_per_s": images / median(taken.cpu) for name, taken in times.items()}
    return {"ratio": median_ratio(times["stock"].cpu, times["ours"].cpu), **rates}


def _normalised(image: Image.Image, cropping: Cropping) -> Tensor:
    """Our tiles as the processor's: (V, 3, T, T), normalised."""
    pixels = torch.from_numpy(tile(image, cropping).pixels).permute(0, 3, 1, 2).long()
    return pixel_table(cropping)[torch.arange(3)[:, None, None], pixels]
