"""High-resolution scenes with a few small things on a photograph: what the demo model can see.

A scene is drawn from a random generator, so a seed names it for ever. One to four coloured digits,
letters or shapes, and at times a white sign with two digits, lie on a crop of a photograph or a
texture. Their height is a few pixels of the canvas that the model cuts into crops, and about half
that in the thumbnail. In half of the scenes all of them lie in one crop, so that crops are of
unequal richness; most of the image never says anything.

Things do not overlap, lie across no cut between two crops, and keep clear of the image's middle
lines, so that "left" and "right" are never in doubt. Within a scene no kind and no colour occurs
twice, unless `Style.distinct` is off.

`gc2ray.demo.drawing` draws what is sampled here.

Not covered: handwriting, perspective, occlusion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gc2ray.demo.lettering import text_width
from gc2ray.models.image_processor import AnyRes, fitted_size

DIGITS = tuple("0123456789")
LETTERS = tuple("ACEHKRTX")
SHAPES = ("circle", "square", "triangle", "star")
KINDS = (*DIGITS, *LETTERS, *SHAPES)
COLOURS = {
    "red": (225, 30, 30),
    "green": (30, 170, 40),
    "blue": (40, 70, 235),
    "yellow": (245, 220, 30),
    "purple": (160, 40, 190),
    "white": (245, 245, 245),
}
HEIGHT = (9.5, 12.0)
"""Height of a thing, in pixels of the canvas."""
SIGN_HEIGHT = (9.0, 10.5)
"""Height of a sign's digits, in pixels of the canvas."""
MIDDLE = 0.06
"""Share of the image's width and height, on both sides of the middle lines, that centres avoid."""
PLATE = (0.5, 1.35)
"""A sign's width beyond its digits', and its height, in heights of a digit."""
GAP = 1.5
"""Least distance between two things, in pixels of the canvas."""
ZOOM = (2.0, 3.0)
"""Pixels of the image per pixel of its canvas."""
ASPECT = 3.6
"""Widest, and tallest, aspect ratio."""
LETTER = 0.75
"""Height of a letter without its black rim, as a share of its box."""
TRIES = 200

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the image."""


@dataclass(frozen=True)
class Thing:
    """A coloured digit, letter or shape.

    Attributes:
        kind: One of `KINDS`.
        colour: A key of `COLOURS`.
        box: Where it lies.
    """

    kind: str
    colour: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """Its x and y, in pixels of the image."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Sign:
    """A white plate with two black digits."""

    text: str
    box: Box


@dataclass(frozen=True)
class Style:
    """How full scenes are.

    Attributes:
        things: Chances of one, two, … things.
        sign: Chance of a sign.
        rich: Chance that all lie in one crop.
        distinct: Whether kinds and colours occur once at most.
    """

    things: tuple[float, ...] = (0.3, 0.3, 0.25, 0.15)
    sign: float = 0.3
    rich: float = 0.5
    distinct: bool = True


@dataclass(frozen=True)
class Scene:
    """What is where in an image of `size` (height, width); `seed` decides all that is not named."""

    size: tuple[int, int]
    grid: tuple[int, int]
    things: tuple[Thing, ...]
    sign: Sign | None
    seed: int


def sample_scene(
    rng: np.random.Generator, anyres: AnyRes, grid: tuple[int, int], style: Style
) -> Scene:
    """A scene whose image is cut into `grid` (rows, columns).

    Raises:
        ValueError: No size within `ASPECT` is cut so.
    """
    size, zoom = _size(rng, anyres, grid)
    room = _Room(rng, size, zoom, _cuts(size, anyres))
    if rng.random() < style.rich:
        room.stay_in_one_crop()
    sign = None
    if rng.random() < style.sign:
        text = f"{rng.integers(10, 100)}"
        height = rng.uniform(*SIGN_HEIGHT) * zoom
        width = text_width(text, height)
        box = room.place(width + height * PLATE[0], height * PLATE[1])
        sign = Sign(text, box) if box else None
    count = 1 + int(rng.choice(len(style.things), p=np.array(style.things) / sum(style.things)))
    kinds = rng.choice(len(KINDS), count, replace=not style.distinct)
    colours = rng.choice(len(COLOURS), count, replace=not style.distinct)
    things = []
    for kind, colour in zip(kinds, colours, strict=True):
        name = KINDS[int(kind)]
        height = rng.uniform(*HEIGHT) * zoom
        box = room.place(_width(name, height), height)
        if box:
            things.append(Thing(name, list(COLOURS)[int(colour)], box))
    if not things:  # no room beside the sign: start afresh
        return sample_scene(rng, anyres, grid, style)
    return Scene(size, grid, tuple(things), sign, int(rng.integers(2**31)))


def digit_boxes(sign: Sign) -> tuple[Box, Box]:
    """Where the two digits of a sign lie: the halves of its plate."""
    left, top, right, bottom = sign.box
    middle = (left + right) / 2
    return (left, top, middle, bottom), (middle, top, right, bottom)


class _Room:
    """Finds places for boxes: apart from each other, across no cut, clear of the middle lines."""

    def __init__(
        self,
        rng: np.random.Generator,
        size: tuple[int, int],
        zoom: float,
        cuts: tuple[list[float], list[float]],
    ) -> None:
        self._rng, self._size, self._gap = rng, size, GAP * zoom
        self._cuts = cuts
        self._area: Box = (0.0, 0.0, float(size[1]), float(size[0]))
        self._taken: list[Box] = []

    def stay_in_one_crop(self) -> None:
        """From now on, place in one crop's part of the image, drawn by chance."""
        spans = []
        for axis, extent in ((0, self._size[1]), (1, self._size[0])):
            edges = [0.0, *self._cuts[axis], float(extent)]
            part = int(self._rng.integers(len(edges) - 1))
            spans.append((edges[part], edges[part + 1]))
        self._area = (spans[0][0], spans[1][0], spans[0][1], spans[1][1])

    def place(self, width: float, height: float) -> Box | None:
        """A free box of this size, or None where none was found."""
        left, top, right, bottom = self._area
        margin = self._gap
        for _ in range(TRIES):
            x = self._rng.uniform(left + margin, max(left + margin, right - margin - width))
            y = self._rng.uniform(top + margin, max(top + margin, bottom - margin - height))
            box = (x, y, x + width, y + height)
            if self._is_free(box):
                self._taken.append(box)
                return box
        return None

    def _is_free(self, box: Box) -> bool:
        height, width = self._size
        if box[2] > width or box[3] > height:
            return False
        for low, high, extent, cuts in (
            (box[0], box[2], width, self._cuts[0]),
            (box[1], box[3], height, self._cuts[1]),
        ):
            if abs((low + high) / 2 / extent - 0.5) < MIDDLE:
                return False
            if any(low < cut < high for cut in cuts):
                return False
        gap = self._gap
        return not any(
            box[0] < other[2] + gap
            and other[0] < box[2] + gap
            and box[1] < other[3] + gap
            and other[1] < box[3] + gap
            for other in self._taken
        )


def _size(
    rng: np.random.Generator, anyres: AnyRes, grid: tuple[int, int]
) -> tuple[tuple[int, int], float]:
    """Height and width of an image that is cut into `grid`, and its zoom over the canvas."""
    canvas_height, canvas_width = grid[0] * anyres.tile, grid[1] * anyres.tile
    for _ in range(TRIES):
        aspect = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
        if rng.random() < 0.5:  # wide images larger than their canvas get 1 x 2 crops only at 2:1
            aspect = 2.0 if aspect > 1 else 0.5
        zoom = rng.uniform(*ZOOM)
        height = round(min(canvas_height, canvas_width / aspect) * zoom)
        size = height, round(height * aspect)
        if anyres.grid(size) == grid:
            return size, zoom
    raise ValueError(f"no image up to 1:{ASPECT} is cut into {grid}")


def _cuts(size: tuple[int, int], anyres: AnyRes) -> tuple[list[float], list[float]]:
    """Where cuts between crops run through the image: x of the vertical, y of the horizontal."""
    canvas = anyres.canvas_size(size)
    fitted = fitted_size(size, canvas)
    lines = []
    for axis in (1, 0):
        offset, scale = (canvas[axis] - fitted[axis]) // 2, size[axis] / fitted[axis]
        edges = range(anyres.tile, canvas[axis], anyres.tile)
        lines.append([(edge - offset) * scale for edge in edges])
    return lines[0], lines[1]


def _width(kind: str, height: float) -> float:
    """Width of a thing with this height, rim included."""
    if kind in SHAPES:
        return height
    return text_width(kind, height * LETTER) + height * (1 - LETTER)
