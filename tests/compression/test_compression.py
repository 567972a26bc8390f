"""Compression methods: fixtures, the oracle, and the contract that every method keeps."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gc2ray.compression.base import ViewBatch
from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import NEWLINE, canvas_geometry
from gc2ray.compression.methods.globalcom2 import GlobalCom2, crop_scales
from gc2ray.compression.methods.globalcom2_reference import GlobalCom2Reference
from gc2ray.compression.registry import COMPRESSORS, build
from gc2ray.compression.selection import everything
from gc2ray.compression.views import Views
from gc2ray.core.config.compression import METHODS, CompressionConfig
from gc2ray.models.image_processor import AnyRes
from tests.support import oracle
from tests.support.views import canvas_of, kept_sets, random_views

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "manifest.json").read_text())
# The reference's own grid (14, 15, 16), its rounding (21), and crops that keep nothing (24).
NOT_AS_THE_PAPER = {14, 15, 16, 21, 24}
NEAR_TIE = 1e-5

ANYRES = AnyRes(
    tile=336,
    pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    resample=3,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    rescale=1 / 255,
)


def golden(index: int) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / CASES[index]["file"]) as data:
        return {key: data[key] for key in data.files}


def golden_views(data: dict[str, np.ndarray]) -> Views:
    size = tuple(reversed(data["image_size_wh"].tolist()))
    grid = tuple(reversed(data["grid_wh"].tolist()))
    side = (int(data["side"]),) * 2
    return Views(
        features=torch.from_numpy(data["features"]).float().flatten(0, 1),
        scores=torch.from_numpy(data["cls_scores"]).flatten(),
        geometry=canvas_geometry(Canvas.from_image_size(size, grid, side)),
        size=size,
    )


def as_the_reference_cuts(views: Views) -> Views:
    """The image with its padding cut without rounding."""
    canvas = canvas_of(views)
    theirs = Canvas.from_image_size(views.size, canvas.grid, canvas.side, digits=None)
    return replace(views, geometry=canvas_geometry(theirs))


def per_view(views: Views) -> list[list[float]]:
    """Scores of each view."""
    return [view.tolist() for view in views.per_view(views.scores)]


def make_views(
    size: tuple[int, int], side: int = 6, seed: int = 0, grid: tuple[int, int] | None = None
) -> Views:
    return random_views(size, grid or ANYRES.grid(size), side, seed)


# --- fixtures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(CASES)))
def test_reference_method_equals_the_reference(index: int) -> None:
    data = golden(index)
    views = golden_views(data)
    method = GlobalCom2Reference(retention=float(data["ratio"]))
    selection = method(views)
    assert selection.entries.tolist() == data["packed_src"].tolist()
    source = selection.entries.long()
    packed = views.features[source.clamp_min(0)]
    packed[source == NEWLINE] = torch.from_numpy(data["newline"]).float()
    assert torch.equal(packed, torch.from_numpy(data["packed"]).float())
    batch = ViewBatch.from_images([as_the_reference_cuts(views)])
    np.testing.assert_allclose(
        crop_scales(batch, float(data["ratio"]), 10.0).numpy(), data["scales"], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("index", sorted(set(range(len(CASES))) - NOT_AS_THE_PAPER))
def test_globalcom2_keeps_the_reference_sets(index: int) -> None:
    data = golden(index)
    views = golden_views(data)
    retention = float(data["ratio"])
    kept = kept_sets(views, GlobalCom2(retention)(views).entries.tolist())
    assert kept[0] == set(data["thumb_idx"].tolist())
    ptr = data["kept_ptr"]
    for crop in range(len(ptr) - 1):
        assert kept[crop + 1] == set(data["kept_true"][ptr[crop] : ptr[crop + 1]].tolist())
    scales = crop_scales(ViewBatch.from_images([views]), retention, 10.0)
    np.testing.assert_allclose(scales.numpy(), data["scales"], rtol=0, atol=1e-12)


def test_the_excepted_fixtures_do_differ() -> None:
    """Otherwise the exceptions above would hide something."""
    for index in (21, 24):
        data = golden(index)
        views = golden_views(data)
        kept = kept_sets(views, GlobalCom2(float(data["ratio"]))(views).entries.tolist())
        assert sum(map(len, kept[1:])) != len(data["kept_true"])
    for index in (14, 15, 16):
        data = golden(index)
        width, height = data["image_size_wh"].tolist()
        assert ANYRES.grid((height, width)) == tuple(data["grid_wh"].tolist())  # transposed


# --- the deviations from the reference, by number ----------------------------------------------


def test_thumbnail_in_raster_order() -> None:
    views = make_views((700, 700))
    thumbnail = [place for place in GlobalCom2(0.3)(views).entries.tolist() if 0 <= place < 36]
    assert thumbnail == sorted(thumbnail)
    accident = [p for p in GlobalCom2Reference(0.3)(views).entries.tolist() if 0 <= p < 36]
    assert accident != sorted(accident)


def test_kept_tokens_stand_where_they_were() -> None:
    """1000x400 has padding above and below: the reference writes its tokens to other rows."""
    views = make_views((400, 1000))
    source = GlobalCom2(0.4)(views).entries.tolist()
    canvas_rows: list[int] = []
    line: list[int] = []
    for place in source[source.index(next(p for p in source if p >= 36)) :]:
        if place == NEWLINE:
            assert len({row for row, _ in line}) == 1
            assert [column for _, column in line] == sorted(column for _, column in line)
            canvas_rows.append(line[0][0])
            line = []
        else:
            crop, token = place // 36 - 1, place % 36
            line.append((token // 6, crop * 6 + token % 6))
    assert canvas_rows == sorted(set(canvas_rows))
    assert (
        oracle.pack(kept_sets(views, GlobalCom2(0.4)(views).entries.tolist()), (1, 3), 6) == source
    )


def test_one_newline_per_row_that_keeps_a_token() -> None:
    views = make_views((400, 1000), seed=3)
    source = GlobalCom2(0.05)(views).entries
    rows = {(p % 36) // 6 for p in source.tolist() if p >= 36}
    assert int((source == NEWLINE).sum()) == len(rows) < views.geometry.newlines
    assert int((GlobalCom2Reference(0.05)(views).entries == NEWLINE).sum()) == 6


def test_every_view_keeps_a_token() -> None:
    views = golden_views(golden(24))
    assert min(_counts(views, 0.01)) == 1
    reference = GlobalCom2Reference(0.01)(views)
    assert 0 in reference.kept_per_view(views.geometry)


def _counts(views: Views, retention: float) -> tuple[int, ...]:
    selection = GlobalCom2(retention)(views)
    return selection.kept_per_view(views.geometry)


def test_unpadding_rounds_as_transformers() -> None:
    size, grid, side = (792, 1408), (2, 2), (24, 24)
    assert Canvas.from_image_size(size, grid, side).height == 28
    assert Canvas.from_image_size(size, grid, side, digits=None).height == 26


@pytest.mark.parametrize("size", [(10, 2000), (2000, 10), (500, 3), (1, 1)])
@pytest.mark.parametrize("method", COMPRESSORS)
def test_extreme_aspect_ratios(method: str, size: tuple[int, int]) -> None:
    source = build(method, retention=0.25)(make_views(size)).entries
    assert (source >= 0).any()


@pytest.mark.parametrize("method", COMPRESSORS)
def test_many_equals_one_by_one(method: str) -> None:
    sizes = [(700, 700), (400, 1000), (10, 2000), (1100, 500), (700, 700), (50, 40)]
    images = [make_views(size, seed=seed) for seed, size in enumerate(sizes)]
    compressor = build(method, retention=0.3)
    for image, selection in zip(images, compressor.many(images), strict=True):
        alone = compressor(image)
        assert torch.equal(alone.entries, selection.entries)
        if alone.features is not None:
            assert selection.features is not None
            assert torch.equal(alone.features, selection.features)
    assert compressor.many([]) == []


def test_the_table_of_methods_matches_their_classes() -> None:
    settings = {name: tuple(f.name for f in fields(cls)) for name, cls in COMPRESSORS.items()}
    assert {name: method.settings for name, method in METHODS.items()} == settings


SIZES = [(700, 700), (400, 1000), (10, 2000), (2000, 10), (50, 40)]


@pytest.mark.parametrize("retention", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_keeps_everything_means_that_all_tokens_are_kept(method: str, retention: float) -> None:
    compressor, images = build(method, retention=retention), list(map(make_views, SIZES))
    untouched = all(compressor(image).entries.equal(everything(image).entries) for image in images)
    assert CompressionConfig(method=method, retention=retention).keeps_everything == untouched


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["globalcom2", "local", "random", "uniform", "pool", "none"])
def test_retention_one_is_the_identity(method: str, size: tuple[int, int]) -> None:
    views = make_views(size)
    selection = build(method, retention=1.0)(views)
    assert torch.equal(selection.entries, everything(views).entries)
    assert selection.features is None
    expected = oracle.everything(size, canvas_of(views).grid, 6)
    assert selection.entries.tolist() == expected.packed


def test_ties_go_to_the_lower_index() -> None:
    views = make_views((700, 700))
    flat = replace(views, scores=torch.ones_like(views.scores))
    kept = kept_sets(flat, GlobalCom2(0.25)(flat).entries.tolist())
    assert kept == [set(range(9))] * 5


# --- oracle and contract -----------------------------------------------------------------------

edges = st.one_of(st.integers(1, 8000), st.integers(1, 60))
image_sizes = st.tuples(edges, edges)
retentions = st.one_of(
    st.floats(0.005, 1.0, exclude_max=True), st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.75])
)


@settings(max_examples=150, deadline=None)
@given(
    size=image_sizes,
    retention=retentions,
    seed=st.integers(0, 10_000),
    side=st.sampled_from([4, 5, 6]),
    temperature=st.sampled_from([0.5, 10.0, 100.0]),
)
def test_globalcom2_equals_the_oracle(
    size: tuple[int, int], retention: float, seed: int, side: int, temperature: float
) -> None:
    views = make_views(size, side=side, seed=seed)
    expected = oracle.globalcom2(
        per_view(views), size, canvas_of(views).grid, side, retention, temperature
    )
    assume(expected.gap > NEAR_TIE)
    assert GlobalCom2(retention, temperature)(views).entries.tolist() == expected.packed


@settings(max_examples=60, deadline=None)
@given(size=image_sizes, retention=retentions, seed=st.integers(0, 10_000))
def test_local_and_uniform_equal_the_oracle(
    size: tuple[int, int], retention: float, seed: int
) -> None:
    views = make_views(size, seed=seed)
    grid = canvas_of(views).grid
    local = oracle.local(per_view(views), size, grid, 6, retention)
    assert build("local", retention=retention)(views).entries.tolist() == local.packed
    uniform = oracle.uniform(size, grid, 6, retention)
    assert build("uniform", retention=retention)(views).entries.tolist() == uniform.packed


def promised(method: str, views: Views, retention: float) -> list[int]:
    """Kept tokens of each view, recounted from the documentation."""
    counts = views.valid_per_view
    if method in ("globalcom2", "globalcom2-reference"):
        at = as_the_reference_cuts(views) if method == "globalcom2-reference" else views
        scales = [retention, *crop_scales(ViewBatch.from_images([at]), retention, 10.0).tolist()]
        least = 1 if method == "globalcom2" else 0
        pairs = zip(at.valid_per_view, scales, strict=True)
        return [max(min(least, n), int(n * scale)) for n, scale in pairs]
    if method == "none":
        return list(counts)
    if method == "thumbnail":
        return [counts[0]] + [0] * (len(counts) - 1)
    return [min(n, max(1, int(n * retention))) for n in counts]


@pytest.mark.parametrize("method", COMPRESSORS)
@settings(max_examples=60, deadline=None)
@given(size=image_sizes, retention=retentions, seed=st.integers(0, 10_000))
def test_every_method_keeps_the_contract(
    method: str, size: tuple[int, int], retention: float, seed: int
) -> None:
    views = make_views(size, seed=seed)
    before = views.scores.clone(), views.features.clone()
    compressor = build(method, retention=retention)
    selection = compressor(views)
    again = compressor(views)
    source = selection.entries
    assert source.dtype == torch.int32
    assert torch.equal(source, again.entries), "not deterministic"
    assert torch.equal(views.scores, before[0]), "input changed"
    assert torch.equal(views.features, before[1]), "input changed"
    tokens = source[source >= 0].long()
    # The reference truncates to no token at all where few are asked for; its newlines remain.
    emptiable = method == "globalcom2-reference"
    assert len(source if emptiable else tokens) > 0, "empty"
    assert len(tokens) == len(set(tokens.tolist())), "a token twice"
    if method != "globalcom2-reference":  # it cuts padding by another rounding, by design
        assert views.index.valid[tokens].all(), "kept padding"
    counts = list(selection.kept_per_view(views.geometry))
    if method == "pool":
        pairs = zip(counts, promised(method, views, retention), strict=True)
        assert all(min(1, n) <= count <= n for count, n in pairs)
    else:
        assert counts == promised(method, views, retention)


@pytest.mark.parametrize("method", COMPRESSORS)
@settings(max_examples=60, deadline=None)
@given(size=image_sizes, retention=retentions, seed=st.integers(0, 10_000))
def test_bounds_hold_whatever_the_scores(
    method: str, size: tuple[int, int], retention: float, seed: int
) -> None:
    views = make_views(size, seed=seed)
    views = replace(views, scores=views.scores * 10 ** (seed % 4))  # from flat to all on one crop
    compressor = build(method, retention=retention)
    kept = sum(compressor(views).kept_per_view(views.geometry))
    low, high = compressor.bounds(views.geometry)
    assert 0 <= low <= kept <= high
    if method not in ("globalcom2", "globalcom2-reference"):
        assert low == high


def test_bounds_are_close_where_crops_are_filled() -> None:
    """Budgets move between crops, and their sum stays; each crop loses less than a token."""
    square = canvas_geometry(Canvas.from_image_size((672, 672), (2, 2), (24, 24)))
    for retention in (0.05, 0.1, 0.25, 0.5):
        low, high = GlobalCom2(retention).bounds(square)
        assert high - low <= 4
        assert high == pytest.approx(5 * 576 * retention, rel=0.01)
    assert GlobalCom2(0.75).bounds(square) == (1976, 2160)


@pytest.mark.parametrize("size", [(672, 672), (500, 672), (90, 2000), (2000, 90)])
def test_extreme_scores_reach_the_bounds(size: tuple[int, int]) -> None:
    """All the thumbnail's scores in one crop's region, for each crop in turn."""
    base = make_views(size)
    geometry, region = base.geometry, base.index.region_of
    method = GlobalCom2(0.4)
    low, high = method.bounds(geometry)
    sums = []
    for crop in range(len(geometry.crops)):
        scores = torch.rand(base.scores.shape)
        scores[: len(region)] += 1e4 * (region == crop)
        views = replace(base, scores=scores)
        sums.append(sum(method(views).kept_per_view(geometry)))
    slack = len(geometry.crops)
    assert min(sums) <= low + slack
    assert max(sums) >= high - slack


def test_pool_averages_its_cells() -> None:
    views = make_views((672, 672))
    selection = build("pool", retention=0.25)(views)
    assert selection.features is not None
    kept = selection.features[selection.entries[selection.entries >= 0]]
    first = views.per_view(views.features)[0].view(6, 6, 4)[:2, :2].mean(dim=(0, 1))
    torch.testing.assert_close(kept[0], first)
    torch.testing.assert_close(kept.mean(dim=0), views.features.mean(dim=0))


def test_random_follows_the_row_only() -> None:
    views = make_views((700, 700), seed=1)
    method = build("random", retention=0.3)
    assert not torch.equal(method(views).entries, method(replace(views, seed=2)).entries)
    other_scores = replace(views, scores=views.scores.flip(0))
    assert torch.equal(method(views).entries, method(other_scores).entries)


def test_newlines_are_counted_apart_from_tokens() -> None:
    views = make_views((2000, 10))
    source = everything(views).entries
    assert source[36:].tolist() == [NEWLINE] * 18  # bare newlines, as stock packs them
    assert views.geometry.newlines == 18


@pytest.mark.parametrize("retention", [0.0, -0.1, 1.01, math.nan])
def test_retention_is_a_fraction_kept(retention: float) -> None:
    for name, method in METHODS.items():
        if method.takes_retention:
            with pytest.raises(ValueError, match="fraction kept"):
                build(name, retention=retention)


def test_temperature_is_positive() -> None:
    with pytest.raises(ValueError, match="temperature"):
        GlobalCom2(0.5, temperature=0.0)


def crops_only(views: Views) -> Views:
    """The image without its thumbnail."""
    geometry = canvas_geometry(canvas_of(views), thumbnail=False)
    first = len(views.scores) - geometry.tokens
    return replace(
        views, features=views.features[first:], scores=views.scores[first:], geometry=geometry
    )


def test_without_a_thumbnail_views_follow_their_own_scores() -> None:
    crops = crops_only(make_views((700, 700)))
    local = build("local", retention=0.5)(crops)
    assert torch.equal(GlobalCom2(0.5)(crops).entries, local.entries)
    assert local.entries.max() < 4 * 36
    with pytest.raises(ValueError, match="LLaVA-NeXT"):
        GlobalCom2Reference(0.5)(crops)


def test_views_of_the_wrong_shape_are_refused() -> None:
    views = make_views((700, 700))
    with pytest.raises(ValueError, match="geometry has"):
        replace(views, scores=views.scores[1:])
