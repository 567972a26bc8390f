"""Cuts an image into tiles, bit-equal to transformers' LLaVA-NeXT processor, but as bytes.

`AnyRes` has the processor's settings; `Tiles` is an image cut by them: the thumbnail, then the
crops in raster order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


def tile(image: Image.Image, anyres: AnyRes) -> Tiles:
    """Thumbnail and crops of an RGB image, as transformers' LLaVA-NeXT processor cuts them.

    The thumbnail is the whole image squeezed into a square. For the crops the image is scaled to
    fit its canvas, centred on black, and the canvas is cut in raster order.

    Returns:
        `Tiles`: pixels uint8 (1 + rows * columns, T, T, 3), `size` that of `image`.

    Raises:
        ValueError: The image is not RGB; the caller has to convert it.
    """
    if image.mode != "RGB":
        raise ValueError(f"tile takes RGB, not {image.mode}")
    size, side = (image.height, image.width), anyres.tile
    canvas_size, (rows, columns) = anyres.canvas_size(size), anyres.grid(size)
    pixels = np.empty((1 + rows * columns, side, side, 3), dtype=np.uint8)
    pixels[0] = np.asarray(image.resize((side, side), Image.Resampling(anyres.resample)))
    canvas = np.asarray(_canvas(image, canvas_size, anyres.resample))
    crops = canvas.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
    pixels[1:].reshape(crops.shape)[...] = crops
    return Tiles(pixels=pixels, size=size, grid=(rows, columns))


def _canvas(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """The image scaled into a black canvas of `size`, (height, width), and centred."""
    height, width = fitted_size((image.height, image.width), size)
    canvas = Image.new("RGB", (size[1], size[0]))
    corner = (size[1] - width) // 2, (size[0] - height) // 2
    canvas.paste(image.resize((width, height), Image.Resampling(resample)), corner)
    return canvas


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image scaled to fit; transformers' `get_patch_output_size`."""
    scale_y, scale_x = canvas[0] / size[0], canvas[1] / size[1]
    if scale_x < scale_y:
        return min(math.ceil(size[0] * scale_x), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * scale_y), canvas[1])


@dataclass(frozen=True)
class AnyRes:
    """The dynamic cropping of a processor.

    Attributes:
        tile: Side of a view in pixels.
        pinpoints: Allowed canvas sizes in pixels, (height, width).
        resample: Pillow's number of the resampling filter.
        mean: Per channel, of pixel values rescaled by `rescale`.
        std: Per channel, likewise.
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


def anyres_from_processor(image_processor: Any, config: Any) -> AnyRes:
    """The processor's image settings, which `checkpoint.consistency` has checked."""
    mean, std = image_processor.image_mean, image_processor.image_std
    return AnyRes(
        tile=int(config.vision_config.image_size),
        pinpoints=tuple((int(h), int(w)) for h, w in image_processor.image_grid_pinpoints),
        resample=int(image_processor.resample),
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        rescale=float(image_processor.rescale_factor),
    )
