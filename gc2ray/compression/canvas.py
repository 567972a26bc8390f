"""`Canvas`: the canvas of tokens that LLaVA-NeXT and its kin lay an image on.

The crops, laid out in their grid, form a `Canvas` of tokens; the image covers a rectangle of it
(`rows`, `columns`), the rest is padding.

A packed image is the thumbnail's tokens in raster order, without newlines, then the canvas row by
row, each row closed by one newline token (LLaVA-NeXT's "spatial_unpad"; transformers,
`pack_image_features`): `gc2ray.compression.geometry.canvas_geometry`.

Sizes are (height, width), grids (rows, columns), as in transformers; LLaVA itself and the
reference implementation of GlobalCom2 write (width, height).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Canvas:
    """The tokens of a grid of crops, and the rectangle of them that the image covers.

    Attributes:
        grid: Crop rows and columns.
        side: Token rows and columns of one view.
        rows: First and last-plus-one canvas row that the image covers.
        columns: First and last-plus-one canvas column that the image covers.
    """

    grid: tuple[int, int]
    side: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]

    @staticmethod
    def from_image_size(
        size: tuple[int, int], grid: tuple[int, int], side: tuple[int, int], digits: int | None = 7
    ) -> Canvas:
        """The canvas of an image of `size`, without the padding that centred it.

        Args:
            size: Height and width of the original image.
            grid: Crop rows and columns.
            side: Token rows and columns of one view.
            digits: transformers rounds to 7 decimals before it truncates (`unpad_image`); the
                reference implementation does not (None).
        """
        height, width = grid[0] * side[0], grid[1] * side[1]

        def covered(tokens: int, length: int, scale: float) -> tuple[int, int]:
            exact = length * scale if digits is None else round(length * scale, digits)
            padding = (tokens - int(exact)) // 2
            return padding, max(padding, tokens - padding)

        if size[1] / size[0] > width / height:
            return Canvas(grid, side, covered(height, size[0], width / size[1]), (0, width))
        return Canvas(grid, side, (0, height), covered(width, size[1], height / size[0]))

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
