"""The plan: every row once, the same every time, and back from its files unchanged."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.errors import ConfigError
from gc2ray.manifest import Plan, Run, Shard, SourceFile, Span, cut_shards, digest, row_key
from tests.rows import make_recipe

RECIPE = make_recipe("model")
CARRIED = pa.schema([("id", pa.int64()), ("tags", pa.list_(pa.struct([("a", pa.string())])))])


def a_file(groups: list[int], name: str = "a.parquet") -> SourceFile:
    return SourceFile(name, f"size:{sum(groups)}", tuple(groups))


def some_files(max_group: int = 40) -> st.SearchStrategy[list[SourceFile]]:
    groups = st.lists(st.integers(0, max_group), max_size=6)
    return st.lists(groups, max_size=5).map(
        lambda files: [a_file(groups, f"d/{i}.parquet") for i, groups in enumerate(files)]
    )


def places(shards: tuple[Shard, ...]) -> list[tuple[str, int]]:
    return [place for shard in shards for place in shard.places()]


def a_plan(shard_rows: int = 7) -> Plan:
    files = [a_file([5, 5, 5]), a_file([3], "b.parquet"), a_file([30], "ü/c.parquet")]
    return Plan(RECIPE.fingerprint(), cut_shards(files, shard_rows, RECIPE), CARRIED)


@settings(deadline=None)
@given(some_files(), st.integers(1, 50))
def test_every_row_is_planned_once_and_in_order(files: list[SourceFile], shard_rows: int) -> None:
    shards = cut_shards(files, shard_rows, RECIPE)
    assert places(shards) == [(file.source, row) for file in files for row in range(file.rows)]
    assert [len(list(shard.places())) for shard in shards] == [shard.rows for shard in shards]
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert len({shard.sid for shard in shards}) == len(shards)
    assert all(0 < shard.rows <= shard_rows for shard in shards)
    assert all(span.rows > 0 for shard in shards for span in shard.spans)


def test_a_row_key_names_the_prompt_of_a_list_only() -> None:
    assert row_key("s/a.parquet", 3) == "s/a.parquet#3"
    assert row_key("s/a.parquet", 3, 0) == "s/a.parquet#3#0"


@settings(deadline=None)
@given(some_files(max_group=10), st.integers(10, 50))
def test_small_row_groups_are_not_cut(files: list[SourceFile], shard_rows: int) -> None:
    borders = {
        (file.source, sum(file.groups[:count]))
        for file in files
        for count in range(len(file.groups) + 1)
    }
    for shard in cut_shards(files, shard_rows, RECIPE):
        for span in shard.spans:
            assert {(span.source, span.first), (span.source, span.stop)} <= borders


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 50))
def test_a_large_row_group_is_cut_evenly(rows: int, shard_rows: int) -> None:
    sizes = [shard.rows for shard in cut_shards([a_file([rows])], shard_rows, RECIPE)]
    assert len(sizes) == -(-rows // shard_rows)
    assert max(sizes) - min(sizes) <= 1


def test_neighbours_in_a_file_are_one_span() -> None:
    (shard,) = cut_shards([a_file([2, 0, 3]), a_file([4], "b.parquet")], 9, RECIPE)
    assert shard.spans == (Span("a.parquet", "size:5", 0, 5), Span("b.parquet", "size:4", 0, 4))
    assert shard.part_name == f"data/part-0000000-{shard.sid}.parquet"


def test_no_rows_make_no_shards() -> None:
    assert cut_shards([], 10, RECIPE) == ()
    assert cut_shards([a_file([0, 0]), a_file([], "b.parquet")], 10, RECIPE) == ()


def test_sids_are_a_function_of_recipe_and_input() -> None:
    files = [a_file([5, 5, 5]), a_file([3], "b.parquet")]

    def sids(files: list[SourceFile] = files, rows: int = 5, recipe=RECIPE) -> list[str]:
        return [shard.sid for shard in cut_shards(files, rows, recipe)]

    assert sids() == sids(recipe=make_recipe("model"))
    other_recipe = sids(recipe=make_recipe("model", compression__retention=0.5))
    changed_file = sids([replace(files[0], fingerprint="changed"), files[1]])
    renamed = sids([replace(files[0], source="z.parquet"), files[1]])
    assert not {*sids()} & {*other_recipe}
    assert [a == b for a, b in zip(sids(), changed_file, strict=True)] == [False] * 3 + [True]
    assert [a == b for a, b in zip(sids(), renamed, strict=True)] == [False] * 3 + [True]
    assert not {*sids()} & {*sids(rows=20)}


def test_a_sid_is_a_digest_of_recipe_and_spans() -> None:
    """Spelled out, so that a change of it, which orphans committed parts, is noticed."""
    (shard,) = cut_shards([a_file([3])], 5, RECIPE)
    identity = [RECIPE.fingerprint(), {"source": "a.parquet", "fingerprint": "size:3"}]
    identity[1] |= {"first": 0, "stop": 3}
    assert shard.sid == digest(json.dumps(identity).encode())[:16]
    assert len(shard.sid) == 16


@pytest.mark.parametrize("shard_rows", [1, 7, 1000])
def test_a_plan_survives_its_file(shard_rows: int) -> None:
    plan = a_plan(shard_rows)
    again = Plan.from_bytes(plan.to_bytes())
    assert again == plan
    assert again.carried.equals(CARRIED)
    assert again.rows == 48
    assert again.to_bytes() == plan.to_bytes()


def test_an_empty_plan_survives_its_file() -> None:
    plan = Plan("f", (), pa.schema([]))
    assert Plan.from_bytes(plan.to_bytes()) == plan


def test_a_plan_of_more_than_ten_shards_keeps_their_order() -> None:
    plan = a_plan(1)
    indices = [shard.index for shard in Plan.from_bytes(plan.to_bytes()).shards]
    assert indices == list(range(48))


def test_a_run_survives_its_file() -> None:
    plan = a_plan()
    run = Run.of(RECIPE, plan, plan.to_bytes())
    assert Run.from_bytes(run.to_bytes()) == run
    assert (run.shards, run.rows) == (len(plan.shards), 48)
    assert run.plan_digest == digest(plan.to_bytes())
    assert {"gc2ray", "python", "torch", "transformers", "ray"} <= set(run.versions)


def test_a_run_says_its_recipe_to_people() -> None:
    content = json.loads(Run.of(RECIPE, a_plan(), b"").to_bytes())
    assert content["recipe"]["compression"]["retention"] == 0.25
    assert content["recipe_fingerprint"] == RECIPE.fingerprint()
    assert content["plan"] == {"file": "plan/0000.parquet", "sha256": digest(b"")}


def test_another_recipe_is_refused_with_every_difference() -> None:
    run = Run.of(RECIPE, a_plan(), b"")
    run.check(make_recipe("model"))
    other = make_recipe("model", compression__retention=0.5, generation__seed=3)
    with pytest.raises(ConfigError) as caught:
        run.check(other)
    assert str(caught.value).splitlines()[1:] == [
        "  recipe.compression.retention: 0.25 (stored) -> 0.5 (yours)",
        "  recipe.generation.seed: 0 (stored) -> 3 (yours)",
    ]


def damaged(**changes: object) -> bytes:
    content = json.loads(Run.of(RECIPE, a_plan(), b"").to_bytes())
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


def test_another_format_is_named() -> None:
    with pytest.raises(ConfigError, match=r"run\.json: format 99, this reads 1"):
        Run.from_bytes(damaged(format=99))


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
