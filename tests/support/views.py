"""Encoded images of random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gc2ray.compression.canvas import NEWLINE, Canvas
from gc2ray.compression.views import Views


def random_views(
    size: tuple[int, int], grid: tuple[int, int] = (2, 2), side: int = 6, seed: int = 0
) -> Views:
    """An image of `size`, cut into a thumbnail and `grid` crops of `side` x `side` tokens."""
    draw = torch.Generator().manual_seed(seed)
    views = 1 + grid[0] * grid[1]
    return Views(
        features=torch.randn(views, side * side, 4, generator=draw),
        scores=torch.randn(views, side * side, generator=draw),
        canvas=Canvas.from_image_size(size, grid, (side, side)),
        size=size,
        seed=seed,
    )


def kept_sets(views: Views, packed: Sequence[int]) -> list[set[int]]:
    """Per view the tokens that stand in a packed sequence."""
    n = views.tokens_per_view
    kept: list[set[int]] = [set() for _ in views.valid_per_view]
    for source in packed:
        if source != NEWLINE:
            kept[source // n].add(source % n)
    return kept
