"""Image bytes, what is said of bad ones, and transformers' own image processor."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from PIL import Image

from gc2ray.core.config.input import ImageLimits
from gc2ray.core.errors import BadRow, Status
from gc2ray.models.image_processor import AnyRes
from tests.support.rows import encoded

POLICY = ImageLimits()
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def gradient(height=24, width=40):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6, y * 10, x * y], axis=-1).astype(np.uint8))


PNG = encoded(gradient(), "PNG")


def refusal_message(call, *args):
    """The message of a refusal, whose form is checked."""
    with pytest.raises(BadRow) as caught:
        call(*args)
    assert caught.value.status is Status.BAD_IMAGE
    message = caught.value.message
    assert 0 < len(message) <= 200
    assert message.isprintable()
    return message


@functools.cache
def processor(side=336, pinpoints=PINPOINTS):
    """transformers' own, for tiles of this side."""
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    return LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(pinpoint) for pinpoint in pinpoints],
    )


def anyres(side=336, pinpoints=PINPOINTS):
    """Ours, with the settings of `processor`."""
    source = processor(side, pinpoints)
    return AnyRes(
        tile=side,
        pinpoints=pinpoints,
        resample=int(source.resample),
        mean=tuple(source.image_mean),
        std=tuple(source.image_std),
        rescale=source.rescale_factor,
    )
