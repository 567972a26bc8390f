"""Letters of a height in pixels: how wide they are, and how they are drawn.

The font is Pillow's own, so that a scene looks the same everywhere.
"""

from __future__ import annotations

from functools import lru_cache

from PIL import ImageDraw, ImageFont


def text_width(text: str, height: float) -> float:
    """Width of text whose capitals are `height` pixels high."""
    left, _, right, _ = _font(200).getbbox(text, anchor="ls")
    return float(right - left) / 200 / _cap_height() * height


def draw_text(
    pen: ImageDraw.ImageDraw,
    text: str,
    centre: tuple[float, float],
    height: float,
    colour: tuple[int, int, int],
    stroke: float,
) -> None:
    """Draw text whose capitals are `height` pixels high, its middle at `centre`.

    Args:
        pen: What draws the letters.
        text: What.
        centre: Where, x and y.
        height: Height of a capital.
        colour: RGB.
        stroke: Thickness of a line around the letters, as a share of the font's size.
    """
    size = height / _cap_height()
    font = _font(round(size))
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    at = (centre[0] - (left + right) / 2, centre[1] - (top + bottom) / 2)
    width = max(1, round(size * stroke))
    pen.text(at, text, fill=colour, font=font, anchor="ls", stroke_width=width, stroke_fill=colour)


@lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font.

    Raises:
        RuntimeError: Pillow was built without FreeType.
    """
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow has no FreeType; install one from PyPI")
    return font


@lru_cache(maxsize=1)
def _cap_height() -> float:
    """Height of a capital letter of the font, as a share of its size."""
    _, top, _, bottom = _font(200).getbbox("H", anchor="ls")
    return float(bottom - top) / 200
