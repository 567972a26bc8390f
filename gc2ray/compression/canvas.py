"""Geometry of dynamic cropping: how an image is cut, and where it lies among its tokens.

`AnyRes` is what a processor prescribes, `Tiles` an image cut that way. Its crops, laid out in their
grid, form a `Canvas` of tokens; the image covers a rectangle of it (`rows`, `columns`), the rest is
padding.

A packed image is the thumbnail's tokens in raster order, without newlines, then the canvas row by
row, each row closed by one newline token (LLaVA-NeXT's "spatial_unpad"; transformers,
`pack_image_features`).

Sizes are (height, width), grids (rows, columns), as in transformers; LLaVA itself and the
reference implementation of GlobalCom2 write (width, height).

Not covered: token merging inside the tower, thumbnails that come last, video; the tensors that
follow from all this (`gc2ray.compression.canvas_index`), because whoever only cuts or counts needs
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEWLINE = -1
"""The mark of a newline token in `Selection.source`."""


@dataclass(frozen=True)
class AnyRes:
    """The dynamic cropping of a processor.

    Attributes:
        tile: Side of a view in pixels.
        pinpoints: Allowed canvas sizes in pixels, (height, width).
        resample: Pillow's number of the resampling filter.
        mean: Per channel, of pixel values rescaled by `rescale`.
        std: Likewise.
        rescale: Factor from 0..255.
    """

    tile: int
    pinpoints: tuple[tuple[int, int], ...]
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float

    def canvas_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The pinpoint for an image: most effective pixels, then least waste, then the first.

        Source: LLaVA-NeXT's `select_best_resolution`, as transformers has it.
        """
        height, width = size

        def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            covered = int(width * scale) * int(height * scale)
            effective = min(covered, width * height)
            return effective, effective - pinpoint[0] * pinpoint[1]

        return max(self.pinpoints, key=merit)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Crop rows and columns for an image."""
        height, width = self.canvas_size(size)
        return height // self.tile, width // self.tile


@dataclass(frozen=True)
class Tiles:
    """An image cut into views, still as bytes: `pixels` is uint8 (V, T, T, 3), thumbnail first."""

    pixels: np.ndarray
    size: tuple[int, int]
    grid: tuple[int, int]


@dataclass(frozen=True)
class Canvas:
    """Where the image lies on its canvas of tokens.

    Attributes:
        grid: Crop rows and columns.
        side: Token rows and columns of one view.
        rows: First and last-plus-one canvas row that the image covers.
        columns: Likewise for columns.
    """

    grid: tuple[int, int]
    side: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    @staticmethod
    def of(
        size: tuple[int, int], grid: tuple[int, int], side: tuple[int, int], digits: int | None = 7
    ) -> Canvas:
        """The rectangle that is left when the padding of an image of `size` is taken off.

        Args:
            size: Height and width of the original image.
            grid: Crop rows and columns.
            side: Token rows and columns of one view.
            digits: transformers rounds to 7 decimals before it truncates (`unpad_image`); the
                reference implementation does not (None).
        """
        height, width = grid[0] * side[0], grid[1] * side[1]

        def margin(extent: int, length: int, scale: float) -> tuple[int, int]:
            covered = length * scale if digits is None else round(length * scale, digits)
            padding = (extent - int(covered)) // 2
            return padding, max(padding, extent - padding)

        if size[1] / size[0] > width / height:
            return Canvas(grid, side, margin(height, size[0], width / size[1]), (0, width))
        return Canvas(grid, side, (0, height), margin(width, size[1], height / size[0]))

    @property
    def crops(self) -> int:
        """Crops of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def height(self) -> int:
        """Canvas rows that the image covers."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """Canvas columns that the image covers."""
        return self.columns[1] - self.columns[0]

    @property
    def newlines(self) -> int:
        """Newlines of the uncompressed image: one per covered row, bare ones included."""
        return self.height

    def crop_extents(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Per crop, in raster order: covered (first, stop) token rows and columns within it."""

        def cut(span: tuple[int, int], index: int, side: int) -> tuple[int, int]:
            first = min(max(span[0] - index * side, 0), side)
            return first, max(first, min(max(span[1] - index * side, 0), side))

        return [
            (cut(self.rows, r, self.side[0]), cut(self.columns, c, self.side[1]))
            for r in range(self.grid[0])
            for c in range(self.grid[1])
        ]

    def tokens_per_view(self) -> list[int]:
        """Valid tokens of the thumbnail and of each crop, in raster order."""
        crops = [
            (bottom - top) * (right - left) for (top, bottom), (left, right) in self.crop_extents()
        ]
        return [self.side[0] * self.side[1], *crops]
