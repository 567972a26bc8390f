"""Idefics3's geometry, against the functions of transformers' own processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers.models.smolvlm import image_processing_pil_smolvlm as stock
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from gc2ray.models.families.idefics3 import (
    LARGEST,
    Markers,
    canvas_size,
    grid_of,
    image_text,
    scaled_size,
)
from gc2ray.models.families.tiny_smolvlm import TinySmolVlmSpec, untrained_smolvlm


def sizes(count: int) -> list[tuple[int, int]]:
    """Sizes of all shapes, thin ones too."""
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.uniform(0, np.log(6000), size=(count, 2))).astype(int).tolist()
    return [*map(tuple, drawn), (84, 84), (168, 168), (168, 167), (1, 5000), (5000, 1)]


@pytest.mark.parametrize("longest", [168, 1456, 2048, 5000])
def test_the_first_size_is_that_of_transformers(longest: int) -> None:
    for height, width in sizes(500):
        size = stock._resize_output_size_rescale_to_max_len(height, width, max_len=longest)
        size = stock._resize_output_size_scale_below_upper_bound(
            *size, max_len=stock.MAX_IMAGE_SIZE
        )
        assert scaled_size((height, width), longest) == size
        assert max(size) <= LARGEST


@pytest.mark.parametrize(("longest", "tile"), [(168, 84), (200, 84), (168, 168), (130, 48)])
def test_grids_are_those_that_transformers_cuts(longest: int, tile: int) -> None:
    processor = stock.SmolVLMImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": tile}
    )
    for height, width in sizes(40):
        if max(height, width) > 20 * min(height, width):
            continue  # Pillow takes long for them
        image = Image.new("RGB", (width, height))
        cut = processor(image, return_row_col_info=True)
        grid = grid_of((height, width), longest, tile)
        assert (cut["rows"][0][0], cut["cols"][0][0]) == grid
        views = 1 + grid[0] * grid[1]
        assert np.stack(cut["pixel_values"][0]).shape == (views, 3, tile, tile)


def test_both_sides_of_a_canvas_are_multiples_of_a_view() -> None:
    for size in sizes(500):
        height, width = canvas_size(size, 2048, 512)
        assert (height % 512, width % 512) == (0, 0)
        assert max(height, width) == 2048
        assert min(height, width) >= 512


@pytest.mark.parametrize("grid", [(0, 0), (1, 2), (3, 2), (4, 4)])
def test_an_image_s_text_is_that_of_transformers(grid: tuple[int, int]) -> None:
    names = Markers()
    expected = get_image_prompt_string(*grid, 4, names.fake, names.image, names.whole)
    assert image_text(grid, 4) == expected


def test_line_breaks_at_the_thumbnail_are_one_token() -> None:
    """So that markers have to be tokenised in one piece."""
    _, processor = untrained_smolvlm(TinySmolVlmSpec())
    tokens = processor.tokenizer.tokenize(image_text((2, 1), 1))
    fake = "<fake_token_around_image>"
    assert tokens == [
        fake, "<row_1_col_1>", "<image>", "Ċ", fake, "<row_2_col_1>", "<image>", "ĊĊ",
        fake, "<global-img>", "<image>", fake,
    ]  # fmt: skip
