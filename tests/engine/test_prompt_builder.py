"""From a request to its prompt: its image, its visual tokens and their positions."""

from __future__ import annotations

from PIL import Image

from gc2ray.core.config.input import ImageLimits
from gc2ray.core.records import ImageRef
from gc2ray.engine.prompt_builder import load_tiles
from tests.support.images import POLICY, anyres, refusal_message
from tests.support.rows import encoded


def test_undecodable_file_is_named(tmp_path):
    (tmp_path / "page.png").write_bytes(b"<html>")
    policy = ImageLimits(roots=(str(tmp_path),))
    message = refusal_message(load_tiles, ImageRef(path="page.png"), anyres(), policy)
    assert "not an image" in message
    assert message.endswith(": page.png")


def test_rotated_jpeg_swaps_sides():
    exif = Image.Exif()
    exif[0x0112] = 6
    ref = ImageRef(data=encoded(Image.new("RGB", (800, 400)), "JPEG", exif=exif))
    tiles = load_tiles(ref, anyres(), POLICY)
    assert tiles.size == (800, 400)
    assert tiles.grid == (2, 1)
