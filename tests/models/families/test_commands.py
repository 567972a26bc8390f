"""`check`, `estimate`, a worker's shard and `show` for every family.

Rows have one image, several, or none.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gc2ray.core.config.job import Job, load_job
from gc2ray.data.source import Source
from gc2ray.data.store import Store
from gc2ray.output.parts import read_part
from gc2ray.output.plan import Plan
from gc2ray.output.planner import store_plan
from gc2ray.reporting.heat_map import heat_map
from gc2ray.reporting.show import map_tokens
from gc2ray.runner.messages import ShardAssignment
from gc2ray.runner.worker import Worker
from tests.support.commands import run_command
from tests.support.families import FAMILIES, Size
from tests.support.rows import encoded, job_data, picture

IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


SHARING = {"llava_next_siglip", "llava_onevision", "internvl3", "smolvlm"}
"""Families whose job divides one budget among a row's images."""


@dataclass(frozen=True)
class Given:
    """A family's job.

    Attributes:
        config: Its file.
        expands: Whether stock's own processor expands placeholders.
        sizes: Sizes of the images of each row.
    """

    config: Path
    expands: bool
    sizes: list[tuple[Size, ...]]

    @property
    def job(self) -> Job:
        return load_job(self.config, [])


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Rows of one image of every kind of size, of two, and of none."""
    folder = tmp_path_factory.mktemp(request.param)
    family = FAMILIES[request.param]
    family.build(folder / "model")
    few = family.sizes[::3]
    sizes = [*((size,) for size in few), few[:2], ()]
    rows = [
        [{"bytes": encoded(picture(size, seed)), "path": None} for seed, size in enumerate(of_row)]
        for of_row in sizes
    ]
    pq.write_table(pa.table({"image": pa.array(rows, IMAGES)}), folder / "rows.parquet")
    data = job_data(folder / "model", folder / "rows.parquet", folder / "out")
    data["recipe"]["audit"] = {"share": 1.0}
    if request.param in SHARING:
        data["recipe"]["compression"]["budget"] = "row"
    data["cluster"] = {"workers": 1, "shard_rows": 50}
    (folder / "job.yaml").write_text(json.dumps(data))
    return Given(folder / "job.yaml", family.stock_expands, sizes)


@pytest.fixture(scope="module")
def answered(given: Given) -> dict[int, dict[str, Any]]:
    """The answers of a worker, by row."""
    job = given.job.located()
    files, kept_columns = Source(job.recipe.input).scan()
    plan = store_plan(Store(job.output), job, Plan.cut(job.recipe, files, 50, kept_columns))
    worker = Worker(job, kept_columns)
    worker.load()
    worker.process(ShardAssignment(plan.shards[0]))
    store = Store(job.output)
    return {row["row"]: row for row in read_part(store, store.names("data")[0]).to_pylist()}


@pytest.mark.parametrize("command", ["estimate", "tune", "check"])
def test_a_method_that_compresses_other_models_alone_is_refused(given: Given, command: str) -> None:
    """`globalcom2-reference` reproduces what its authors did to LLaVA-NeXT."""
    method = "recipe.compression.method=globalcom2-reference"
    model = json.loads((given.config.parent / "model" / "config.json").read_text())["model_type"]
    if model == "llava_next":
        return
    result = run_command(command, given.config, method, "recipe.compression.budget=image")
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if "recipe.compression.method" in line]
    assert len(lines) == 1, result.stderr
    assert f"this is a {model} model" in result.stderr.replace("\n", " ")


def test_check_passes_and_says_who_expanded_the_placeholders(given: Given) -> None:
    """The model's own float32 logits and tokens, in stock and here, in batches and alone."""
    result = run_command("check", given.config, "--rows", len(given.sizes))
    assert result.exit_code == 0, result.stdout + result.stderr
    count = len(given.sizes)
    assert f"prompt tokens: {count} of {count} prompts the same" in result.stdout
    assert ("expanded by gc2ray" in result.stdout) != given.expands
    assert f"{count} of {count} answers the same" in result.stdout


def test_every_row_is_answered(given: Given, answered: dict[int, dict[str, Any]]) -> None:
    assert [answered[row]["status"] for row in sorted(answered)] == ["ok"] * len(given.sizes)
    for number, sizes in enumerate(given.sizes):
        row = answered[number]
        assert len(row["kept_per_view"]) == len(sizes)
        assert row["visual_tokens_kept"] == sum(
            count or 0 for views in row["kept_per_view"] for count in views
        )
        assert (row["retention_actual"] is None) == (not sizes)
        assert len(row["kept_mask"]) == sum(map(len, row["kept_per_view"]))
        if sizes:
            assert row["visual_tokens_kept"] < row["visual_tokens_full"]


def test_the_estimate_holds(given: Given, answered: dict[int, dict[str, Any]]) -> None:
    result = run_command("estimate", given.config, "--json", "recipe.audit.share=0")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    rows = answered.values()
    full = sum(row["visual_tokens_full"] for row in rows)
    assert found["visual_tokens_full"] == {"low": full, "mid": full, "high": full}
    text = sum(
        row["prompt_tokens"] - row["visual_tokens_kept"] - row["newline_tokens"] for row in rows
    )
    assert found["text_tokens"]["mid"] == text
    own = found["workloads"][0]
    kept = sum(row["visual_tokens_kept"] for row in rows)
    assert own["visual_tokens"]["low"] <= kept <= own["visual_tokens"]["high"]
    newlines = sum(row["newline_tokens"] for row in rows)
    assert own["newline_tokens"]["low"] <= newlines <= own["newline_tokens"]["high"]
    prompts = sum(row["prompt_tokens"] for row in rows) / len(answered)
    assert own["prompt_tokens"]["low"] - 1 <= prompts <= own["prompt_tokens"]["high"] + 1


def test_what_was_kept_is_drawn(given: Given, answered: dict[int, dict[str, Any]]) -> None:
    shown = [row for row, sizes in enumerate(given.sizes) if sizes][::2]
    keys = [answered[row]["row_key"] for row in shown]
    for row, maps in zip(shown, map_tokens(given.job.output, keys), strict=True):
        assert len(maps) == len(given.sizes[row])
        shares = given.job.recipe.compression.budget == "row" and len(maps) > 1
        assert all(("this image's share" in each.captions[-1]) == shares for each in maps)
        kept = sum(int(each.kept.sum()) for each in maps)
        assert kept == answered[row]["visual_tokens_kept"]
        drawn = Image.open(io.BytesIO(heat_map(maps)))
        assert drawn.format == "PNG"
