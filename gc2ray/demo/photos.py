"""Real photographs that ship inside pip packages: scikit-image's and scikit-learn's samples.

Licences are those of the packages; see `skimage/data/README.txt` and
`sklearn/datasets/images/README.txt`. Nothing is downloaded.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from PIL import Image

_SKIMAGE = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png",
    "page.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
_SKLEARN = ("china.jpg", "flower.jpg")


@dataclass(frozen=True)
class Photo:
    """A photograph as it lies on disk."""

    name: str
    data: bytes


def jpeg(image: Image.Image, quality: int) -> bytes:
    """An RGB image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def sample_photos() -> list[Photo]:
    """All of them, in order of name.

    Raises:
        ImportError: The packages are not installed; the extra `gc2ray[demo]` brings them.
    """
    folders = (("skimage", "data", _SKIMAGE), ("sklearn", "datasets/images", _SKLEARN))
    photos = []
    for package, folder, names in folders:
        try:
            root = Path(str(files(package))) / folder
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{package} is not installed; install it with: pip install 'gc2ray[demo]'"
            ) from error
        photos += [Photo(name, (root / name).read_bytes()) for name in names]
    return sorted(photos, key=lambda photo: photo.name)


def opened_photos() -> list[Image.Image]:
    """All of them decoded, RGB; backgrounds for the demo model's scenes."""
    return [Image.open(io.BytesIO(photo.data)).convert("RGB") for photo in sample_photos()]
