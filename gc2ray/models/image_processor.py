"""Cuts an image into views, bit-equal to transformers' processors, but as bytes.

A `Cropping` has a processor's settings and says for a size how an image is cut: the `Cut`. `tile`
does it and gives the `Tiles`. Each family has a cropping of its own; `AnyRes` is LLaVA-NeXT's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

BLACK = (0, 0, 0)
STRIP_PIXELS = 1 << 24
"""Pixels of a padded image that are in memory at once: 64 MB."""
MOSTLY_PADDING = 8
"""A padded image with so many times the pixels is scaled only where the image shows."""
STRIP_NUMBERS = 1 << 20
"""Numbers that are scaled there at once: 8 MB."""
WEIGHT_BITS = 22
"""Bits behind the point of Pillow's weights for bytes."""

HAMMING = (float(np.float32(0.54)), float(np.float32(0.46)))
"""Of the filter of this name; Pillow has them in single precision."""

_FILTERS: dict[Image.Resampling, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    Image.Resampling.BOX: (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),
    Image.Resampling.BILINEAR: (1.0, lambda x: np.maximum(0.0, 1.0 - np.abs(x))),
    Image.Resampling.HAMMING: (
        1.0,
        lambda x: (
            np.where(np.abs(x) < 1.0, np.sinc(x), 0.0)
            * (HAMMING[0] + HAMMING[1] * np.cos(x * np.pi))
        ),
    ),
    Image.Resampling.BICUBIC: (2.0, lambda x: _cubic(np.abs(x))),
    Image.Resampling.LANCZOS: (
        3.0,
        lambda x: np.where((x >= -3.0) & (x < 3.0), np.sinc(x) * np.sinc(x / 3.0), 0.0),
    ),
}
"""Half the width and the curve of each of Pillow's filters."""


@dataclass(frozen=True)
class Resize:
    """Scale the image to a size in pixels; bytes are rounded behind it, as Pillow does."""

    height: int
    width: int


@dataclass(frozen=True)
class Pad:
    """Lay the image on a larger one.

    Attributes:
        height: Of the larger one, in pixels.
        width: Likewise.
        fill: Its colour.
    """

    height: int
    width: int
    fill: tuple[int, ...] = BLACK


Step = Resize | Pad


@dataclass(frozen=True)
class Cut:
    """How an image becomes views.

    Attributes:
        steps: What is done to the image, in turn.
        grid: Rows and columns of crops that are cut from it then; (0, 0) for none.
        thumbnail: Index of the thumbnail among the views, 0 or the number of crops; None: there is
            none.
        thumbnail_step: Steps that are done before the thumbnail is squeezed into a square.
    """

    steps: tuple[Step, ...]
    grid: tuple[int, int]
    thumbnail: int | None
    thumbnail_step: int = 0

    @property
    def crops(self) -> int:
        """Crops of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def padded_pixels(self) -> int:
        """Pixels of the largest image that it is padded to; 0: to none."""
        pads = (step.height * step.width for step in self.steps if isinstance(step, Pad))
        return max(pads, default=0)

    @property
    def views(self) -> int:
        """Crops and thumbnail."""
        return self.crops + (self.thumbnail is not None)


class Cropping(Protocol):
    """A processor's settings.

    Attributes:
        tile: Side of a view in pixels.
        resample: Pillow's number of the resampling filter.
        mean: Per channel, of pixel values rescaled by `rescale`.
        std: Per channel, likewise.
        rescale: Factor from 0..255.
        cuts_several_differently: Whether an image is cut differently where its prompt has
            several.
    """

    cuts_several_differently: ClassVar[bool]

    @property
    def tile(self) -> int: ...
    @property
    def resample(self) -> int: ...
    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
    @property
    def rescale(self) -> float: ...

    def cut(self, size: tuple[int, int], *, alone: bool = True) -> Cut:
        """How an image of (height, width) pixels is cut.

        Args:
            size: The image's size.
            alone: Whether it is the only image of its prompt.
        """


@dataclass(frozen=True)
class Tiles:
    """An image cut into views, still as bytes.

    Attributes:
        pixels: uint8 (V, T, T, 3).
        size: Height and width of the image.
        alone: Whether it is the only image of its prompt.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    alone: bool = True


def tile(image: Image.Image, cropping: Cropping, *, alone: bool = True) -> Tiles:
    """The views of an RGB image, as transformers' processor cuts them.

    Args:
        image: The image.
        cropping: The processor's settings.
        alone: Whether it is the only image of its prompt.

    Raises:
        ValueError: The image is not RGB; the caller has to convert it.
    """
    if image.mode != "RGB":
        raise ValueError(f"tile takes RGB, not {image.mode}")
    size, side = (image.height, image.width), cropping.tile
    cut, resample = cropping.cut(size, alone=alone), Image.Resampling(cropping.resample)
    pixels = np.empty((cut.views, side, side, 3), dtype=np.uint8)
    image = _after(cut.steps[: cut.thumbnail_step], image, resample)
    if cut.thumbnail is not None:
        pixels[cut.thumbnail] = np.asarray(image.resize((side, side), resample))
    if cut.crops:
        (rows, columns), first = cut.grid, int(cut.thumbnail == 0)
        image = _after(cut.steps[cut.thumbnail_step :], image, resample)
        crops = np.asarray(image).reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
        pixels[first : first + cut.crops].reshape(crops.shape)[...] = crops
    return Tiles(pixels, size, alone)


def _after(steps: Sequence[Step], image: Image.Image, resample: Image.Resampling) -> Image.Image:
    """The image after some steps."""
    match steps:
        case [Resize() as size, *others]:
            return _after(others, image.resize((size.width, size.height), resample), resample)
        case [Pad() as pad, Resize() as size, *others]:
            return _after(others, _padded_and_scaled(image, pad, size, resample), resample)
        case [Pad() as pad, *others]:
            return _after(others, _padded(image, pad), resample)
    return image


def _padded(image: Image.Image, pad: Pad) -> Image.Image:
    canvas = Image.new("RGB", (pad.width, pad.height), pad.fill)
    canvas.paste(image, ((pad.width - image.width) // 2, (pad.height - image.height) // 2))
    return canvas


def _padded_and_scaled(
    image: Image.Image, pad: Pad, size: Resize, resample: Image.Resampling
) -> Image.Image:
    """What Pillow makes of the padded image, which may be too large: the square of a line is.

    The bytes are those of one call: Pillow scales squares along rows first, each row by itself.
    """
    if pad.height != pad.width or size.height != size.width:
        return _padded(image, pad).resize((size.width, size.height), resample)
    if pad.height * pad.width >= MOSTLY_PADDING * image.height * image.width:
        return _scaled_where_it_shows(image, pad, size, resample)
    above = (pad.height - image.height) // 2
    squeezed = Image.new("RGB", (size.width, pad.height), pad.fill)
    rows = max(1, STRIP_PIXELS // pad.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip = _padded(part, replace(pad, height=part.height))
        squeezed.paste(strip.resize((size.width, part.height), resample), (0, above + top))
    return squeezed.resize((size.width, size.height), resample)


def _scaled_where_it_shows(
    image: Image.Image, pad: Pad, size: Resize, resample: Image.Resampling
) -> Image.Image:
    """The same bytes; of pixels that show padding alone only the colour is computed."""
    kernels = list(_kernels(pad.width, size.width, resample))
    sums = np.array([weights.sum() for _, weights in kernels])
    fill = np.array([pad.fill], dtype=np.float64)
    padding = _rounded(sums[:, None] * fill)  # of each column; all rows are alike
    canvas = _rounded(sums[:, None, None] * padding)
    pixels = np.asarray(image).transpose(1, 0, 2)
    columns, shown = _scaled(pixels, pad.width, kernels, fill)
    rows, shown = _scaled(shown.transpose(1, 0, 2), pad.height, kernels, padding[columns])
    canvas[rows, columns] = shown
    return Image.fromarray(canvas.astype(np.uint8))


def _scaled(
    lines: np.ndarray, length: int, kernels: Sequence[tuple[int, np.ndarray]], fill: np.ndarray
) -> tuple[slice, np.ndarray]:
    """Lines in the middle of padding, scaled; sums are whole numbers below 2**53, and so exact.

    Args:
        lines: Bytes, (count, N, 3).
        length: How many lines there are with the padding before and behind.
        kernels: Of each scaled line.
        fill: A line of the padding, (N or 1, 3).

    Returns:
        Which scaled lines show any of the given ones, and these, (count, N, 3).
    """
    start = (length - len(lines)) // 2
    end = start + len(lines)
    near = [
        index
        for index, (first, weights) in enumerate(kernels)
        if first < end and first + len(weights) > start
    ]
    scaled = np.empty((len(near), *lines.shape[1:]), dtype=np.uint8)
    width = max(1, STRIP_NUMBERS // (3 * len(lines)))
    fill = np.broadcast_to(fill, lines.shape[1:])
    for left in range(0, lines.shape[1], width):
        part = slice(left, left + width)
        strip = lines[:, part].astype(np.float64, order="C") - fill[part]
        for line, (first, weights) in zip(scaled, (kernels[at] for at in near), strict=True):
            low, high = max(first, start), min(first + len(weights), end)
            inside = weights[low - first : high - first]
            total = np.tensordot(inside, strip[low - start : high - start], 1)
            line[part] = _rounded(total + weights.sum() * fill[part])
    return slice(min(near, default=0), max(near, default=-1) + 1), scaled


def _rounded(sums: np.ndarray) -> np.ndarray:
    """Weighted sums of bytes as bytes, still float64."""
    half = 1 << (WEIGHT_BITS - 1)
    return np.clip(np.floor((sums + half) / (1 << WEIGHT_BITS)), 0, 255)


def _kernels(
    length: int, scaled: int, resample: Image.Resampling
) -> Iterator[tuple[int, np.ndarray]]:
    """Pillow's weights of `length` pixels for each of `scaled` ones, from the first that counts."""
    if resample is Image.Resampling.NEAREST:
        numbers = Image.fromarray(np.arange(length, dtype=np.int32)[None])
        for nearest in np.asarray(numbers.resize((scaled, 1), resample))[0]:
            yield int(nearest), np.full(1, 1 << WEIGHT_BITS, dtype=np.float64)
        return
    support, curve = _FILTERS[resample]
    factor = max(1.0, length / scaled)
    for index in range(scaled):
        center = (index + 0.5) * (length / scaled)
        first = max(0, int(center - support * factor + 0.5))
        end = min(length, int(center + support * factor + 0.5))
        weights = curve((np.arange(first, end) - center + 0.5) * (1.0 / factor))
        weights = weights / np.cumsum(weights)[-1] * (1 << WEIGHT_BITS)  # added one by one
        yield first, np.trunc(weights + np.copysign(0.5, weights))


def _cubic(x: np.ndarray) -> np.ndarray:
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image scaled to fit; transformers' `get_patch_output_size`."""
    scale_y, scale_x = canvas[0] / size[0], canvas[1] / size[1]
    if scale_x < scale_y:
        return min(math.ceil(size[0] * scale_x), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * scale_y), canvas[1])


@dataclass(frozen=True)
class ViewPixels:
    """What all croppings have; see `Cropping`."""

    cuts_several_differently: ClassVar[bool] = False

    tile: int
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float


@dataclass(frozen=True)
class AnyRes(ViewPixels):
    """LLaVA-NeXT's dynamic cropping.

    The thumbnail is the whole image squeezed into a square. For the crops the image is scaled to
    fit its canvas, centred on black, and the canvas is cut in raster order.

    Attributes:
        pinpoints: Allowed canvas sizes in pixels, (height, width).
    """

    pinpoints: tuple[tuple[int, int], ...]

    def cut(self, size: tuple[int, int], *, alone: bool = True) -> Cut:  # noqa: ARG002
        """See `Cropping.cut`."""
        canvas = self.canvas_size(size)
        steps = (Resize(*fitted_size(size, canvas)), Pad(*canvas))
        return Cut(steps, self.grid(size), thumbnail=0)

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


def view_pixels(image_processor: Any, tile: int) -> ViewPixels:
    """The settings that all image processors have, which `checkpoint.consistency` has checked.

    Args:
        image_processor: The processor.
        tile: Side of a view in pixels.
    """
    mean, std = image_processor.image_mean, image_processor.image_std
    return ViewPixels(
        tile=tile,
        resample=int(image_processor.resample),
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        rescale=float(image_processor.rescale_factor),
    )


def pinpoints_of(image_processor: Any) -> tuple[tuple[int, int], ...]:
    """The canvas sizes that a processor of LLaVA-NeXT's kind allows, (height, width)."""
    return tuple((int(h), int(w)) for h, w in image_processor.image_grid_pinpoints)
