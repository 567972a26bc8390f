"""LLaVA-NeXT's kept tokens stand where the pixels are that made them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gc2ray.compression.registry import build
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.families.tiny import TinySpec, build_tiny
from gc2ray.models.image_processor import tile
from tests.support.families import NEXT_SIZES, Size

PATCH, SIDE = 14, 6


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = build_tiny(tmp_path_factory.mktemp("places"), TinySpec(tower="siglip"))
    return loading.load(str(path), revision=None, dtype="float32", device="cpu")


def gradients(size: Size) -> Image.Image:
    """Red is a pixel's place from left to right, green from top to bottom, blue is full."""
    height, width = size
    pixels = np.ones((height, width, 3))
    pixels[..., 0] = (np.arange(width) + 0.5) / width
    pixels[..., 1] = ((np.arange(height) + 0.5) / height)[:, None]
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


@pytest.mark.parametrize("method", ["globalcom2", "uniform"])
@pytest.mark.parametrize("size", NEXT_SIZES)
@torch.inference_mode()
def test_kept_tokens_stand_where_their_pixels_are(
    loaded: LoadedModel, size: Size, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patch's features are its mean colour; padding, which is black, is never kept."""
    adapter = loaded.adapter
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (adapter.family.cropping.mean, adapter.family.cropping.std)
    )

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        colours = F.avg_pool2d(pixels * std + mean, PATCH).flatten(2).transpose(1, 2)
        return colours, colours[..., 0] + 0.01 * torch.rand(colours.shape[:2])

    monkeypatch.setattr(adapter._vision, "run", run)
    (views,) = adapter.encode([tile(gradients(size), adapter.family.cropping)], [0])
    geometry = views.geometry
    kept = [entry for entry in build(method, retention=0.4)(views).entries.tolist() if entry >= 0]
    assert len(kept) > 4
    for entry in kept:
        index = max(i for i, start in enumerate(geometry.starts) if start <= entry)
        view, (row, column) = geometry.views[index], divmod(entry - geometry.starts[index], SIDE)
        red, green, blue = views.features[entry].tolist()
        if blue < 0.99:  # at the border of the image the patch mixes in padding
            continue
        # A pixel of the image may be as large as many tokens, or a token as many of its pixels.
        slack_x = 0.5 / view.width + 1 / size[1]
        slack_y = 0.5 / view.height + 1 / size[0]
        assert abs(red - (view.left + column + 0.5) / view.width) < slack_x
        assert abs(green - (view.top + row + 0.5) / view.height) < slack_y
