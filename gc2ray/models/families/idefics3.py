"""Idefics3 and SmolVLM: views of SigLIP, whose patches are merged in square blocks.

An image is scaled to a longer side that is set, then stretched to whole views. That is cut into
crops, and squeezed into the thumbnail, which comes last; what fits one view is that view alone.
Markers name a crop's row and column; line breaks end rows. A block has its patches' mean score.

Not covered: videos, `do_image_splitting` off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gc2ray.compression.geometry import Geometry, Spans, ViewGrid, crop_views, literal
from gc2ray.core.config.compression import Score
from gc2ray.models.base import Family, VisionSide
from gc2ray.models.image_processor import Cut, Resize, ViewPixels, view_pixels
from gc2ray.models.layers.tower import hidden_states, in_blocks
from gc2ray.models.processor import Processor
from gc2ray.models.shape import Tower

LARGEST = 4096  # no side of a scaled image is longer: transformers' MAX_IMAGE_SIZE
Size = tuple[int, int]


@dataclass(frozen=True)
class ScaledCanvas(ViewPixels):
    """Idefics3's cropping: two resizes in a row, the first to `longest` pixels along one side."""

    longest: int

    def cut(self, size: Size, *, alone: bool = True) -> Cut:  # noqa: ARG002
        """See `Cropping.cut`."""
        grid, steps = self.grid(size), tuple(Resize(*after) for after in self.resizes(size))
        return Cut(steps, grid, thumbnail=math.prod(grid), thumbnail_step=len(steps))

    def resizes(self, size: Size) -> tuple[Size, Size]:
        """Sizes behind each resize; the second starts from the rounded size of the first."""
        first = _scaled(size, self.longest, multiple=2)
        first = first if max(first) <= LARGEST else _scaled(first, LARGEST)
        longest = math.ceil(max(first) / self.tile) * self.tile
        return first, _scaled(first, longest, multiple=self.tile)

    def grid(self, size: Size) -> tuple[int, int]:
        """Crop rows and columns; (0, 0) where the image is one view, uncut."""
        height, width = self.resizes(size)[1]
        grid = height // self.tile, width // self.tile
        return grid if grid != (1, 1) else (0, 0)


def _scaled(size: Size, longest: int, multiple: int = 1) -> Size:
    """The size with that longer side; the other is cut to a number, then raised to a multiple."""
    ratio = size[1] / size[0]  # and not its inverse: transformers divides or multiplies by it
    shorter = int(longest / ratio) if ratio >= 1 else int(longest * ratio)
    shorter = max(1, math.ceil(shorter / multiple) * multiple)
    return (shorter, longest) if ratio >= 1 else (longest, shorter)


@lru_cache(maxsize=1024)
def _geometry(grid: Size, side: int, names: tuple[str, str], processor: Processor) -> Geometry:
    """Crops and thumbnail; their markers are tokenised in one piece, as line breaks join."""
    (rows, columns), (fake, whole) = grid, names
    last, image, tokenizer = rows * columns, processor.image_token, processor.tokenizer
    lines = [
        "".join(f"{fake}<row_{row}_col_{column}>{image}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    ]
    text = "".join(lines) + "\n" * bool(lines) + f"{fake}{whole}{image}{fake}"
    entries, spans, view, owners = list[int](), Spans(), 0, (0, last)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token == processor.image_token_id:
            entries += range(view * side**2, (view + 1) * side**2)
            # Of a line break behind it: the crops of its row, and the thumbnail if that is next.
            owners, view = (view - view % max(1, columns), view + (view + 1 == last)), view + 1
            continue
        if token == tokenizer.convert_tokens_to_ids(fake):
            owners = (view, view) if view <= last else (0, last)
        spans[len(entries)] = owners
        entries.append(literal(token))
    views = [*crop_views(grid, (side, side)), ViewGrid.whole(side, side)]
    return Geometry.from_entries(views, last, entries, spans)


class Idefics3(Family):
    """Cropping and geometry; see `gc2ray.models.base.Family`."""

    cropping: ScaledCanvas

    def __init__(self, config: Any, processor: Processor) -> None:
        vision, images = config.vision_config, processor.image_processor
        pixels = vars(view_pixels(images, vision.image_size))
        self.cropping = ScaledCanvas(**pixels, longest=images.size["longest_edge"])
        self.processor, self.image_token_id = processor, processor.image_token_id
        fake = getattr(processor.tokenizer, "fake_image_token", "<fake_token_around_image>")
        self._names = (fake, getattr(processor.tokenizer, "global_image_token", "<global-img>"))
        most = range(1, self.cropping.grid((LARGEST, LARGEST))[0] + 1)
        places = [f"<row_{row}_col_{column}>" for row in most for column in most]
        added = [n for n in processor.tokenizer.get_added_vocab() if n.startswith("<row_")]
        self.markers = tuple(dict.fromkeys((*self._names, *places, *added)))
        self.merge, layers = config.scale_factor, vision.num_hidden_layers
        self.side = vision.image_size // vision.patch_size // self.merge
        width, text, block = vision.hidden_size, config.text_config.hidden_size, self.merge**2
        self.tower = Tower(
            layers,
            layers,
            width,
            vision.intermediate_size,
            patches=self.side**2 * block,
            pixels=vision.num_channels * vision.patch_size**2,
            text_width=text,
            class_token=False,
            merge=block,
            layers_behind=((block * width, text),),
        )

    def geometry(self, size: Size, *, alone: bool = True) -> Geometry:  # noqa: ARG002
        """See `Family.geometry`."""
        return _geometry(self.cropping.grid(size), self.side, self._names, self.processor)


class Idefics3Vision(VisionSide):
    """Tower and connector of an Idefics3 or SmolVLM; see `VisionSide`."""

    def __init__(self, model: Any, family: Idefics3, score: Score) -> None:
        self._tower, self._connector = model.model.vision_model, model.model.connector
        self._side, self._merge = family.side, family.merge
        projection = self._connector.modality_projection
        super().__init__(self._tower.encoder.layers, projection, family, score)

    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `VisionSide`; features (V, tokens, D of a block's patches) are not projected yet."""
        side, merge, count = self._side, self._merge, len(self.layers)
        everywhere = pixels.new_ones(len(pixels), side * merge, side * merge, dtype=torch.bool)
        state = self._tower.embeddings(pixels, patch_attention_mask=everywhere)
        states = hidden_states(self.layers, state, {count - 1, count}, attention_mask=None)
        features = self._tower.post_layernorm(states[count])
        scores = in_blocks(self.scores(states[count - 1], features)[..., None], side, merge)
        return self._connector.pixel_shuffle(features, merge), scores.mean((2, 3))
