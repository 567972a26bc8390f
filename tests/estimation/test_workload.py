"""A workload agrees with the engine: exactly where nothing is compressed, else within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gc2ray.compression.policy import CompressionPolicy
from gc2ray.compression.registry import COMPRESSORS
from gc2ray.compression.row_budget import scaled_shares
from gc2ray.core.config.compression import METHODS, CompressionConfig
from gc2ray.core.intervals import Interval
from gc2ray.core.schema import stats_of
from gc2ray.core.stats import RunStats
from gc2ray.estimation.input_profile import profile_input
from gc2ray.estimation.token_bounds import RowBounds, TokenBounds
from gc2ray.estimation.workload import Workload, estimate_workload
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.loading import load_metadata
from tests.estimation.test_input_profile import answers, mixed
from tests.support.rows import SIZES, make_job
from tests.support.views import random_views

STAGES = ("encode", "compress", "prefill")


def both(
    tmp_path: Path, model: Path, loaded: LoadedModel, **changes: Any
) -> tuple[Workload, RunStats]:
    """The workload of some rows, and an engine's statistics of them, with answers of 5 tokens."""
    settings = {"input__prompt": {"column": "prompt"}, "generation__max_new_tokens": 5, **changes}
    job = make_job(model, mixed(tmp_path / "in"), **settings)
    generation = loaded.model.generation_config
    before, generation.eos_token_id = generation.eos_token_id, None
    try:
        stats = stats_of(answers(job, loaded))
    finally:
        generation.eos_token_id = before
    metadata = load_metadata(str(model), dtype="float32")
    found = profile_input(job.recipe, metadata)
    return estimate_workload(found, metadata, job.recipe, Interval.exactly(5)), stats


def test_uncompressed_it_is_exact(
    tmp_path: Path, tiny_paths: dict[str, Path], loaded_models: dict[str, LoadedModel]
) -> None:
    found, stats = both(
        tmp_path, tiny_paths["vicuna"], loaded_models["vicuna"], compression__retention=1.0
    )
    assert found.visual_tokens == Interval.exactly(stats.visual_tokens_kept)
    assert found.newline_tokens == Interval.exactly(stats.newline_tokens)
    assert found.prompt_tokens.scaled(stats.by_status["ok"]).mid == pytest.approx(
        stats.prompt_tokens
    )
    for stage in ("encode", "compress"):
        assert found.flops[stage] == Interval.exactly(stats.flops[stage])
    # An engine may compute the beginning of prompts about one image once, or again.
    assert found.flops["prefill"].low <= stats.flops["prefill"] <= found.flops["prefill"].high
    assert found.work[1].output_tokens == stats.output_tokens == 40


PACKED = [
    (method, newlines)
    for method in COMPRESSORS
    for newlines in ("kept_rows", "all", "none")
    if newlines == "kept_rows" or method != "globalcom2-reference"
]
"""Methods and the newlines that they take."""


@pytest.mark.parametrize("newlines", ["kept_rows", "all", "none"])
@pytest.mark.parametrize("method", ["globalcom2", "uniform", "pool", "thumbnail"])
def test_compressed_it_is_within_the_interval(
    tmp_path: Path,
    tiny_paths: dict[str, Path],
    loaded_models: dict[str, LoadedModel],
    method: str,
    newlines: str,
) -> None:
    compression = {"method": method, "retention": 0.25, "newlines": newlines}
    found, stats = both(
        tmp_path,
        tiny_paths["vicuna"],
        loaded_models["vicuna"],
        **{f"compression__{name}": value for name, value in compression.items()},
    )
    for value, range_ in (
        (stats.visual_tokens_kept, found.visual_tokens),
        (stats.newline_tokens, found.newline_tokens),
        (stats.prompt_tokens / stats.by_status["ok"], found.prompt_tokens),
    ):
        assert range_.low <= value <= range_.high
        assert range_.low <= range_.mid <= range_.high
    for stage in STAGES:
        assert found.flops[stage].low <= stats.flops[stage] <= found.flops[stage].high


@pytest.mark.parametrize(("method", "newlines"), PACKED)
@settings(max_examples=40, deadline=None)
@example(size=(400, 1), retention=0.02, seed=0)
@example(size=(400, 1), retention=0.98, seed=0)
@example(size=(1, 400), retention=0.25, seed=0)
@given(
    size=st.sampled_from([*SIZES, (90, 900), (900, 90), (400, 1), (1, 400)]),
    retention=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 1000),
)
def test_kept_tokens_of_an_image_are_within_the_bounds(
    method: str, newlines: Any, size: tuple[int, int], retention: float, seed: int
) -> None:
    views = random_views(size, (2, 2), 6, seed)
    config = CompressionConfig(method=method, retention=retention, newlines=newlines)
    policy = CompressionPolicy.from_config(config)
    (selection,) = policy.packing.apply([views], policy.compressor.many([views]))
    tokens = sum(selection.kept_per_view(views.geometry))
    kept = TokenBounds.from_geometry(views.geometry, config, policy.compressor)
    assert kept.visual.low <= tokens <= kept.visual.high
    assert kept.newlines.low <= len(selection.entries) - tokens <= kept.newlines.high


SHARING = [name for name, kind in METHODS.items() if kind.takes_retention]


@pytest.mark.parametrize("method", SHARING)
@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(
        st.sampled_from([*SIZES, (90, 900), (900, 90), (400, 1)]), min_size=2, max_size=4
    ),
    parts=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    retention=st.sampled_from([0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95]),
    seed=st.integers(0, 1000),
)
def test_kept_tokens_of_a_row_that_shares_a_budget_are_within_the_bounds(
    method: str, sizes: list[tuple[int, int]], parts: list[float], retention: float, seed: int
) -> None:
    """Whichever of its images are unlike the others."""
    images = [random_views(size, (2, 2), 6, seed + at) for at, size in enumerate(sizes)]
    config = CompressionConfig(method=method, retention=retention, budget="row")
    policy = CompressionPolicy.from_config(config)
    unlike = np.array(parts[: len(images)]) ** 4 + 1e-9
    weights = 1 + unlike / unlike.sum() - 1 / len(images)
    counts = [sum(image.valid_per_view) for image in images]
    selections = policy.select(images, scaled_shares(weights.tolist(), counts, retention))
    kept = [
        sum(chosen.kept_per_view(image.geometry))
        for chosen, image in zip(selections, images, strict=True)
    ]
    newlines = sum(len(chosen.entries) for chosen in selections) - sum(kept)
    bounds = RowBounds(config).of([image.geometry for image in images])
    for found, name in ((sum(kept), "visual"), (newlines, "newlines")):
        low, mid, high = (
            sum(getattr(image, name).ends[end] for image in bounds) for end in range(3)
        )
        assert low - 1e-6 <= found <= high + 1e-6
        assert low <= mid + 1e-6 <= high + 2e-6


def test_bounds_of_a_shared_budget_are_about_as_close_as_those_of_own_ones() -> None:
    row = [random_views(size, (2, 2), 24).geometry for size in ((672, 672), (400, 300), (90, 900))]
    spans = []
    for budget in ("image", "row"):
        config = CompressionConfig(retention=0.25, budget=budget)  # type: ignore[arg-type]
        bounds = RowBounds(config).of(row)
        spans.append(sum(image.visual.high - image.visual.low for image in bounds))
    views = sum(len(geometry.views) for geometry in row)
    assert spans[0] <= spans[1] <= 2 * spans[0] + 2 * views


def test_the_estimate_of_newlines_is_close() -> None:
    """Kept tokens fall on most rows of a canvas, and not on all."""
    config = CompressionConfig(retention=0.1)
    compressor = CompressionPolicy.from_config(config).compressor
    counts = []
    for seed in range(40):
        views = random_views((672, 672), (2, 2), 24, seed)
        counts.append(int((compressor.many([views])[0].entries < 0).sum()))
    geometry = random_views((672, 672), (2, 2), 24).geometry
    guess = TokenBounds.from_geometry(geometry, config, compressor).newlines.mid
    assert guess == pytest.approx(np.mean(counts), rel=0.05)


@pytest.mark.parametrize(("positions", "longer"), [("compact", False), ("original", True)])
def test_prompts_that_are_too_long_are_reported(
    tmp_path: Path, tiny_paths: dict[str, Path], positions: str, *, longer: bool
) -> None:
    """Tokens that stand where they would uncompressed need as many positions."""
    model = tiny_paths["vicuna"]
    metadata = load_metadata(str(model), dtype="float32")
    source = mixed(tmp_path / "in")
    recipe = make_job(
        model,
        source,
        input__prompt={"column": "prompt"},
        compression__positions=positions,
        compression__retention=0.1,
        generation__max_new_tokens=metadata.shape.text.max_positions - 100,
    ).recipe
    found = estimate_workload(
        profile_input(recipe, metadata), metadata, recipe, Interval.exactly(5)
    )
    assert (found.too_long.mid > 0) == longer
    assert found.too_long.mid <= found.too_long.high <= 8


def test_an_uncertain_answer_makes_an_uncertain_workload(
    tmp_path: Path, tiny_paths: dict[str, Path]
) -> None:
    model = tiny_paths["vicuna"]
    recipe = make_job(model, mixed(tmp_path / "in"), input__prompt={"column": "prompt"}).recipe
    metadata = load_metadata(str(model), dtype="float32")
    found = estimate_workload(profile_input(recipe, metadata), metadata, recipe, Interval(1, 4, 8))
    assert [end.output_tokens for end in found.work] == [8, 32, 64]
    assert found.flops["generate"].low == 0 < found.flops["generate"].mid
    assert found.work[0].cache_read_bytes == 0 < found.work[2].cache_read_bytes
