"""Geometry of dynamic cropping: how an image is cut, and where it lies among its tokens.

`AnyRes` is what a processor prescribes. The crops of an image, laid out in their grid, form a
`Canvas` of tokens; the image covers a rectangle of it (`rows`, `columns`), the rest is padding. A
`CanvasPlan` holds the index tensors that follow from that, made once per geometry and device.

A packed image is the thumbnail's tokens in raster order, without newlines, then the canvas row by
row, each row closed by one newline token (LLaVA-NeXT's "spatial_unpad"; transformers,
`pack_image_features`).

Sizes are (height, width), grids (rows, columns), as in transformers; LLaVA itself and the
reference implementation of GlobalCom2 write (width, height).

Not covered: token merging inside the tower, thumbnails that come last, video.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

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


def pixel_table(anyres: AnyRes) -> Tensor:
    """Normalised value of each byte, float32 (3, 256), bit-equal to the HF numpy processor.

    The processor rescales in float64, rounds to float32, then normalises in float32.
    """
    bytes_ = torch.arange(256, dtype=torch.float64)
    rescaled = (bytes_ * anyres.rescale).to(torch.float32)
    mean = torch.tensor(anyres.mean, dtype=torch.float32)[:, None]
    std = torch.tensor(anyres.std, dtype=torch.float32)[:, None]
    return (rescaled - mean) / std


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


@dataclass(frozen=True, eq=False)
class CanvasPlan:
    """Index tensors that follow from the geometry alone; made once per geometry and device.

    Attributes:
        valid: bool (V, N).
        valid_per_view: The same, counted.
        order: int32 (E,): every token place of the image and every newline in emitted order,
            padding included, newlines as `NEWLINE`; thumbnail, then canvas rows.
        row_of: int64 (E,): canvas row of each entry; the thumbnail's are in a last, extra row.
        image_rows: bool (E,): entries on canvas rows that the image covers, and the thumbnail.
        region_of: int64 (N,): crop that each thumbnail token's region belongs to.
        row_weights: float32 (C, h, h): bilinear weights, crop token row from thumbnail row.
        column_weights: float32 (C, w, w): likewise for columns.
    """

    valid: Tensor
    valid_per_view: tuple[int, ...]
    order: Tensor
    row_of: Tensor
    image_rows: Tensor
    region_of: Tensor
    row_weights: Tensor
    column_weights: Tensor


@lru_cache(maxsize=4096)
def canvas_plan(canvas: Canvas, thumbnail: int | None, device: torch.device) -> CanvasPlan:
    """The plan of a geometry, cached: jobs see few different ones."""
    valid = _valid(canvas, thumbnail)
    order, row_of = _emission(canvas, thumbnail)
    rows = torch.arange(canvas.grid[0] * canvas.side[0] + 1)
    covered = (rows >= canvas.rows[0]) & (rows < canvas.rows[1])
    covered[-1] = True
    return CanvasPlan(
        valid=valid.to(device),
        valid_per_view=tuple(valid.sum(dim=1).tolist()),
        order=order.to(device=device, dtype=torch.int32),
        row_of=row_of.to(device),
        image_rows=covered[row_of].to(device),
        region_of=_regions(canvas).to(device),
        row_weights=_crop_weights(canvas, axis=0).to(device),
        column_weights=_crop_weights(canvas, axis=1).to(device),
    )


def _valid(canvas: Canvas, thumbnail: int | None) -> Tensor:
    crops = torch.zeros(canvas.crops, *canvas.side, dtype=torch.bool)
    for crop, ((top, bottom), (left, right)) in enumerate(canvas.crop_extents()):
        crops[crop, top:bottom, left:right] = True
    flat = crops.flatten(1)
    return flat if thumbnail is None else torch.cat([torch.ones_like(flat[:1]), flat])


def _emission(canvas: Canvas, thumbnail: int | None) -> tuple[Tensor, Tensor]:
    """Emitted order of all token places and newlines, and the canvas row of each."""
    (grid_rows, grid_columns), (height, width) = canvas.grid, canvas.side
    tokens, rows = height * width, grid_rows * height
    first_crop = 0 if thumbnail is None else 1
    places = (torch.arange(canvas.crops * tokens) + first_crop * tokens).view(
        grid_rows, grid_columns, height, width
    )
    lines = places.permute(0, 2, 1, 3).reshape(rows, grid_columns * width)
    lines = torch.cat([lines, torch.full((rows, 1), NEWLINE)], dim=1)
    row_of = torch.arange(rows)[:, None].expand_as(lines).flatten()
    order = lines.flatten()
    if thumbnail is not None:
        order = torch.cat([torch.arange(tokens) + thumbnail * tokens, order])
        row_of = torch.cat([torch.full((tokens,), rows), row_of])
    return order, row_of


def _regions(canvas: Canvas) -> Tensor:
    """Equal parts of the thumbnail, one per crop; the last takes what does not divide."""

    def part(side: int, parts: int) -> Tensor:
        return (torch.arange(side) // max(side // parts, 1)).clamp_max(parts - 1)

    rows, columns = part(canvas.side[0], canvas.grid[0]), part(canvas.side[1], canvas.grid[1])
    return (rows[:, None] * canvas.grid[1] + columns[None, :]).flatten()


def _crop_weights(canvas: Canvas, axis: int) -> Tensor:
    """Per crop, weights that resample the thumbnail to the covered canvas, along one axis.

    Bilinear, corners not aligned: output pixel i of n reads the thumbnail at (i + 1/2) s/n - 1/2.
    Rows of tokens that show no image are zero.
    """
    side = canvas.side[axis]
    first, stop = (canvas.rows, canvas.columns)[axis]
    weights = torch.zeros(canvas.grid[axis] * side, side)
    if stop > first:
        at = (torch.arange(stop - first) + 0.5) * (side / (stop - first)) - 0.5
        at = at.clamp_min(0)
        low = at.floor().long().clamp_max(side - 1)
        high = (low + 1).clamp_max(side - 1)
        lines = torch.arange(first, stop)
        weights.index_put_((lines, low), 1 - (at - low), accumulate=True)
        weights.index_put_((lines, high), at - low, accumulate=True)
    per_part = weights.view(canvas.grid[axis], side, side)
    others = canvas.grid[1 - axis]
    if axis == 0:
        return per_part.repeat_interleave(others, dim=0)
    return per_part.repeat(others, 1, 1)
