"""Views without tokens: crops in which no token of a resampled canvas lies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gc2ray.compression.base import Compressor
from gc2ray.compression.geometry import NEWLINE, Geometry, ViewGrid
from gc2ray.compression.packing import Packing
from gc2ray.compression.registry import COMPRESSORS, build
from gc2ray.compression.views import Views
from gc2ray.reporting.heat_map import TokenMap, heat_map

METHODS = [name for name in COMPRESSORS if name != "globalcom2-reference"]
ALL = (np.array([3, 0, 2]), np.array([0, 4, 1, 0]))
FIRST = (np.array([0, 3]), np.array([0, 5]))
LAST = (np.array([3, 0]), np.array([5, 0]))
NO_ROW = (np.array([0, 0]), np.array([2, 3]))
NO_COLUMN = (np.array([2, 3]), np.array([0]))
CUTS = [ALL, FIRST, LAST, NO_ROW, NO_COLUMN]
NAMES = ["all", "first", "last", "no row", "no column"]


def ragged(cut: tuple[np.ndarray, np.ndarray]) -> Geometry:
    """A thumbnail of 4 x 4 tokens, and crops of so many token rows and columns."""
    heights, widths = cut
    tops, lefts = heights.cumsum() - heights, widths.cumsum() - widths
    whole = int(heights.sum()), int(widths.sum())
    views, lines, number = [ViewGrid.whole(4, 4)], np.zeros(whole, dtype=np.int64), 16
    for height, top in zip(heights.tolist(), tops.tolist(), strict=True):
        for width, left in zip(widths.tolist(), lefts.tolist(), strict=True):
            views.append(ViewGrid(height, width, top, left, *whole))
            numbers = np.arange(number, number + height * width).reshape(height, width)
            lines[top : top + height, left : left + width] = numbers
            number += height * width
    closed = np.pad(lines, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return Geometry.from_entries(views, 0, np.concatenate([np.arange(16), closed.ravel()]))


def image(cut: tuple[np.ndarray, np.ndarray], seed: int = 0) -> Views:
    geometry, draw = ragged(cut), torch.Generator().manual_seed(seed)
    features = torch.randn(geometry.tokens, 3, generator=draw)
    scores = torch.randn(geometry.tokens, generator=draw)
    return Views(features, scores, geometry, (50, 60), seed)


@pytest.mark.parametrize("cut", CUTS, ids=NAMES)
def test_tokens_are_counted_in_the_views_that_have_them(
    cut: tuple[np.ndarray, np.ndarray],
) -> None:
    geometry = ragged(cut)
    assert geometry.valid_per_view == geometry.counts
    assert 0 in geometry.counts
    assert geometry.visual_tokens == 16 + int(cut[0].sum() * cut[1].sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", CUTS, ids=NAMES)
def test_methods_keep_tokens_of_the_other_views(
    method: str, cut: tuple[np.ndarray, np.ndarray]
) -> None:
    views, compressor = image(cut), build(method, retention=0.3)
    (selection,) = compressor.many([views])
    kept = selection.kept_per_view(views.geometry)
    if method != "thumbnail":
        assert [count > 0 for count in kept] == [count > 0 for count in views.geometry.counts]
    low, high = compressor.bounds(views.geometry)
    assert low <= sum(kept) <= high
    masks = selection.bitmaps(views.geometry)
    assert [sum(byte.bit_count() for byte in mask) for mask in masks] == list(kept)
    packing = Packing(newlines="all", markers="kept_views")
    (packed,) = packing.apply([views], [selection])
    assert packed.kept_per_view(views.geometry) == kept


@pytest.mark.parametrize("method", METHODS)
def test_batches_with_empty_views_equal_single_images(method: str) -> None:
    compressor: Compressor = build(method, retention=0.3)
    images = [image(cut, seed) for seed, cut in enumerate(CUTS)]
    for together, single in zip(compressor.many(images), images, strict=True):
        assert torch.equal(together.entries, compressor(single).entries)


def test_regions_are_those_of_the_crops_with_tokens() -> None:
    """Three rows above two, four columns beside one: centres of 4 x 4 thumbnail tokens."""
    region = image(ALL).index.region_of.view(4, 4)
    assert region[:, 0].tolist() == [1, 1, 9, 9]
    assert region[0].tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize("cut", CUTS, ids=NAMES)
def test_a_heat_map_is_drawn(cut: tuple[np.ndarray, np.ndarray]) -> None:
    views = image(cut)
    kept = views.geometry.valid.copy()
    pixels = np.zeros((*views.size, 3), dtype=np.uint8)
    token_map = TokenMap(pixels, views.geometry, views.scores[:16].numpy(), kept, ["row"])
    assert heat_map([token_map]).startswith(b"\x89PNG")
    assert token_map.covered().shape == (cut[0].sum(), cut[1].sum())
    assert token_map.covered().all()


def test_an_image_whose_crops_are_all_empty_keeps_its_thumbnail() -> None:
    views = image(NO_ROW)
    bare = replace(views, scores=views.scores.abs())
    (selection,) = build("globalcom2", retention=0.5).many([bare])
    assert selection.kept_per_view(views.geometry) == (8, 0, 0, 0, 0)
    assert len(selection.entries) == 8
