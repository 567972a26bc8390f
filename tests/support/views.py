"""Encoded images of random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import canvas_geometry
from gc2ray.compression.views import Views


def random_views(
    size: tuple[int, int], grid: tuple[int, int] = (2, 2), side: int = 6, seed: int = 0
) -> Views:
    """An image of `size`, cut into a thumbnail and `grid` crops of `side` x `side` tokens."""
    draw = torch.Generator().manual_seed(seed)
    tokens = (1 + grid[0] * grid[1]) * side * side
    return Views(
        features=torch.randn(tokens, 4, generator=draw),
        scores=torch.randn(tokens, generator=draw),
        geometry=canvas_geometry(Canvas.from_image_size(size, grid, (side, side))),
        size=size,
        seed=seed,
    )


def kept_sets(views: Views, packed: Sequence[int]) -> list[set[int]]:
    """Per view the tokens that stand in a packed sequence."""
    starts = views.geometry.starts
    kept: list[set[int]] = [set() for _ in starts]
    for entry in packed:
        if entry >= 0:
            view = max(i for i, start in enumerate(starts) if start <= entry)
            kept[view].add(entry - starts[view])
    return kept


def canvas_of(views: Views) -> Canvas:
    """The canvas of random views."""
    assert views.geometry.canvas is not None
    return views.geometry.canvas
