"""Scenes as pictures: background, sign and things, all from the scene's seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from gc2ray.demo.lettering import draw_text
from gc2ray.demo.scenes import COLOURS, LETTER, PLATE, SHAPES, Box, Scene, Sign, Thing


def draw(scene: Scene, photographs: Sequence[Image.Image]) -> Image.Image:
    """The scene as an RGB image.

    Args:
        scene: What to draw.
        photographs: Backgrounds are cut from them; without any, all are textures.
    """
    rng = np.random.default_rng(scene.seed)
    image = _background(rng, scene.size, photographs)
    pen = ImageDraw.Draw(image)
    if scene.sign is not None:
        _draw_sign(pen, scene.sign)
    for thing in scene.things:
        _draw_thing(pen, thing, _jittered(rng, COLOURS[thing.colour]))
    return image


def _background(
    rng: np.random.Generator, size: tuple[int, int], photographs: Sequence[Image.Image]
) -> Image.Image:
    """A part of a photograph, or a texture, with its contrast lowered by chance."""
    height, width = size
    if photographs and rng.random() < 0.8:
        photo = photographs[int(rng.integers(len(photographs)))]
        scale = rng.uniform(0.35, 1.0) * min(photo.width / width, photo.height / height)
        left = rng.uniform(0, photo.width - width * scale)
        top = rng.uniform(0, photo.height - height * scale)
        box = (left, top, left + width * scale, top + height * scale)
        image = photo.resize((width, height), Image.Resampling.BILINEAR, box=box)
    else:
        coarse = int(rng.integers(2, 12))
        noise = rng.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    flat = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(40, 216, 3)))
    return Image.blend(image, flat, rng.uniform(0.0, 0.5))


def _jittered(rng: np.random.Generator, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(colour) + rng.integers(-20, 21, 3), 0, 255).tolist()
    return red, green, blue


def _draw_sign(pen: ImageDraw.ImageDraw, sign: Sign) -> None:
    left, top, right, bottom = sign.box
    height = (bottom - top) / PLATE[1]
    pen.rectangle(sign.box, fill=(250, 250, 245), outline=(0, 0, 0), width=max(1, int(height / 16)))
    draw_text(pen, sign.text, ((left + right) / 2, (top + bottom) / 2), height, (10, 10, 10), 0.04)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = thing.box
    rim = (bottom - top) * 0.1
    inner = (left + rim, top + rim, right - rim, bottom - rim)
    if thing.kind == "circle":
        pen.ellipse(thing.box, fill=(0, 0, 0))
        pen.ellipse(inner, fill=colour)
    elif thing.kind in SHAPES:
        pen.polygon(_corners(thing.kind, thing.box), fill=(0, 0, 0))
        pen.polygon(_corners(thing.kind, inner), fill=colour)
    else:
        height = (bottom - top) * LETTER
        draw_text(pen, thing.kind, thing.centre, height, (0, 0, 0), 0.125)
        draw_text(pen, thing.kind, thing.centre, height, colour, 0.035)


def _corners(kind: str, box: Box) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    if kind == "square":
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if kind == "triangle":
        return [((left + right) / 2, top), (right, bottom), (left, bottom)]
    centre, reach = ((left + right) / 2, (top + bottom) / 2), (bottom - top) / 2
    points = []
    for corner in range(10):
        angle, length = (
            math.pi * corner / 5 - math.pi / 2,
            reach * (1.1 if corner % 2 == 0 else 0.5),
        )
        points.append((centre[0] + length * math.cos(angle), centre[1] + length * math.sin(angle)))
    return points
