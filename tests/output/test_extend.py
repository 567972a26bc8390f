"""Plans that grow: files that are new are planned once, by whichever driver comes first."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.config.job import Job
from gc2ray.core.errors import ConfigError
from gc2ray.core.shards import Shards, SourceFile, bytes_digest, cut_shards
from gc2ray.data.store import Store
from gc2ray.output.plan import PLAN_NAME, Plan, plan_name
from gc2ray.output.planner import extend_plan, store_plan, stored_plan
from gc2ray.output.run_directory import frozen_plan, stored_run
from gc2ray.output.verify import verify
from tests.support.outputs import FILES, KEPT_COLUMNS, RECIPE, first_plan, write_round

NEW = (SourceFile("e.parquet", "fe", (4,)), SourceFile("f.parquet", "ff", (0,)))


@pytest.fixture
def output(tmp_path: Path) -> Store:
    return write_round(tmp_path, 0, first_plan())


def job_of(store: Store, **cluster: object) -> Job:
    return Job(output=store.uri, recipe=RECIPE, cluster=cluster)


def extended(store: Store, files: tuple[SourceFile, ...], **cluster: object) -> Plan:
    job = job_of(store, **cluster)
    plan = stored_plan(store, job)
    assert plan is not None
    return extend_plan(store, job, plan, files, KEPT_COLUMNS)


def test_new_files_get_shards_after_the_old_ones(output: Store) -> None:
    before = first_plan().shards
    plan = extended(output, (*NEW, *FILES))
    assert plan.shards[: len(before)] == tuple(before)
    added = plan.shards[len(before) :]
    assert [shard.index for shard in added] == [len(before), len(before) + 1]
    assert sum(shard.rows for shard in added) == 4
    assert {span.source for shard in added for span in shard.spans} == {"e.parquet"}
    assert stored_plan(output, job_of(output)) == plan
    (missing,) = verify(output.uri, deep=True).problems
    assert missing == "shards 7 to 8 (4 rows): not answered yet; run again"


def test_a_plan_without_new_files_stays_as_it_is(output: Store) -> None:
    assert extended(output, FILES) == first_plan()
    extended(output, (*FILES, *NEW))
    assert len(extended(output, FILES[:1]).shards) == 9, "files that are gone stay planned"
    extended(output, (*FILES, *NEW))
    assert output.names("plan") == [PLAN_NAME, plan_name(1)]


def test_a_plan_is_extended_repeatedly(output: Store) -> None:
    files = list(FILES)
    for number in range(5):
        files.append(SourceFile(f"n{number}.parquet", f"f{number}", (5, 1)))
        plan = extended(output, tuple(files), shard_rows=2)
    assert plan.rows == 17 + 5 * 6
    assert [shard.index for shard in plan.shards] == list(range(7 + 5 * 4))
    assert len({shard.sid for shard in plan.shards}) == len(plan.shards)
    run = stored_run(output)
    assert run is not None
    assert frozen_plan(output, run) == plan


def test_a_changed_file_is_refused_and_nothing_is_stored(output: Store) -> None:
    changed = SourceFile("a.parquet", "another", (5, 5))
    with pytest.raises(ConfigError, match=r"--extend: a\.parquet changed since it was planned"):
        extended(output, (changed, FILES[1], *NEW))
    assert output.names("plan") == [PLAN_NAME]


def test_other_kept_columns_are_refused_and_nothing_is_stored(output: Store) -> None:
    job = job_of(output)
    kept_columns = pa.schema([pa.field("id", pa.string())])
    with pytest.raises(
        ConfigError, match=r"keep: .* are id string, those of planned files id int64"
    ):
        extend_plan(output, job, first_plan(), (*FILES, *NEW), kept_columns)
    assert output.names("plan") == [PLAN_NAME]


def test_two_drivers_extend_it_once(output: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one comes between the look and the write, and knows a file more."""
    more = SourceFile("g.parquet", "fg", (3,))
    create, done = Store.create, []

    def late(store: Store, name: str, data: bytes) -> bool:
        if not done:
            done.append(name)
            extended(store, (*FILES, NEW[0]))
        return create(store, name, data)

    monkeypatch.setattr(Store, "create", late)
    plan = extended(output, (*FILES, *NEW, more))
    assert output.names("plan") == [PLAN_NAME, plan_name(1), plan_name(2)]
    planned = [source for source, _ in plan.shards.files]
    assert sorted(planned) == ["a.parquet", "d/b.parquet", "e.parquet", "g.parquet"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("plan/0002.parquet", None, "does not extend plan/0000.parquet"),
        ("plan/0001.parquet", b"nothing", "does not extend plan/0000.parquet"),
        ("plan/0001.parquet", first_plan().to_bytes("a" * 64), "does not extend plan/0000.parquet"),
        ("plan/0001.parquet", first_plan().to_bytes(), "does not extend plan/0000.parquet"),
    ],
)
def test_an_extension_that_does_not_follow_is_damage(
    output: Store, name: str, data: bytes | None, message: str
) -> None:
    if data is None:
        extended(output, (*FILES, *NEW))
        data = output.read(plan_name(1)) or b""
        (Path(output.uri) / plan_name(1)).unlink()
    output.create(name, data)
    (problem,) = verify(output.uri).problems
    assert problem.startswith(f"{name}: ")
    assert message in problem
    with pytest.raises(ConfigError, match=message):
        stored_plan(output, job_of(output))


def test_an_extension_of_another_recipe_is_damage(output: Store) -> None:
    plan = first_plan()
    other = Plan("another", plan.shards, plan.kept_columns)
    output.create(plan_name(1), other.to_bytes(bytes_digest(output.read(PLAN_NAME) or b"")))
    (problem,) = verify(output.uri).problems
    assert problem == "plan/0001.parquet: an extension of the plan is of another recipe"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=4), st.integers(1, 5))
def test_columns_join_as_objects_do(groups: list[list[int]], shard_rows: int) -> None:
    """Any pieces put together are the shards of all of them, numbered on."""
    whole, expected = Shards.from_shards([]), []
    for number, rows in enumerate(groups):
        file = SourceFile(f"{number}.parquet", "f", tuple(rows))
        piece = Shards.from_shards(cut_shards([file], shard_rows, "r"))
        whole = whole.followed_by(piece)
        expected += list(piece)
    assert [(shard.sid, shard.spans, shard.continues) for shard in whole] == [
        (shard.sid, shard.spans, shard.continues) for shard in expected
    ]
    assert [shard.index for shard in whole] == list(range(len(expected)))


def test_a_start_that_died_before_run_json_is_not_extended(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert stored_plan(store, job_of(store)) is None
    assert store_plan(store, job_of(store), first_plan()) == first_plan()
