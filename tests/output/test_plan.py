"""The plan: every row once, the same every time, and back from its files unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.errors import ConfigError
from gc2ray.core.shards import Shards, SourceFile, bytes_digest
from gc2ray.output.plan import Plan
from gc2ray.output.run_directory import FORMAT, Run
from tests.support.methods import write_method
from tests.support.rows import make_recipe

RECIPE = make_recipe("model")
KEPT_COLUMNS = pa.schema([("id", pa.int64()), ("tags", pa.list_(pa.struct([("a", pa.string())])))])


def a_file(groups: list[int], name: str = "a.parquet") -> SourceFile:
    return SourceFile(name, f"size:{sum(groups)}", tuple(groups))


def a_plan(shard_rows: int = 7) -> Plan:
    files = [a_file([5, 5, 5]), a_file([3], "b.parquet"), a_file([30], "ü/c.parquet")]
    return Plan.cut(RECIPE, files, shard_rows, KEPT_COLUMNS)


@pytest.mark.parametrize("shard_rows", [1, 7, 1000])
def test_a_plan_survives_its_file(shard_rows: int) -> None:
    plan = a_plan(shard_rows)
    again = Plan.from_bytes(plan.to_bytes())
    assert again == plan
    assert again.kept_columns.equals(KEPT_COLUMNS)
    assert again.rows == 48
    assert again.to_bytes() == plan.to_bytes()


def test_plans_of_this_format_have_these_keys() -> None:
    """Other keys are another format: outputs of this one could not be read."""
    metadata = pq.read_schema(pa.BufferReader(a_plan().to_bytes())).metadata
    assert {*metadata} == {b"gc2ray.recipe", b"gc2ray.follows", b"gc2ray.carried"}
    assert FORMAT == 3


def test_an_empty_plan_survives_its_file() -> None:
    plan = Plan("f", Shards.from_shards([]), pa.schema([]))
    assert Plan.from_bytes(plan.to_bytes()) == plan


def test_a_plan_of_more_than_ten_shards_keeps_their_order() -> None:
    plan = a_plan(1)
    indices = [shard.index for shard in Plan.from_bytes(plan.to_bytes()).shards]
    assert indices == list(range(48))


def test_a_run_survives_its_file() -> None:
    plan = a_plan()
    run = Run.from_plan(RECIPE, plan, plan.to_bytes())
    assert Run.from_bytes(run.to_bytes()) == run
    assert (run.shards, run.rows) == (len(plan.shards), 48)
    assert run.plan_digest == bytes_digest(plan.to_bytes())
    assert {"gc2ray", "python", "torch", "transformers", "ray"} <= set(run.versions)


def test_a_run_names_the_source_of_its_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an edited run.json would have any module of that name imported."""
    monkeypatch.syspath_prepend(tmp_path)
    write_method(tmp_path, "own_method")
    settings = {"method": "own_method:Own", "allow_code": True}
    recipe = RECIPE.model_copy(update={"compression": CompressionConfig.model_validate(settings)})
    data = Run.from_plan(recipe, a_plan(), b"").to_bytes()
    assert Run.from_bytes(data).recipe == recipe
    content = json.loads(data)
    del content["recipe"]["compression"]["source_sha256"]
    with pytest.raises(ConfigError, match=r"run\.json: lacks the digest of its compression method"):
        Run.from_bytes(json.dumps(content).encode())


def test_run_json_is_readable() -> None:
    content = json.loads(Run.from_plan(RECIPE, a_plan(), b"").to_bytes())
    assert content["recipe"]["compression"]["retention"] == 0.25
    assert content["recipe_fingerprint"] == RECIPE.fingerprint()
    assert content["plan"] == {"file": "plan/0000.parquet", "sha256": bytes_digest(b"")}


def test_another_recipe_is_refused_with_every_difference() -> None:
    run = Run.from_plan(RECIPE, a_plan(), b"")
    run.check(make_recipe("model"))
    other = make_recipe("model", compression__retention=0.5, generation__seed=3)
    with pytest.raises(ConfigError) as caught:
        run.check(other)
    assert str(caught.value).splitlines()[1:] == [
        "  recipe.compression.retention: 0.25 (stored) -> 0.5 (yours)",
        "  recipe.generation.seed: 0 (stored) -> 3 (yours)",
    ]


def damaged(**changes: object) -> bytes:
    content = json.loads(Run.from_plan(RECIPE, a_plan(), b"").to_bytes())
    return json.dumps({**content, **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b"{}",
        b"null",
        damaged(plan="x"),
        damaged(recipe=None),
        damaged(recipe={"model": {}}),
        damaged(format=99),
        b"\x80abc",
    ],
)
def test_a_damaged_run_is_a_configuration_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        Run.from_bytes(data)


@pytest.mark.parametrize(("found", "age"), [(1, "an older"), (99, "a newer")])
def test_another_format_is_named(found: int, age: str) -> None:
    versions = {"gc2ray": "0.0.9"}
    message = (
        rf"run\.json: begun by {age} gc2ray, 0\.0\.9 \(format {found}\); this is .* choose a new"
    )
    with pytest.raises(ConfigError, match=message):
        Run.from_bytes(damaged(format=found, versions=versions))


def other_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": [1]}), sink)
    return sink.getvalue().to_pybytes()


def retyped_plan() -> bytes:
    """Our metadata on other columns."""
    table = pq.read_table(pa.BufferReader(a_plan().to_bytes()))
    sink = pa.BufferOutputStream()
    pq.write_table(table.drop_columns(["sid"]), sink)
    return sink.getvalue().to_pybytes()


BROKEN_FOOTER = b"PAR1" + b"\xff" * 60 + (40).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not parquet",
        other_parquet(),
        pytest.param(retyped_plan(), id="columns"),
        pytest.param(BROKEN_FOOTER, id="footer"),
    ],
)
def test_a_damaged_plan_is_a_configuration_error(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"plan/0000\.parquet: not written by gc2ray, or damaged"):
        Plan.from_bytes(data)
