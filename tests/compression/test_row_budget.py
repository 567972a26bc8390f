"""One budget for the images of a row: how it is divided."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gc2ray.compression.geometry import NEWLINE, Geometry, ViewGrid
from gc2ray.compression.policy import CompressionPolicy
from gc2ray.compression.row_budget import row_shares, scaled_shares, share_bounds
from gc2ray.compression.views import Views
from gc2ray.core.config.compression import METHODS, CompressionConfig
from tests.support.views import random_views

SIZES = [(700, 700), (400, 1000), (300, 300)]


def row_of(*seeds: int) -> list[Views]:
    """Images of one look, but for those of odd seeds."""
    images = []
    for index, seed in enumerate(seeds):
        image = random_views(SIZES[index % 3], seed=seed)
        look = torch.zeros(image.features.shape[1])
        look[seed % 2] = 9
        images.append(replace(image, features=image.features + look))
    return images


def kept_of(images: list[Views], shares: list[float]) -> float:
    counts = [sum(image.valid_per_view) for image in images]
    return sum(share * count for share, count in zip(shares, counts, strict=True))


def test_an_image_unlike_the_others_gets_more_and_the_sum_stays() -> None:
    images = row_of(0, 2, 1, 4)
    shares = row_shares(images, 0.2)
    assert shares.index(max(shares)) == 2
    assert shares[2] > 1.5 * max(shares[0], shares[1], shares[3])
    assert kept_of(images, shares) == pytest.approx(kept_of(images, [0.2] * 4))


def test_images_alike_share_alike() -> None:
    one = random_views((700, 700))
    assert row_shares([one, one, one], 0.3) == pytest.approx([0.3] * 3)


def test_the_order_of_images_does_not_matter() -> None:
    images = row_of(0, 1, 2)
    shares = row_shares(images, 0.25)
    assert row_shares(images[::-1], 0.25) == pytest.approx(shares[::-1])


@given(
    st.lists(st.tuples(st.floats(0.01, 3), st.integers(1, 3000)), min_size=2, max_size=6),
    st.floats(0.01, 1),
)
def test_scaled_shares_keep_what_one_share_would(
    images: list[tuple[float, int]], retention: float
) -> None:
    """In the proportions of their weights, but for those that have no more to give."""
    weights, counts = [list(part) for part in zip(*images, strict=True)]
    shares = scaled_shares(weights, counts, retention)
    assert all(0 < share <= 1 for share in shares)
    kept = sum(share * count for share, count in zip(shares, counts, strict=True))
    assert kept == pytest.approx(retention * sum(counts))
    scale = max(share / weight for share, weight in zip(shares, weights, strict=True))
    for share, weight in zip(shares, weights, strict=True):
        assert share == pytest.approx(min(1.0, scale * weight))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 3000)), min_size=2, max_size=6),
    st.floats(0.01, 0.99),
)
def test_the_bounds_enclose_what_images_get(
    images: list[tuple[float, int]], retention: float
) -> None:
    """Whatever the softmax over them is."""
    parts = np.array([part for part, _ in images]) + 1e-9
    weights = 1 + parts / parts.sum() - 1 / len(images)
    counts = [count for _, count in images]
    shares = scaled_shares(weights.tolist(), counts, retention)
    for share, (least, most) in zip(shares, share_bounds(counts, retention), strict=True):
        assert least - 1e-9 <= share <= most + 1e-9
        assert least - 1e-9 <= retention <= most + 1e-9


def test_only_images_that_share_a_budget_have_shares() -> None:
    images = row_of(0, 1)
    for budget, row, shares in (
        ("image", images, False),
        ("row", images, True),
        ("row", images[:1], False),
    ):
        config = CompressionConfig(retention=0.2, budget=budget)  # type: ignore[arg-type]
        assert (CompressionPolicy.from_config(config).shares_of(row) is not None) == shares
    whole = CompressionConfig(retention=1.0, budget="row")
    assert CompressionPolicy.from_config(whole).shares_of(images) is None


PADDED = Geometry.from_entries(
    [ViewGrid(4, 4, -1, 0, 2, 4)],
    None,
    np.array([*range(8), NEWLINE, *range(8, 16), NEWLINE, NEWLINE]),
)
"""A square of 4 x 4 tokens whose first and last row are padding, and a bare newline behind it."""


@pytest.mark.parametrize("method", METHODS)
def test_an_image_that_keeps_all_of_its_share_keeps_no_padding(method: str) -> None:
    """Nor newlines of rows that keep nothing: it is as compressed as the others of its row."""
    if not METHODS[method].takes_retention or method == "globalcom2-reference":
        return
    config = CompressionConfig(method=method, retention=0.9, budget="row")
    policy = CompressionPolicy.from_config(config)
    views = Views(torch.randn(16, 3), torch.randn(16), PADDED, (2, 4), 0)
    (selection,) = policy.select([views], [1.0])
    assert selection.entries.tolist() == [*range(4, 8), NEWLINE, *range(8, 12), NEWLINE]
    assert policy.at_share(1.0).bounds(PADDED) == (8, 8)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_without_a_retention_has_no_budget_to_share(method: str) -> None:
    if METHODS[method].takes_retention:
        policy = CompressionPolicy.from_config(CompressionConfig(method=method, budget="row"))
        assert policy.shares_budget
    else:
        with pytest.raises(ValueError, match="no retention to share out"):
            CompressionConfig(method=method, budget="row")
