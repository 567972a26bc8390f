"""Packing: where newlines stand and which positions tokens get, against an oracle of loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.compression.geometry import NEWLINE, canvas_geometry
from gc2ray.compression.packing import Newlines, Packing
from gc2ray.compression.registry import COMPRESSORS, build
from gc2ray.compression.selection import OriginalPositions, Selection, everything, reading_order
from gc2ray.compression.views import Views
from tests.support import oracle
from tests.support.views import canvas_of, kept_sets, random_views

ORIGINAL = Packing(positions="original")
ALL, NONE = Packing(newlines="all"), Packing(newlines="none")
PLACED = [method for method in COMPRESSORS if method != "globalcom2-reference"]
"""Methods that keep entries where stock has them."""
SIZES = [(700, 700), (400, 1000), (10, 2000), (2000, 10), (1100, 500), (50, 40)]

edges = st.one_of(st.integers(1, 3000), st.integers(1, 60))
image_sizes = st.tuples(edges, edges)
grids = st.tuples(st.integers(1, 3), st.integers(1, 3))
sides = st.sampled_from([3, 4, 5])
retentions = st.sampled_from([0.02, 0.1, 0.25, 0.6, 1.0])


def random_mask(views: Views, share: float, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    valid = views.index.valid
    return (torch.rand(valid.shape, generator=draw) < share) & valid


def rows_closed(method: str, retention: float, views: Views, packed: list[int]) -> list[int]:
    """The canvas row of each newline, from what the method promises."""
    grid, side = canvas_of(views).grid, canvas_of(views).side[0]
    if method == "none" or (retention == 1 and method != "thumbnail"):
        return list(oracle.valid_rectangle(views.size, grid, side)[0])
    return oracle.rows_closed(packed, grid, side)


def places_of(packing: Packing, views: Views, selection: Selection) -> OriginalPositions:
    (places,) = packing.original_positions([views], [selection])
    assert places is not None
    assert places.index.dtype == torch.int64
    return places


def check_places(views: Views, selection: Selection, closed: list[int]) -> None:
    grid, side = canvas_of(views).grid, canvas_of(views).side[0]
    found = places_of(ORIGINAL, views, selection)
    packed = selection.entries.tolist()
    assert found.index.tolist() == oracle.places(packed, closed, views.size, grid, side)
    assert found.length == oracle.uncompressed_places(views.size, grid, side)[2]
    assert found.length == len(everything(views).entries)


# --- against the oracle ------------------------------------------------------------------------


@pytest.mark.parametrize("method", PLACED)
@settings(max_examples=60, deadline=None)
@given(size=image_sizes, grid=grids, side=sides, retention=retentions, seed=st.integers(0, 999))
def test_positions_are_those_of_the_uncompressed_image(
    method: str,
    size: tuple[int, int],
    grid: tuple[int, int],
    side: int,
    retention: float,
    seed: int,
) -> None:
    views = random_views(size, grid, side, seed)
    selection = build(method, retention=retention)(views)
    closed = rows_closed(method, retention, views, selection.entries.tolist())
    check_places(views, selection, closed)


@settings(max_examples=150, deadline=None)
@given(
    size=image_sizes,
    grid=grids,
    side=sides,
    share=st.sampled_from([0.0, 0.03, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 999),
)
def test_positions_of_random_masks(
    size: tuple[int, int], grid: tuple[int, int], side: int, share: float, seed: int
) -> None:
    views = random_views(size, grid, side)
    (selection,) = reading_order([views], random_mask(views, share, seed))
    check_places(views, selection, oracle.rows_closed(selection.entries.tolist(), grid, side))
    (full,) = ALL.apply([views], [selection])
    assert full.entries.dtype == selection.entries.dtype
    packed = full.entries.tolist()
    kept = kept_sets(views, selection.entries.tolist())
    assert packed == oracle.pack_with_all_newlines(kept, size, grid, side)
    check_places(views, full, list(oracle.valid_rectangle(size, grid, side)[0]))


@pytest.mark.parametrize("method", PLACED)
@pytest.mark.parametrize("newlines", ["all", "none"])
@settings(max_examples=40, deadline=None)
@given(size=image_sizes, grid=grids, side=sides, retention=retentions, seed=st.integers(0, 999))
def test_newlines_of_every_method(
    method: str,
    newlines: Newlines,
    size: tuple[int, int],
    grid: tuple[int, int],
    side: int,
    retention: float,
    seed: int,
) -> None:
    views = random_views(size, grid, side, seed)
    before = build(method, retention=retention)(views)
    emitted = before.entries.tolist()
    (after,) = Packing(newlines=newlines).apply([views], [before])
    packed = after.entries.tolist()
    if newlines == "none":
        assert packed == [source for source in emitted if source != NEWLINE]
        closed = []
    else:
        kept = kept_sets(views, emitted)
        expected = oracle.pack_with_all_newlines(kept, size, grid, side)
        assert packed == expected
        closed = list(oracle.valid_rectangle(size, grid, side)[0])
    check_places(views, after, closed)
    assert after.features is before.features  # merged features stand at their tokens' numbers


# --- by example --------------------------------------------------------------------------------


def test_a_small_image_by_hand() -> None:
    """A 1x2 grid of 2x2 views: thumbnail 0..3, rows (4 5 8 9) and (6 7 10 11)."""
    views = random_views((100, 200), (1, 2), 2)
    assert everything(views).entries.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]
    keep = torch.zeros(12, dtype=torch.bool)
    keep[[1, 6, 10]] = True
    (selection,) = reading_order([views], keep)
    assert selection.entries.tolist() == [1, 6, 10, -1]
    found = places_of(ORIGINAL, views, selection)
    assert (found.index.tolist(), found.length) == ([1, 9, 11, 13], 14)
    (full,) = ALL.apply([views], [selection])
    assert full.entries.tolist() == [1, -1, 6, 10, -1]
    assert places_of(ORIGINAL, views, full).index.tolist() == [1, 8, 9, 11, 13]
    (bare,) = NONE.apply([views], [selection])
    assert bare.entries.tolist() == [1, 6, 10]
    assert places_of(ORIGINAL, views, bare).index.tolist() == [1, 9, 11]


@pytest.mark.parametrize("packing", [ORIGINAL, ALL, NONE])
def test_a_method_that_packs_itself_takes_no_packing(packing: Packing) -> None:
    views = random_views((400, 1000))
    selection = build("globalcom2-reference", retention=0.3)(views)
    with pytest.raises(ValueError, match="no other packing"):
        packing.original_positions([views], packing.apply([views], [selection]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["globalcom2", "pool", "none", "uniform"])
def test_at_retention_one_every_token_has_its_own_position(
    method: str, size: tuple[int, int]
) -> None:
    views = random_views(size)
    selection = build(method, retention=1.0)(views)
    for packing in (ORIGINAL, replace(ORIGINAL, newlines="all")):
        (packed,) = packing.apply([views], [selection])
        assert torch.equal(packed.entries, selection.entries)
        found = places_of(packing, views, packed)
        assert found.index.tolist() == list(range(found.length))


def test_an_image_without_a_thumbnail() -> None:
    views = random_views((400, 1000))
    geometry = canvas_geometry(canvas_of(views), thumbnail=False)
    crops = replace(
        views, features=views.features[36:], scores=views.scores[36:], geometry=geometry
    )
    keep = random_mask(views, 0.2, seed=1)
    keep[:36] = False
    (expected,) = ALL.apply([views], reading_order([views], keep))
    (selection,) = ALL.apply([crops], reading_order([crops], keep[36:]))
    shifted = expected.entries - 36 * (expected.entries != NEWLINE)
    assert selection.entries.tolist() == shifted.tolist()
    found, with_thumbnail = (
        places_of(ORIGINAL, *pair) for pair in ((crops, selection), (views, expected))
    )
    assert (found.index + 36).tolist() == with_thumbnail.index.tolist()
    assert found.length + 36 == with_thumbnail.length


def test_packing_without_kept_tokens() -> None:
    views = random_views((400, 1000))
    empty = Selection(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64))
    (full,) = ALL.apply([views], [empty])
    assert full.entries.tolist() == [NEWLINE] * 4
    assert places_of(ORIGINAL, views, empty).index.tolist() == []
    assert NONE.apply([views], [full])[0].entries.tolist() == []


@pytest.mark.parametrize("method", PLACED)
@pytest.mark.parametrize("packing", [replace(ORIGINAL, newlines="all"), ORIGINAL, NONE])
def test_several_images_equal_one_by_one(method: str, packing: Packing) -> None:
    images = [random_views(size, seed=seed) for seed, size in enumerate(SIZES)]
    selections = build(method, retention=0.3).many(images)
    together = packing.apply(images, selections)
    placed = packing.original_positions(images, together)
    for image, selection, packed, places in zip(images, selections, together, placed, strict=True):
        (alone,) = packing.apply([image], [selection])
        assert torch.equal(alone.entries, packed.entries)
        if packing.positions == "original":
            assert places is not None
            assert torch.equal(places.index, places_of(packing, image, alone).index)
        else:
            assert places is None


@pytest.mark.parametrize("method", PLACED)
def test_the_papers_packing_changes_nothing(method: str) -> None:
    images = [random_views(size) for size in SIZES]
    selections = build(method, retention=0.3).many(images)
    same = Packing().apply(images, selections)
    assert all(a is b for a, b in zip(same, selections, strict=True))
    assert Packing().original_positions(images, same) == [None] * len(images)
    kept_rows = ORIGINAL.apply(images, selections)
    assert all(a is b for a, b in zip(kept_rows, selections, strict=True))
