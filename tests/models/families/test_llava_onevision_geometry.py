"""LLaVA-OneVision's geometry: by hand, and against what stock's processor counts."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaOnevisionConfig, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from gc2ray.compression.geometry import NEWLINE, Geometry, ViewGrid
from gc2ray.compression.geometry_index import geometry_index
from gc2ray.models.families.llava_onevision import LlavaOnevision
from tests.support.tiny_onevision import ALLOWED_VIEWS, GRIDS, PATCH, SIDE

Size = tuple[int, int]
ROUNDED = ((1118, 3580), (988, 1230), (1813, 1820), (1454, 2406), (1969, 706))
"""With views of 27 x 27 tokens, of which nine are allowed, floor division gives fewer rows."""
NEARLY_WHOLE = ((1666, 1428), (738, 1722), (2250, 1750))
"""Sizes whose rows or columns on the canvas are whole but for the last bits of a float."""


@cache
def tiny(allowed: int = ALLOWED_VIEWS, grids: tuple[Size, ...] = GRIDS) -> LlavaOnevision:
    """The family of `tiny_onevision`, without a model."""
    pinpoints = [[SIDE * rows, SIDE * columns] for rows, columns in grids]
    config: Any = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=SIDE, patch_size=PATCH),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=f"anyres_max_{allowed}",
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=pinpoints
    )
    processor: Any = SimpleNamespace(image_processor=images)
    return LlavaOnevision(config, processor)


def of(size: Size, *, alone: bool = True) -> Geometry:
    return tiny().geometry(size, alone=alone)


def grid_of(view: ViewGrid) -> Size:
    return view.rows, view.columns


def test_a_canvas_that_is_not_scaled_by_hand() -> None:
    """60 x 90 pixels: crops 1 x 2, the image in 9 of 12 columns; padding is cut in pairs."""
    geometry = of((60, 90))
    assert geometry.views == (
        ViewGrid(6, 6, 0, 0, 6, 6), ViewGrid(6, 5, 0, 0, 6, 10), ViewGrid(6, 5, 0, 5, 6, 10)
    )  # fmt: skip
    assert (geometry.thumbnail, geometry.canvas, geometry.newlines) == (0, None, 6)
    entries = geometry.entries.tolist()
    assert entries[:36] == [*range(36)]
    assert entries[36:47] == [*range(36, 41), *range(66, 71), NEWLINE]
    assert entries[47:58] == [*range(41, 46), *range(71, 76), NEWLINE]
    assert entries[-11:] == [*range(61, 66), *range(91, 96), NEWLINE]


def test_a_canvas_that_is_scaled_by_hand() -> None:
    """400 x 300: 4 x 3 crops, 24 x 18 tokens are sqrt(3) too long a side, 13 x 10 remain.

    Of 13 centres (i + 1/2) 24/13 three lie in each crop's six rows, but for the seventh: it lies
    on the border, 12, and the third crop has it.
    """
    geometry = of((400, 300))
    assert [grid_of(view) for view in geometry.views[1::3]] == [(3, 3), (3, 3), (4, 3), (3, 3)]
    assert [grid_of(view) for view in geometry.views[7:10]] == [(4, 3), (4, 4), (4, 3)]
    assert [view.top for view in geometry.views[1::3]] == [0, 3, 6, 10]
    assert [view.left for view in geometry.views[1:4]] == [0, 3, 7]
    assert {(view.height, view.width) for view in geometry.views[1:]} == {(13, 10)}
    assert geometry.visual_tokens == 36 + 130
    assert geometry.newlines == 13
    assert geometry.entries[36:47].tolist() == [36, 37, 38, 45, 46, 47, 48, 57, 58, 59, NEWLINE]


def test_regions_of_the_thumbnail_are_those_of_the_crops() -> None:
    """By centres: thumbnail rows end at 1/6, 2/6, …; crops of 13 rows at 3, 6, 10."""
    region = geometry_index(of((400, 300)), torch.device("cpu")).region_of.view(6, 6)
    assert region[:, 0].tolist() == [0, 3, 3, 6, 6, 9]
    assert region[0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("size", [(7, 200), (1, 3000), (1, 300)])
def test_an_image_too_thin_for_a_row_has_its_thumbnail_alone(size: Size) -> None:
    geometry = of(size)
    assert geometry.entries.tolist() == [*range(36)]
    assert geometry.valid_per_view == (36, *[0] * len(geometry.crops))
    assert len(geometry.views) == tiny().cropping.cut(size).views > 1


def test_one_of_several_images_by_hand() -> None:
    """60 x 190: 65 pixels above and below are two whole rows of six each; two show the image."""
    geometry = of((60, 190), alone=False)
    assert geometry.views == (ViewGrid(6, 6, -2, 0, 2, 6),)
    assert (geometry.thumbnail, geometry.visual_tokens, geometry.newlines) == (None, 36, 1)
    assert geometry.valid_per_view == (12,), "what shows the image; the prompt has the rest, too"
    assert geometry.entries.tolist() == [*range(36), NEWLINE]
    assert np.flatnonzero(geometry.valid).tolist() == [*range(12, 24)]
    tall = of((200, 90), alone=False)
    assert tall.views == (ViewGrid(6, 6, 0, -1, 6, 4),)
    assert of((1, 3000), alone=False).views == (ViewGrid(6, 6, -2, 0, 1, 6),)
    assert of((1, 1), alone=False).views == (ViewGrid(6, 6, 0, 0, 6, 6),)


@cache
def of_real_size(views: int) -> tuple[LlavaOnevision, Any]:
    """Our family and stock's processor with the pinpoints of published models."""
    aspect = f"anyres_max_{views}"
    images = LlavaOnevisionImageProcessorPil()
    config: Any = LlavaOnevisionConfig(vision_aspect_ratio=aspect)
    processor: Any = SimpleNamespace(image_processor=images)
    stock: Any = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    stock.image_processor, stock.num_image_tokens, stock.vision_aspect_ratio = images, 729, aspect
    return LlavaOnevision(config, processor), stock


edges = st.one_of(st.integers(1, 4000), st.integers(1, 200))


@settings(max_examples=300, deadline=None)
@given(size=st.tuples(edges, edges), views=st.sampled_from([9, 4, 1]))
def test_tokens_are_as_many_as_stock_counts(size: Size, views: int) -> None:
    check_count(size, views)


@pytest.mark.parametrize(
    "size", [*ROUNDED, *NEARLY_WHOLE, (384, 384), (768, 1152), (1152, 1152), (1152, 1536)]
)
@pytest.mark.parametrize("views", [9, 4, 1])
def test_tokens_are_as_many_as_stock_counts_where_floats_round(size: Size, views: int) -> None:
    check_count(size, views)


def check_count(size: Size, views: int) -> None:
    family, stock = of_real_size(views)
    geometry = family.geometry(size)
    assert geometry.counts[0] == 729
    assert len(geometry.entries) == stock._get_number_of_features(*size, 384, 384)
    grid = family.cropping.cut(size).grid
    covered, newlines = stock._get_unpadded_features(*size, 27, 27, *grid)
    assert (geometry.visual_tokens - 729, geometry.newlines) == (covered, newlines)
    assert len(geometry.views) == family.cropping.cut(size).views


def test_the_rounded_sizes_can_tell_floor_division_from_division() -> None:
    for size in ROUNDED:
        family, _ = of_real_size(9)
        canvas = family.canvas(size)
        ratio = (canvas.height * canvas.width / (9 * 27**2)) ** 0.5
        assert family._scaled(canvas) != (int(canvas.height / ratio), int(canvas.width / ratio))


def test_a_canvas_scaled_to_no_row_leaves_the_thumbnail() -> None:
    """Two rows of 120 are scaled by 2.6; stock fails on such an image."""
    family, size = tiny(1, ((1, 20),)), (15, 1680)
    assert (family.canvas(size).height, family.canvas(size).width) == (2, 120)
    geometry = family.geometry(size)
    assert geometry.views[1].height == 0
    assert geometry.entries.tolist() == [*range(36)]
