"""What is counted without a pixel or a weight is what an engine counts with both."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import canvas_geometry
from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.core.config.job import Cluster, Job
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.intervals import Interval
from gc2ray.core.records import Answer
from gc2ray.core.schema import stats_of
from gc2ray.core.shards import SourceFile
from gc2ray.data.source import Source
from gc2ray.engine.engine import Engine
from gc2ray.estimation.input_profile import (
    InputProfile,
    PromptShape,
    SampleBlock,
    ShownImage,
    profile_input,
    sample_spans,
)
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.base import ModelMetadata
from gc2ray.models.loading import load_metadata
from tests.support.rows import SIZES, encoded, make_job, picture, prompts_of, write_rows

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def metadata(tiny_paths: dict[str, Path]) -> ModelMetadata:
    return load_metadata(str(tiny_paths["vicuna"]), dtype="float32")


def mixed(folder: Path) -> Path:
    """Images of all shapes; one of no format, one that is null; a prompt that is null."""
    images: list[bytes | None] = [encoded(picture(size, i)) for i, size in enumerate(SIZES)]
    images += [b"no image", None, images[0], images[0]]
    prompts = [f"What is {'very ' * i}odd?" for i in range(len(images))]
    table = pa.table(
        {
            "image": pa.array([{"bytes": data, "path": None} for data in images], IMAGE),
            "prompt": pa.array([*prompts[:-1], None]),
        }
    )
    folder.mkdir()
    pq.write_table(table, folder / "mixed.parquet", row_group_size=4)
    return folder


def answers(job: Job, loaded: LoadedModel) -> list[Answer]:
    source = Source(job.recipe.input)
    files, _ = source.scan()
    spans = [span for file in files for span in [whole(file)]]
    engine = Engine(loaded, job.recipe, Cluster())
    return list(engine.stream(r for span in spans for r in source.read(span, 1 << 20)))


def whole(file: SourceFile):
    from gc2ray.core.shards import Span

    return Span(file.source, file.fingerprint, 0, file.rows)


def test_all_rows_are_what_an_engine_finds(
    tmp_path: Path,
    tiny_paths: dict[str, Path],
    loaded_models: dict[str, LoadedModel],
    metadata: ModelMetadata,
) -> None:
    source = mixed(tmp_path / "in")
    job = make_job(tiny_paths["vicuna"], source, input__prompt={"column": "prompt"})
    found = profile_input(job.recipe, metadata)
    stats = stats_of(answers(job, loaded_models["vicuna"]))
    assert (found.rows, found.sampled_rows, found.is_exact) == (11, 11, True)
    assert found.refused == {Status.BAD_IMAGE: 2, Status.BAD_PROMPT: 1}
    assert {**found.refused, "ok": found.prompts.total()} == stats.by_status
    shown = found.prompts
    images = [(n, image.geometry) for prompt, n in shown.items() for image in prompt.images]
    assert sum(n * geometry.visual_tokens for n, geometry in images) == stats.visual_tokens_full
    assert sum(n * geometry.newlines for n, geometry in images) == stats.newline_tokens_full
    text = stats.prompt_tokens - stats.visual_tokens_kept - stats.newline_tokens
    assert sum(n * s.text_tokens for s, n in shown.items()) == text
    assert sum(n * len(s.new) for s, n in shown.items()) == stats.images == 7
    total = found.total(lambda block: block.prompts.total())
    assert total == Interval.exactly(8)


def test_prompts_of_one_row_show_one_image(
    tmp_path: Path, tiny_paths: dict[str, Path], metadata: ModelMetadata
) -> None:
    source = write_rows(tmp_path / "in" / "a.parquet", 20)
    job = make_job(tiny_paths["vicuna"], source, input__prompt={"column": "prompts"})
    found = profile_input(job.recipe, metadata)
    assert found.prompts.total() + found.refused.total() == sum(map(prompts_of, range(20)))
    assert sum(n * len(shown.new) for shown, n in found.prompts.items()) <= 20


@pytest.mark.parametrize(("budget", "encoded_images"), [("image", 3), ("row", 6)])
def test_images_of_rows_that_share_a_budget_are_encoded_again(
    tmp_path: Path,
    tiny_paths: dict[str, Path],
    loaded_models: dict[str, LoadedModel],
    metadata: ModelMetadata,
    budget: str,
    encoded_images: int,
) -> None:
    """An image that stands twice in a row, or in two rows, unless all images are the same."""
    one, two, three = ({"bytes": encoded(picture(size, 1)), "path": None} for size in SIZES[:3])
    cut = {"bytes": b"no image", "path": None}
    rows = [[two, three, cut], [one, one], [one, two, three], [one], [one, one], []]
    (tmp_path / "in").mkdir()
    table = pa.table({"image": pa.array(rows, pa.list_(IMAGE))})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    job = make_job(tiny_paths["vicuna"], tmp_path / "in", compression__budget=budget)
    found = profile_input(job.recipe, metadata)
    stats = stats_of(answers(job, loaded_models["vicuna"]))
    assert stats.images == sum(n * len(s.new) for s, n in found.prompts.items()) == encoded_images


def test_a_method_that_reads_the_prompt_shares_no_images(
    tmp_path: Path,
    tiny_paths: dict[str, Path],
    loaded_models: dict[str, LoadedModel],
    metadata: ModelMetadata,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GlobalCom2, "reads_prompt", True)
    image = {"bytes": encoded(picture(SIZES[0], 1)), "path": None}
    (tmp_path / "in").mkdir()
    table = pa.table({"image": pa.array([image] * 3, IMAGE), "q": ["What?", "Who?", "What?"]})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    job = make_job(tiny_paths["vicuna"], tmp_path / "in", input__prompt={"column": "q"})
    found = profile_input(job.recipe, metadata)
    stats = stats_of(answers(job, loaded_models["vicuna"]))
    assert stats.images == sum(n * len(s.new) for s, n in found.prompts.items()) == 2


def test_pixels_are_not_decoded(
    tmp_path: Path, tiny_paths: dict[str, Path], metadata: ModelMetadata
) -> None:
    """An image of which only the header is there is counted: its damage is not seen."""
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200)).save(buffer, "JPEG")
    data = buffer.getvalue()[:700]
    table = pa.table({"image": pa.array([{"bytes": data, "path": None}], IMAGE)})
    pq.write_table(table, tmp_path / "a.parquet")
    found = profile_input(make_job(tiny_paths["vicuna"], tmp_path).recipe, metadata)
    ((shown, count),) = found.prompts.items()
    assert (shown.images[0].geometry, count) == (metadata.family.geometry((200, 300)), 1)


def test_a_sample_is_spread_over_the_input(
    tmp_path: Path, tiny_paths: dict[str, Path], metadata: ModelMetadata
) -> None:
    for name in "abc":
        write_rows(tmp_path / "in" / f"{name}.parquet", 40)
    recipe = make_job(tiny_paths["vicuna"], tmp_path / "in").recipe
    ticks: list[int] = []
    found = profile_input(recipe, metadata, 30, ticks.append)
    assert (found.rows, found.sampled_rows, sum(ticks)) == (120, 30, 30)
    assert not found.is_exact
    everything = profile_input(recipe, metadata, 120)
    assert everything.is_exact


def test_sample_blocks_are_ordered_and_disjoint() -> None:
    files = [SourceFile(f"{n}", "f", (rows,)) for n, rows in enumerate((5, 0, 700, 1, 3000))]
    spans = sample_spans(files, 640)
    starts = np.cumsum([0, *(file.rows for file in files)])
    places = [(starts[int(s.source)] + s.first, starts[int(s.source)] + s.stop) for s in spans]
    assert all(first < stop for first, stop in places)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
    assert 600 <= sum(span.rows for span in spans) <= 640
    assert all(span.stop <= files[int(span.source)].rows for span in spans)
    assert sample_spans(files, 640) == spans
    for rows in (3706, 10_000):
        assert [span.rows for span in sample_spans(files, rows)] == [5, 700, 1, 3000]


def test_an_input_that_cannot_be_read_is_refused(
    tmp_path: Path, tiny_paths: dict[str, Path], metadata: ModelMetadata
) -> None:
    path = write_rows(tmp_path / "in" / "a.parquet", 20)
    data = bytearray(path.read_bytes())
    data[50:2000] = bytes(1950)  # the footer is whole, the pages are not
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"recipe.input: a.parquet"):
        profile_input(make_job(tiny_paths["vicuna"], path).recipe, metadata)


def sampled_profile(rows: int, counts: list[int], each: int) -> InputProfile:
    """Blocks with so many prompts in them."""
    geometry = canvas_geometry(Canvas.from_image_size((100, 100), (1, 2), (6, 6)))
    shown = PromptShape((ShownImage(geometry, 2, is_new=True),), 9)
    found = tuple(SampleBlock(each, Counter({shown: count}), Counter()) for count in counts)
    return InputProfile(rows, found)


def test_intervals_have_their_stated_coverage() -> None:
    """Inputs whose blocks differ; 95 % of intervals are to hold the truth, and few are."""
    draw, held, widths = np.random.default_rng(3), 0, []
    trials, parts, each = 300, 400, 16
    for _ in range(trials):
        truth = draw.poisson(draw.gamma(4.0, 3.0, parts))
        seen = draw.choice(parts, 64, replace=False)
        found = sampled_profile(parts * each, truth[seen].tolist(), each).total(
            lambda s: s.prompts.total()
        )
        held += found.low <= truth.sum() <= found.high
        widths.append((found.high - found.low) / found.mid)
    assert held / trials > 0.9
    assert np.median(widths) < 0.35


def test_the_low_end_is_at_least_what_was_sampled() -> None:
    found = sampled_profile(1000, [0, 0, 40], 10).total(lambda s: s.prompts.total())
    assert found.low >= 40
    alone = sampled_profile(1000, [4], 10).total(lambda s: s.prompts.total())
    assert (alone.low, alone.mid, alone.high) == (4, 400, np.inf)


def test_ranges_add_and_multiply_at_their_ends() -> None:
    a, b = Interval(1, 2, 4), Interval(10, 20, 30)
    assert a.plus(b) == Interval(11, 22, 34)
    assert a.times(b) == Interval(10, 40, 120)
    assert a.scaled(2) == Interval(2, 4, 8)
    assert Interval.exactly(3).is_exact
    assert not a.is_exact
