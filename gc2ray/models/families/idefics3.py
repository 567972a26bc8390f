"""Idefics3 and SmolVLM: how an image is cut, and what stands in its place in the prompt.

An image is scaled, up or down, until its longer side is a setting of the processor; then both sides
are stretched to multiples of a view's side. That is cut into crops in raster order. The thumbnail,
the whole squeezed into one view, comes last. An image that fits one view is that view alone.

Every crop's tokens follow a marker of its row and column, every row of crops ends in a line break.

Not covered: `do_image_splitting` off, and videos.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST = 4096
"""No side of a scaled image is longer; transformers' `MAX_IMAGE_SIZE`."""

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Markers:
    """Spellings of the tokens around an image's visual tokens.

    Attributes:
        image: Stands for one visual token; in the chat template, for the whole image.
        fake: Before each view, and behind the last.
        whole: Before the thumbnail's tokens.
    """

    image: str = "<image>"
    fake: str = "<fake_token_around_image>"
    whole: str = "<global-img>"

    def crop(self, row: int, column: int) -> str:
        """Before a crop's tokens; rows and columns count from 0."""
        return f"<row_{row + 1}_col_{column + 1}>"


def scaled_size(size: Size, longest: int) -> Size:
    """Size after the first resize: the longer side is `longest`, the other even or `longest`.

    Source: transformers' processor, `_resize_output_size_rescale_to_max_len`, then
    `_resize_output_size_scale_below_upper_bound`.
    """
    height, width = size
    ratio = width / height
    if width >= height:
        height, width = _even(int(longest / ratio)), longest
    else:
        height, width = longest, _even(int(longest * ratio))
    return _bounded((max(height, 1), max(width, 1)))


def canvas_size(size: Size, longest: int, tile: int) -> Size:
    """Size after the second resize, of which the crops are cut.

    It starts from the rounded size of the first, as `resize_for_vision_encoder` does;
    `get_number_of_image_patches` does not, and is wrong for some sizes.
    """
    height, width = scaled_size(size, longest)
    ratio = width / height
    if width >= height:
        width = _multiple(width, tile)
        return _multiple(int(width / ratio), tile), width
    height = _multiple(height, tile)
    return height, _multiple(int(height * ratio), tile)


def grid_of(size: Size, longest: int, tile: int) -> tuple[int, int]:
    """Rows and columns of crops; (0, 0) where the image is one view, uncut."""
    height, width = canvas_size(size, longest, tile)
    return (height // tile, width // tile) if max(height, width) > tile else (0, 0)


def image_text(grid: tuple[int, int], tokens: int, markers: Markers | None = None) -> str:
    """What replaces an image's placeholder in the prompt.

    Args:
        grid: Of `grid_of`.
        tokens: Visual tokens of each view.
        markers: Spellings; None for the usual ones.
    """
    names = markers or Markers()
    rows, columns = grid
    view = names.image * tokens
    text = ""
    for row in range(rows):
        crops = (f"{names.fake}{names.crop(row, column)}{view}" for column in range(columns))
        text += "".join(crops) + "\n"
    before = "\n" if rows else ""
    return f"{text}{before}{names.fake}{names.whole}{view}{names.fake}"


def _even(length: int) -> int:
    return length + length % 2


def _multiple(length: int, of: int) -> int:
    return math.ceil(length / of) * of


def _bounded(size: Size) -> Size:
    """The size with both sides at most `LARGEST`."""
    height, width = size
    ratio = width / height
    if width >= height and width > LARGEST:
        height, width = int(LARGEST / ratio), LARGEST
    elif height > width and height > LARGEST:
        height, width = LARGEST, int(LARGEST * ratio)
    return max(height, 1), max(width, 1)
