"""Tiny checkpoints of every family, and stock's own processor for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from gc2ray.models.families.tiny import TinySpec, build_tiny
from gc2ray.models.hf_reference import stock_processor
from tests.support import tiny_idefics3, tiny_internvl, tiny_onevision

Size = tuple[int, int]


@dataclass(frozen=True)
class TinyFamily:
    """A family's tiny checkpoint.

    Attributes:
        build: Writes model, tokenizer, image processor and chat template into a directory, in the
            files that checkpoints of 2025 have.
        stock: transformers' own processor class for that directory.
        sizes: (height, width) of images, from one view to the most.
        native: Whether the native decoder runs it.
        stock_expands: Whether `check` has transformers' own processor expand placeholders.
    """

    build: Callable[[Path], Any]
    stock: Callable[[Path], Any]
    sizes: tuple[Size, ...]
    native: bool = True
    stock_expands: bool = False


def _stock_llava_next(directory: Path) -> Any:
    path = str(directory)
    parts = (
        AutoTokenizer.from_pretrained(path),
        AutoImageProcessor.from_pretrained(path, backend="pil"),
    )
    return stock_processor(*parts, AutoConfig.from_pretrained(path))


NEXT_SIZES = (
    (84, 84), (60, 90), (200, 100), (168, 168), (300, 310), (90, 333), (400, 300), (7, 200),
    (200, 7), (1000, 420), (1, 1), (85, 251),
)  # fmt: skip
GRANITE = TinySpec(
    tower="siglip", backbone="granite", vision=(32, 5, 4), vision_layers=(-5, -3, -2, -1),
    text=(48, 2, 4, 2), activation="gelu_pytorch_tanh", seed=4,
    grids=((1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (3, 3)),
)  # fmt: skip
"""As Granite Vision 3.x: four layers make the features, and one grid is a single crop."""

FAMILIES: dict[str, TinyFamily] = {
    "llava_next": TinyFamily(build_tiny, _stock_llava_next, NEXT_SIZES, stock_expands=True),
    "llava_next_siglip": TinyFamily(
        lambda path: build_tiny(
            path, TinySpec(tower="siglip", activation="gelu_pytorch_tanh", vision_layers=-2, seed=5)
        ),
        _stock_llava_next,
        NEXT_SIZES,
        stock_expands=True,
    ),
    "granite_vision": TinyFamily(
        lambda path: build_tiny(path, GRANITE), _stock_llava_next, NEXT_SIZES, stock_expands=True
    ),
    "llava_onevision": TinyFamily(tiny_onevision.build, tiny_onevision.stock, tiny_onevision.SIZES),
    "internvl3": TinyFamily(tiny_internvl.built("qwen2"), tiny_internvl.stock, tiny_internvl.SIZES),
    "internvl3_5": TinyFamily(
        tiny_internvl.built("qwen3"), tiny_internvl.stock, tiny_internvl.SIZES
    ),
    "internvl3_5_moe": TinyFamily(
        tiny_internvl.built("qwen3_moe"), tiny_internvl.stock, tiny_internvl.SIZES[:5], native=False
    ),
    "idefics3": TinyFamily(
        tiny_idefics3.build_idefics3, tiny_idefics3.stock_idefics3, tiny_idefics3.SIZES
    ),
    "smolvlm": TinyFamily(
        tiny_idefics3.build_smolvlm, tiny_idefics3.stock_smolvlm, tiny_idefics3.SIZES
    ),
    "smolvlm_one_view": TinyFamily(
        lambda path: tiny_idefics3.build_smolvlm(path, tiny_idefics3.ONE_VIEW),
        tiny_idefics3.stock_smolvlm,
        tiny_idefics3.SIZES,
    ),
}
"""By name; `tests/models/families/test_contract.py` holds them to the contract."""
