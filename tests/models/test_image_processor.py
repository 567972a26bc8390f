"""Tiles of an image equal those of transformers' image processor."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photographs
from transformers.image_processing_utils import select_best_resolution

from gc2ray.core.records import ImageRef
from gc2ray.data.image_decoding import MAX_SIDE, decode
from gc2ray.engine.prompt_builder import load_tiles
from gc2ray.models.adapter import pixel_table
from gc2ray.models.families.llava_onevision import SquareOrAnyRes
from gc2ray.models.image_processor import (
    AnyRes,
    Pad,
    Resize,
    Tiles,
    _padded_and_scaled,
    tile,
)
from tests.support.images import PINPOINTS, POLICY, anyres, gradient, processor
from tests.support.rows import encoded

SMALL_PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84), (84, 56))


def normalised(tiles: Tiles, geometry: AnyRes):
    table, places = pixel_table(geometry), torch.from_numpy(tiles.pixels).long()
    return torch.stack([table[channel][places[..., channel]] for channel in range(3)], dim=1)


def assert_equal_to_transformers(tiles, image, side=336, pinpoints=PINPOINTS):
    expected = processor(side, pinpoints)(image, return_tensors="pt")
    assert tiles.pixels.dtype == np.uint8
    assert tiles.size == tuple(expected["image_sizes"][0].tolist())
    assert torch.equal(
        normalised(tiles, anyres(side, pinpoints)), expected["pixel_values"][0].float()
    )


SIZES = [(1, 1), (1, 3000), (3000, 1), (2000, 10), (10, 2000), (2, 3), (336, 336), (337, 335)]
SIZES += [(336, 672), (672, 672), (671, 673), (768, 1024), (1080, 607), (999, 333), (90, 2000)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_tiles_equal_transformers(size):
    noise = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert_equal_to_transformers(tile(image, anyres()), image)


def test_tiles_of_a_photograph_equal_transformers():
    data = encoded(Image.fromarray(photographs.astronaut()), "JPEG", quality=90)
    tiles = load_tiles(ImageRef(data=data), anyres(), POLICY)
    assert tiles.pixels.shape == (5, 336, 336, 3)
    assert_equal_to_transformers(tiles, Image.open(io.BytesIO(data)))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 9))
def test_small_tiles_equal_transformers(height, width, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    tiles = tile(image, anyres(28, SMALL_PINPOINTS))
    assert_equal_to_transformers(tiles, image, 28, SMALL_PINPOINTS)


def odd_images():
    image = gradient(120, 200)
    alpha = Image.linear_gradient("L").resize(image.size)
    rgba = image.copy()
    rgba.putalpha(alpha)
    palette = image.convert("P")
    return {
        "RGBA": encoded(rgba, "PNG"),
        "LA": encoded(rgba.convert("LA"), "PNG"),
        "P with transparency": encoded(palette, "PNG", transparency=palette.getpixel((5, 5))),
        "RGB with transparency": encoded(image, "PNG", transparency=image.getpixel((5, 5))),
        "GIF with transparency": encoded(palette, "GIF", transparency=palette.getpixel((5, 5))),
        "WEBP with alpha": encoded(rgba, "WEBP"),
        "1": encoded(image.convert("1"), "PNG"),
        "L": encoded(image.convert("L"), "JPEG"),
        "CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "YCbCr": encoded(image, "TIFF", compression="jpeg"),
        "LAB": encoded(image.convert("LAB"), "TIFF"),
        "I up to 255": encoded(image.convert("L").convert("I"), "TIFF"),
    }


@pytest.mark.parametrize("name", odd_images())
def test_odd_modes_equal_transformers(name):
    data = odd_images()[name]
    tiles = tile(decode(data, POLICY), anyres(28, SMALL_PINPOINTS))
    assert_equal_to_transformers(tiles, Image.open(io.BytesIO(data)), 28, SMALL_PINPOINTS)


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 8000), st.integers(1, 8000))
def test_canvas_size_equals_transformers(height, width):
    expected = select_best_resolution((height, width), [list(item) for item in PINPOINTS])
    assert anyres().canvas_size((height, width)) == tuple(expected)


def test_tile_takes_rgb_only():
    with pytest.raises(ValueError, match="RGB"):
        tile(Image.new("L", (4, 4)), anyres())


def test_padding_is_black_and_centred():
    tiles = tile(Image.new("RGB", (672, 100), "white"), anyres())
    assert anyres().cut((100, 672)).grid == (1, 2)
    lit = tiles.pixels[1:, :, 0, 0].astype(bool)
    assert (lit == ((np.arange(336) >= 118) & (np.arange(336) < 218))).all()


def square(image: Image.Image, resample: int = Image.Resampling.BICUBIC, side: int = 28):
    """The one view that OneVision makes of an image among several."""
    settings_ = vars(anyres(side, SMALL_PINPOINTS)) | {"resample": resample, "mean": (0.5, 0.4, 0)}
    return tile(image, SquareOrAnyRes(**settings_), alone=False).pixels[0]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), st.booleans(), st.sampled_from(range(6)))
def test_a_square_has_the_bytes_that_pillow_gives_it_whole(long, short, upright, resample):
    size = (long, short) if upright else (short, long)
    noise = np.random.default_rng(long + short).integers(0, 256, (*size, 3), dtype=np.uint8)
    image, longest = Image.fromarray(noise), max(size)
    canvas = Image.new("RGB", (longest, longest), (127, 102, 0))
    canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    expected = canvas.resize((28, 28), Image.Resampling(resample))
    assert np.array_equal(square(image, resample), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, MAX_SIDE), (MAX_SIDE, 1)], ids=["a row", "a column"])
def test_the_square_of_a_line_is_computed_where_it_shows(size):
    """As a whole it would have 10**12 pixels."""
    shown = square(Image.fromarray(np.full((*size, 3), 255, dtype=np.uint8)), side=384)
    shown = shown if size[0] == 1 else shown.transpose(1, 0, 2)
    assert (shown == shown[:, :1]).all()  # the same all along the line
    assert (shown[:190] == (127, 102, 0)).all()
    assert (shown[194:] == (127, 102, 0)).all()


def test_padding_has_the_colour_that_its_weights_make_of_it():
    """They do not add up to one exactly, where a pixel is made of many."""
    length, side, fill = 1_000_003, 28, (122, 116, 255)
    pad, size = Pad(length, length, fill), Resize(side, side)
    image = Image.fromarray(np.zeros((1, length, 3), dtype=np.uint8))
    found = np.asarray(_padded_and_scaled(image, pad, size, Image.Resampling.BOX))
    line = Image.new("RGB", (length, 1), fill).resize((side, 1), Image.Resampling.BOX)
    column = line.getpixel((0, 0))
    above = Image.new("RGB", (1, length), column).resize((1, side), Image.Resampling.BOX)
    assert tuple(found[0, 0]) == above.getpixel((0, 0)) != fill


@pytest.mark.parametrize(("padded", "scaled"), [((51, 51), (33, 14)), ((299, 682), (38, 38))])
def test_other_than_squares_are_padded_whole(padded, scaled):
    """Pillow may scale them along columns first."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 3, 3), dtype=np.uint8)
    image, pad, size = Image.fromarray(noise), Pad(*padded, (127, 102, 0)), Resize(*scaled)
    canvas = Image.new("RGB", padded[::-1], pad.fill)
    canvas.paste(image, ((padded[1] - 3) // 2, (padded[0] - 40) // 2))
    wanted = canvas.resize(scaled[::-1], Image.Resampling.BICUBIC)
    found = _padded_and_scaled(image, pad, size, Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(found), np.asarray(wanted))
