"""Answer rows: one schema for all of them, and what each row says."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.errors import Status
from gc2ray.core.records import ANSWER_COLUMNS, Answer, Demand, Request
from gc2ray.core.schema import (
    SCHEMA_VERSION,
    UNWRITTEN_STATS,
    Provenance,
    answer_schema,
    answer_table,
    stats_of,
    table_stats,
)
from gc2ray.core.stats import STAGES, RunStats
from tests.support.rows import request

PROVENANCE = Provenance(attempt=2, retry_round=0, worker="w1")
KEPT_COLUMNS = pa.schema([("id", pa.int64()), ("tags", pa.list_(pa.string()))])
COLUMNS = [
    "row_key", "source", "row", "prompt_index", "answer", "status", "error", "finish_reason",
    "prompt_tokens", "output_tokens", "visual_tokens_full", "visual_tokens_kept", "newline_tokens",
    "newline_tokens_full", "kept_per_view", "method", "retention_requested", "retention_actual",
    "kv_bytes", "kv_bytes_full", "image_ns", "encode_ns", "compress_ns", "prefill_ns",
    "generate_ns", "oom_splits", "attempt", "retry_round", "device", "worker", "audit", "kept_mask",
]  # fmt: skip
UNMEASURED = [
    "answer", "finish_reason", "prompt_tokens", "output_tokens", "visual_tokens_full",
    "visual_tokens_kept", "newline_tokens", "newline_tokens_full", "kept_per_view",
    "retention_actual", "kv_bytes", "kv_bytes_full", "audit", "kept_mask",
]  # fmt: skip


def row(number: int) -> Request:
    return replace(request(seed=number), kept_columns={"id": number, "tags": ["a", f"b{number}"]})


def answered(number: int) -> Answer:
    return Answer(
        request=row(number),
        status=Status.OK,
        method="globalcom2",
        retention_requested=0.25,
        answer=f"Answer {number}",
        finish_reason="stop",
        prompt_tokens=40,
        output_tokens=3,
        visual_tokens_full=80,
        visual_tokens_kept=20,
        newline_tokens=5,
        newline_tokens_full=12,
        kept_per_view=((9, 11), (), (number,)),
        kv_bytes=430,
        kv_bytes_full=1000,
        stage_ns=dict.fromkeys(STAGES, 10**number),
        device="cpu",
        images_encoded=1,
        full_per_view=((30, 40), (), (10,)),
        demand=Demand({"encode": 7, "prefill": 10**number}, 50),
        demand_full=Demand({"encode": 7, "prefill": 3 * 10**number}, 90),
    )


def failed(number: int) -> Answer:
    return Answer(row(number), Status.BAD_IMAGE, "globalcom2", 0.25, error="not an image")


def table(*answers: Answer) -> pa.Table:
    return answer_table(answers, KEPT_COLUMNS, PROVENANCE)


def test_every_documented_column_is_there() -> None:
    assert tuple(COLUMNS) == ANSWER_COLUMNS
    assert table(answered(1)).column_names == ["id", "tags", *COLUMNS]


def test_schema_does_not_depend_on_what_happened() -> None:
    good, bad = table(answered(1), answered(2)), table(failed(1))
    assert good.schema.equals(bad.schema, check_metadata=True)
    assert good.schema.equals(answer_schema(KEPT_COLUMNS), check_metadata=True)
    assert table().schema.equals(good.schema, check_metadata=True)


def test_schema_metadata() -> None:
    metadata = answer_schema(KEPT_COLUMNS, {"gc2ray.sid": "x"}).metadata
    assert metadata == {
        b"gc2ray.schema_version": str(SCHEMA_VERSION).encode(),
        b"gc2ray.sid": b"x",
    }


def test_an_answered_row() -> None:
    (record,) = table(answered(3)).to_pylist()
    assert record == {
        "id": 3, "tags": ["a", "b3"],
        "row_key": "rows.parquet#3", "source": "rows.parquet", "row": 3, "prompt_index": 0,
        "answer": "Answer 3", "status": "ok", "error": None, "finish_reason": "stop",
        "prompt_tokens": 40, "output_tokens": 3, "visual_tokens_full": 80,
        "visual_tokens_kept": 20, "newline_tokens": 5, "newline_tokens_full": 12,
        "kept_per_view": [[9, 11], [], [3]], "method": "globalcom2",
        "retention_requested": 0.25, "retention_actual": 0.25, "kv_bytes": 430,
        "kv_bytes_full": 1000, "image_ns": 1000, "encode_ns": 1000, "compress_ns": 1000,
        "prefill_ns": 1000, "generate_ns": 1000, "oom_splits": 0, "attempt": 2, "retry_round": 0,
        "device": "cpu", "worker": "w1", "audit": None, "kept_mask": None,
    }  # fmt: skip


def test_the_prompt_index_is_written() -> None:
    answers = [replace(answered(1), request=replace(row(1), prompt_index=i)) for i in (0, 3)]
    assert table(*answers)["prompt_index"].to_pylist() == [0, 3]


def test_a_failed_row_has_nulls_where_nothing_was_measured() -> None:
    (record,) = table(failed(4)).to_pylist()
    assert {name for name, value in record.items() if value is None} == set(UNMEASURED)
    assert (record["status"], record["error"], record["id"]) == ("bad_image", "not an image", 4)
    assert [record[f"{stage}_ns"] for stage in STAGES] == [0] * 5


def test_kept_per_view_is_a_list_per_image() -> None:
    kind = table(answered(1)).schema.field("kept_per_view").type
    assert kind == pa.list_(pa.list_(pa.int32()))


def test_rows_keep_their_order() -> None:
    numbers = [5, 1, 4, 2]
    assert table(*map(answered, numbers)).column("row").to_pylist() == numbers


def test_a_kept_value_may_be_null() -> None:
    bare = replace(failed(1), request=replace(row(1), kept_columns={"id": None}))
    (record,) = table(bare).to_pylist()
    assert (record["id"], record["tags"]) == (None, None)


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([[[1], None], None, [None]], pa.list_(pa.list_(pa.int8()))),
        pa.array([[("k", None)], None, []], pa.map_(pa.string(), pa.list_(pa.int8()))),
        pa.array([{"a": None}, None, {"a": [None]}], pa.struct([("a", pa.list_(pa.int8()))])),
    ],
    ids=lambda cells: str(cells.type),
)
def test_nulls_within_kept_values_are_written(cells: pa.Array) -> None:
    kept = [{"x": cell} if cell.is_valid else {} for cell in cells]
    answers = [replace(failed(1), request=replace(row(1), kept_columns=found)) for found in kept]
    column = answer_table(answers, pa.schema([("x", cells.type)]), PROVENANCE)["x"]
    assert column.combine_chunks().equals(cells)


def test_kept_values_of_another_type_are_cast_or_refused() -> None:
    """Exactly: what does not fit is no answer that looks right."""
    cells = [pa.scalar(1, pa.int8()), None, 2, pa.scalar("3"), pa.scalar(4, pa.int64())]
    answers = [replace(failed(1), request=replace(row(1), kept_columns={"x": c})) for c in cells]
    schema = pa.schema([("x", pa.int32())])
    assert answer_table(answers, schema, PROVENANCE)["x"].to_pylist() == [1, None, 2, 3, 4]
    large = replace(failed(1), request=replace(row(1), kept_columns={"x": pa.scalar(2**40)}))
    with pytest.raises(pa.ArrowInvalid):
        answer_table([large], schema, PROVENANCE)


@pytest.mark.parametrize("rows", [[failed(1), failed(2)], [answered(1), failed(2)]])
def test_datasets_reads_the_parts(
    tmp_path: Path, rows: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of failures only, beside one of answers: the dataset has one schema."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    pq.write_table(table(*rows), tmp_path / "part-0.parquet")
    pq.write_table(table(answered(3)), tmp_path / "part-1.parquet")
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded.column_names == ["id", "tags", *COLUMNS]
    assert loaded["row"] == [1, 2, 3]
    assert loaded[0]["kept_per_view"] == (rows[0].kept_per_view and [[9, 11], [], [1]])
    assert loaded[2]["kept_per_view"] == [[9, 11], [], [3]]


def test_seed_depends_on_the_row_key_only() -> None:
    a = row(1)
    assert replace(a, prompts=("other",), images=(), row=9, source="x").seed == a.seed
    assert replace(a, row_key="rows.parquet#2").seed != a.seed
    assert 0 <= a.seed < 2**63
    assert len({replace(a, row_key=f"a#{number}").seed for number in range(1000)}) == 1000


def test_seed_is_the_same_everywhere() -> None:
    """A number from another process, so that a salted hash would show."""
    assert replace(row(0), row_key="a.parquet#0").seed == 51915358222950673


def test_retention_actual() -> None:
    assert answered(1).retention_actual == 0.25
    assert replace(answered(1), visual_tokens_kept=0).retention_actual == 0.0
    assert replace(answered(1), visual_tokens_full=0).retention_actual is None
    assert failed(1).retention_actual is None


def test_stats_of_rows_add_up() -> None:
    total = stats_of([answered(0), answered(1), failed(2)])
    assert total == RunStats(
        rows=3,
        by_status={"ok": 2, "bad_image": 1},
        visual_tokens_full=160,
        visual_tokens_kept=40,
        newline_tokens_full=24,
        newline_tokens=10,
        prompt_tokens=80,
        output_tokens=6,
        kv_bytes=860,
        kv_bytes_full=2000,
        view_tokens_full={"0": 80, "1": 80},
        view_tokens_kept={"0": 19, "1": 22},
        images=2,
        flops={"encode": 14, "prefill": 11},
        flops_full={"encode": 14, "prefill": 33},
        cache_read_bytes=100,
        cache_read_bytes_full=180,
        stage_ns=dict.fromkeys(STAGES, 11),
        retention={"04": 2},
        slowest=((50, "rows.parquet#1"), (5, "rows.parquet#0"), (0, "rows.parquet#2")),
        largest=((430, "rows.parquet#0"), (430, "rows.parquet#1"), (0, "rows.parquet#2")),
    )


COUNTS = st.one_of(st.none(), st.integers(0, 50))
ANSWERS = st.builds(
    Answer,
    request=st.integers(0, 99).map(row),
    status=st.sampled_from(list(Status)),
    method=st.just("none"),
    retention_requested=st.just(0.5),
    prompt_tokens=COUNTS,
    output_tokens=COUNTS,
    visual_tokens_full=COUNTS,
    visual_tokens_kept=COUNTS,
    newline_tokens=COUNTS,
    newline_tokens_full=COUNTS,
    kv_bytes=st.one_of(st.none(), st.integers(0, 2**50)),
    kv_bytes_full=COUNTS,
    stage_ns=st.dictionaries(st.sampled_from(STAGES), st.integers(0, 2**50)),
    kept_per_view=st.one_of(st.none(), st.tuples(st.lists(st.integers(0, 50), max_size=3))),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(ANSWERS, min_size=1, max_size=30))
def test_statistics_of_columns_are_those_of_the_rows(answers: list[Answer]) -> None:
    """Those that are written; whatever was not measured counts nothing."""
    statistics = table_stats(answer_table(answers, KEPT_COLUMNS, PROVENANCE))
    assert statistics == stats_of(answers)


def test_an_image_that_was_shared_is_counted_once() -> None:
    answers = [answered(1), replace(answered(2), images_encoded=0, images_shared=1), failed(3)]
    assert (stats_of(answers).images, stats_of(answers).images_shared) == (1, 1)


def test_only_unwritten_statistics_are_left_out() -> None:
    answer = replace(answered(3), images_encoded=0, images_shared=1, prompt_tokens_shared=2)
    statistics = table_stats(answer_table([answer], KEPT_COLUMNS, PROVENANCE))
    assert {
        item.name
        for item in fields(RunStats)
        if getattr(statistics, item.name) != getattr(stats_of([answer]), item.name)
    } <= UNWRITTEN_STATS


def test_retention_buckets_sort_as_text() -> None:
    kept = [replace(answered(1), visual_tokens_kept=count) for count in (1, 40, 80)]
    assert [*map(list, (stats_of([a]).retention for a in kept))] == [["00"], ["09"], ["19"]]
    assert all(re.fullmatch(r"\d\d", key) for a in kept for key in stats_of([a]).retention)
