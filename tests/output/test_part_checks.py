"""Every damage to a part is seen: by its footer, or by a deep check of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gc2ray.core.config.job import Job
from gc2ray.core.errors import Status
from gc2ray.core.shards import SourceFile
from gc2ray.core.stats import RunStats
from gc2ray.output.parts import commit_part
from gc2ray.output.planner import store_plan
from gc2ray.output.run_directory import round_store
from tests.support.damage import PLAN, SECOND, found, second
from tests.support.outputs import (
    KEPT_COLUMNS,
    RECIPE,
    an_answer,
    first_plan,
    flip_a_bit,
    part_of,
    rewrite,
    with_column,
    with_footer,
    write_round,
)


def a_truncated_part(output: Path) -> str:
    second(output).write_bytes(second(output).read_bytes()[:-30])
    return f"{SECOND.part_name}: not a part that gc2ray wrote, or incomplete"


def an_empty_part(output: Path) -> str:
    second(output).write_bytes(b"")
    return f"{SECOND.part_name}: not a part that gc2ray wrote, or incomplete"


def garbage(output: Path) -> str:
    second(output).write_bytes(b"garbage" * 100)
    return f"{SECOND.part_name}: not a part that gc2ray wrote, or incomplete"


def a_part_of_another_shard(output: Path) -> str:
    third = PLAN.shards[2]
    second(output).write_bytes((output / third.part_name).read_bytes())
    return f"{SECOND.part_name}: its footer is of shard {third.sid}"


def another_recipe(output: Path) -> str:
    with_footer(second(output), {b"gc2ray.run": b"feed"})
    return f"{SECOND.part_name}: answers another recipe, feed"


def too_few_rows_by_the_footer(output: Path) -> str:
    with_footer(second(output), {b"gc2ray.rows": b"2"})
    return f"{SECOND.part_name}: answers 2 rows, planned are 3"


def fewer_answers_than_the_footer_says(output: Path) -> str:
    rewrite(second(output), lambda table: table.slice(1))
    return f"{SECOND.part_name}: not a part that gc2ray wrote, or incomplete"


def another_type(output: Path) -> str:
    at = KEPT_COLUMNS.get_field_index("id")
    item = pa.field("id", pa.int32())
    rewrite(second(output), lambda table: table.set_column(at, item, table["id"].cast(pa.int32())))
    return f"{SECOND.part_name}: its schema is another: 'id' int32, planned is 'id' int64"


def a_column_that_may_be_null(output: Path) -> str:
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index("status")
        return table.set_column(at, pa.field("status", pa.string()), table["status"])

    rewrite(second(output), change)
    return (
        f"{SECOND.part_name}: its schema is another: 'status' string, "
        "planned is 'status' string not null"
    )


def a_lost_column(output: Path) -> str:
    rewrite(second(output), lambda table: table.drop_columns(["answer"]))
    return f"{SECOND.part_name}: its schema is another: no column 'answer'"


def a_new_column(output: Path) -> str:
    rewrite(second(output), lambda table: table.append_column("new", pa.array([1, 2, 3])))
    return f"{SECOND.part_name}: its schema is another: column 'new' was not planned"


def another_order_of_columns(output: Path) -> str:
    rewrite(second(output), lambda table: table.select(table.column_names[::-1]))
    return f"{SECOND.part_name}: its schema is another: the columns' order"


DAMAGED = [
    a_truncated_part, an_empty_part, garbage, a_part_of_another_shard, another_recipe,
    too_few_rows_by_the_footer, fewer_answers_than_the_footer_says, another_type,
    a_column_that_may_be_null, a_lost_column, a_new_column, another_order_of_columns,
]  # fmt: skip


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_part_is_found_by_its_footer(
    output: Path, damage: Callable[[Path], str], *, deep: bool
) -> None:
    line = damage(output)
    assert found(output, deep=deep) == (f"{line}; move it away, and run again",)


def doubled(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 2), table.slice(1)])


def more(stats: RunStats) -> RunStats:
    return replace(stats, rows=stats.rows + 1)


def fewer(stats: RunStats) -> RunStats:
    return replace(stats, rows=stats.rows - 1)


SOURCE = SECOND.spans[0].source
FIRST = SECOND.spans[0].first  # of rows 2, 3, 4
ROWS = {
    "doubled": (doubled, more, f"answers {SOURCE}#3 after {SOURCE}#3, which is not planned so"),
    "added": (
        lambda table: pa.concat_tables([table, table.slice(2)]),
        more,
        f"answers {SOURCE}#4 after {SOURCE}#4, which is not planned so",
    ),
    "first dropped": (
        lambda table: table.slice(1),
        fewer,
        f"answers {SOURCE}#3 at its beginning, which is not planned so",
    ),
    "middle dropped": (
        lambda table: table.take([0, 2]),
        fewer,
        f"answers {SOURCE}#4 after {SOURCE}#2, which is not planned so",
    ),
    "last dropped": (lambda table: table.slice(0, 2), fewer, f"no answer to {SOURCE}#4"),
    "swapped": (
        lambda table: table.take([0, 2, 1]),
        lambda stats: stats,
        f"answers {SOURCE}#4 after {SOURCE}#2, which is not planned so",
    ),
    "of another source": (
        lambda table: with_column(table, "source", [SOURCE, "x.parquet", SOURCE]),
        lambda stats: stats,
        f"answers {SOURCE}#3 after {SOURCE}#2, which is not planned so",
    ),
    "another prompt": (
        lambda table: with_column(table, "prompt_index", [0, 2, 0]),
        lambda stats: stats,
        f"answers {SOURCE}#3 after {SOURCE}#2, which is not planned so",
    ),
    "another key": (
        lambda table: with_column(table, "row_key", [f"{SOURCE}#2", f"{SOURCE}#2", f"{SOURCE}#4"]),
        lambda stats: stats,
        f"{SOURCE}#3 has the row_key {SOURCE}#2",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_unlike_the_plan_is_found_by_a_deep_check(output: Path, kind: str) -> None:
    """Footers that were changed with them, so that they agree: only the rows tell."""
    assert (SOURCE, FIRST, SECOND.rows) == ("a.parquet", 2, 3)
    change, stats, what = ROWS[kind]
    rewrite(second(output), change, stats)
    assert found(output, deep=False) == ()
    line = f"{SECOND.part_name}: {what}; move it away, and run again"
    assert found(output, deep=True)[0] == line


PROMPTS = {
    "middle dropped": ([0, 2, 3], "answers a.parquet#0#2 after a.parquet#0#0"),
    "first dropped": ([1, 2, 3], "answers a.parquet#0#1 at its beginning"),
    "swapped": ([0, 2, 1, 3], "answers a.parquet#0#2 after a.parquet#0#0"),
    "doubled": ([0, 1, 1, 2, 3], "answers a.parquet#0#1 after a.parquet#0#1"),
    "row doubled": ([0, 1, 2, 0, 1, 2, 3], "answers a.parquet#0#0 after a.parquet#0#2"),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_unlike_the_plan_is_found_by_a_deep_check(tmp_path: Path, kind: str) -> None:
    """Row 0 has three prompts, row 1 has one."""
    plan = first_plan([SourceFile("a.parquet", "fa", (2, 2))], 2)

    def outcome(source: str, row: int) -> list[Status]:
        return [Status.OK] * (1 if row else 3)

    write_round(tmp_path, 0, plan, outcome, listed=True)
    order, what = PROMPTS[kind]
    part = tmp_path / plan.shards[0].part_name
    rewrite(part, lambda table: table.take(order), lambda stats: replace(stats, rows=len(order)))
    assert found(tmp_path, deep=False) == ()
    name = plan.shards[0].part_name
    assert found(tmp_path, deep=True)[0] == (
        f"{name}: {what}, which is not planned so; move it away, and run again"
    )


@pytest.mark.parametrize("shard_rows", [4, 20])
def test_files_with_lists_and_without_are_good_in_one_part(tmp_path: Path, shard_rows: int) -> None:
    """Each source by itself: its keys all name a prompt, or none does."""
    listed = {"d/b.parquet"}
    store = round_store(str(tmp_path), 0)
    plan = store_plan(
        store, Job(output=store.uri, recipe=RECIPE), first_plan(shard_rows=shard_rows)
    )
    for shard in plan.shards:
        answers = [
            an_answer(source, row, prompt, Status.OK)
            for source, row in shard.row_ids()
            for prompt in (range(1 + row % 2) if source in listed else [None])
        ]
        commit_part(store, shard, part_of(shard, answers), "token")
    assert found(tmp_path, deep=True) == ()
    part = tmp_path / plan.shards[-1].part_name
    keys = pq.read_table(part)["row_key"].to_pylist()
    plain = [key.removesuffix("#0") if key.startswith("d/b.parquet#5") else key for key in keys]
    rewrite(part, lambda table: with_column(table, "row_key", plain))
    (problem,) = found(tmp_path, deep=True)
    assert "d/b.parquet#5#0 has the row_key d/b.parquet#5" in problem


VALUES = {
    "status": (["ok", "good", "ok"], "has answers of status 'good'"),
    "retry_round": ([0, 1, 0], "has answers of retry_round 1"),
    "worker": (["w", "w", "other"], "has answers of worker 'other'"),
    "prompt_tokens": ([42, 44, 44], "prompt_tokens is 129 by its footer, 130 by its rows"),
    "output_tokens": ([3, 3, None], "output_tokens is 9 by its footer, 6 by its rows"),
    "kv_bytes_full": ([2000, 2000, 1], "kv_bytes_full is 6000 by its footer, 4001 by its rows"),
    "newline_tokens": ([2, 2, 1], "newline_tokens is 6 by its footer, 5 by its rows"),
}


@pytest.mark.parametrize("column", VALUES)
def test_an_edited_value_is_found_by_a_deep_check(output: Path, column: str) -> None:
    values, what = VALUES[column]
    rewrite(second(output), lambda table: with_column(table, column, values))
    assert found(output, deep=False) == ()
    line = f"{SECOND.part_name}: {what}; move it away, and run again"
    assert found(output, deep=True)[0] == line


def test_an_edited_statistic_is_found_by_a_deep_check(output: Path) -> None:
    """What rows do not tell, such as peaks, may be anything."""
    stats = RunStats(images_shared=3, input_starved_ns=8, oom_splits=1, peak_device_bytes=4)
    rewrite(second(output), lambda table: table, lambda own: own + stats)
    assert found(output, deep=True) == ()
    rewrite(second(output), lambda table: table, lambda own: own + RunStats(stage_ns={"image": 1}))
    (line,) = found(output, deep=True)
    assert line.startswith(f"{SECOND.part_name}: stage_ns is {{'compress': ")


def test_a_flipped_bit_is_found_by_a_deep_check(output: Path) -> None:
    flip_a_bit(second(output))
    assert found(output, deep=False) == ()
    (line,) = found(output, deep=True)
    assert line.startswith(f"{SECOND.part_name}: cannot be read: ")
