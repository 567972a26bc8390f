"""`downsample`: the image made smaller before its views are cut, so that it has fewer tokens.

The honest baseline of arXiv 2510.07143: nothing is chosen, the model reads a smaller image, stock.
What that means depends on how a model cuts images:

* LLaVA-NeXT scales any image up to a canvas that suits its size, so a smaller image means fewer
  crops. The image is scaled with its proportions by the processor's own filter.
* SmolVLM scales any image to the same longer side: a smaller one would cost the same tokens and be
  blurred. The processor's setting for that side is lowered instead, by whole views.

Neither has fewer than one view's tokens, so low retentions are not reached. Then the fewest tokens
are read that any size has, and how many they are is reported. Nor does the thumbnail stay sharp.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache

from PIL import Image

from gc2ray.core.config.input import ImageLimits
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.data.image_decoding import decode
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.base import Family
from gc2ray.models.families.idefics3 import ScaledCanvas

NAME = "downsample"
Size = tuple[int, int]


@dataclass(frozen=True)
class Smaller:
    """An image with fewer tokens.

    Attributes:
        size: Height and width that it is scaled to.
        longest: The longer side that the processor scales it to; None where it has no such setting.
        tokens: Its visual tokens.
    """

    size: Size
    longest: int | None
    tokens: int


def smaller(family: Family, size: Size, retention: float) -> Smaller:
    """The largest with at most that share of an image's visual tokens; else one of the fewest.

    Args:
        family: The model's.
        size: The image's height and width.
        retention: The share.
    """
    choices = _choices(family, size)
    budget = max(retention * choices[0].tokens, min(choice.tokens for choice in choices))
    return next(choice for choice in choices if choice.tokens <= budget)


@cache
def _choices(family: Family, size: Size) -> tuple[Smaller, ...]:
    """All sizes of an image, its own first; of equal tokens the largest."""
    found: dict[int, Smaller] = {}
    for choice in _by_longest(family, size) or _by_size(family, size):
        found.setdefault(choice.tokens, choice)
    return tuple(found.values())


def _by_longest(family: Family, size: Size) -> list[Smaller]:
    if not isinstance(family.cropping, ScaledCanvas):
        return []
    first, step = family.cropping.longest, family.cropping.tile
    settings = range(first, 0, -step)
    return [
        Smaller(size, longest, _scaled_to(family, longest).geometry(size).visual_tokens)
        for longest in settings
    ]


def _by_size(family: Family, size: Size) -> Iterator[Smaller]:
    # An image smaller than a view has fewer tokens only where rounding changes its proportions.
    for longest in range(max(size), min(max(size), family.cropping.tile) - 1, -1):
        ratio = longest / max(size)
        scaled = (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio)))
        yield Smaller(scaled, None, family.geometry(scaled).visual_tokens)


def _scaled_to(family: Family, longest: int) -> Family:
    """The family with another longer side."""
    lowered = copy(family)
    lowered.cropping = replace(family.cropping, longest=longest)  # type: ignore[type-var]
    return lowered


def answers(
    loaded: LoadedModel,
    requests: Sequence[Request],
    retention: float,
    answer: Callable[[LoadedModel, Sequence[Request]], list[Answer]],
) -> list[Answer]:
    """Answers about smaller images, in the order of the requests.

    Args:
        loaded: The model.
        requests: Each with one image, as bytes.
        retention: The share of visual tokens that an image may have.
        answer: Answers with a model.
    """
    family = loaded.adapter.family
    by_setting: dict[int | None, list[tuple[int, Request]]] = {}
    for place, request in enumerate(requests):
        image = decode(request.images[0].data or b"", ImageLimits())
        found = smaller(family, (image.height, image.width), retention)
        sent = replace(request, images=(ImageRef(_resized(image, found.size, family)),))
        by_setting.setdefault(found.longest, []).append((place, sent))
    answered: dict[int, Answer] = {}
    for longest, placed in by_setting.items():
        model = loaded if longest is None else _with_longest(loaded, longest)
        got = answer(model, [request for _, request in placed])
        answered |= {place: a for (place, _), a in zip(placed, got, strict=True)}
    return [answered[place] for place in range(len(requests))]


def _with_longest(loaded: LoadedModel, longest: int) -> LoadedModel:
    adapter = copy(loaded.adapter)
    adapter.family = _scaled_to(adapter.family, longest)
    return replace(loaded, adapter=adapter)


def _resized(image: Image.Image, size: Size, family: Family) -> bytes:
    """The scaled image as a file that loses nothing."""
    buffer = io.BytesIO()
    if (image.height, image.width) != size:
        resample = Image.Resampling(family.cropping.resample)
        image = image.resize((size[1], size[0]), resample)
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
