"""Shards: every row once, the same every time, cut where reading is cheap, held in few bytes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.shards import (
    Shard,
    Shards,
    SourceFile,
    Span,
    bytes_digest,
    cut_shards,
    cut_spans,
    first_spans,
    row_key,
)

FINGERPRINT = "recipe"


def a_file(groups: list[int], name: str = "a.parquet") -> SourceFile:
    return SourceFile(name, f"size:{sum(groups)}", tuple(groups))


def some_files(max_group: int = 40) -> st.SearchStrategy[list[SourceFile]]:
    groups = st.lists(st.integers(0, max_group), max_size=6)
    return st.lists(groups, max_size=5).map(
        lambda files: [a_file(groups, f"d/{i}.parquet") for i, groups in enumerate(files)]
    )


def rows_of(shards: Sequence[Shard]) -> list[tuple[str, int]]:
    return [place for shard in shards for place in shard.row_ids()]


@settings(deadline=None)
@given(some_files(), st.integers(1, 50))
def test_every_row_is_planned_once_and_in_order(files: list[SourceFile], shard_rows: int) -> None:
    shards = tuple(cut_shards(files, shard_rows, FINGERPRINT))
    assert rows_of(shards) == [(file.source, row) for file in files for row in range(file.rows)]
    assert [len(list(shard.row_ids())) for shard in shards] == [shard.rows for shard in shards]
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
    for shard in tuple(cut_shards(files, shard_rows, FINGERPRINT)):
        for span in shard.spans:
            assert {(span.source, span.first), (span.source, span.stop)} <= borders


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 50))
def test_a_large_row_group_is_cut_evenly(rows: int, shard_rows: int) -> None:
    sizes = [shard.rows for shard in cut_shards([a_file([rows])], shard_rows, FINGERPRINT)]
    assert len(sizes) == -(-rows // shard_rows)
    assert max(sizes) - min(sizes) <= 1


def test_neighbours_in_a_file_are_one_span() -> None:
    (shard,) = cut_shards([a_file([2, 0, 3]), a_file([4], "b.parquet")], 9, FINGERPRINT)
    assert shard.spans == (Span("a.parquet", "size:5", 0, 5), Span("b.parquet", "size:4", 0, 4))
    assert shard.part_name == f"data/part-0000000-{shard.sid}.parquet"


def test_no_rows_make_no_shards() -> None:
    assert list(cut_shards([], 10, FINGERPRINT)) == []
    assert list(cut_shards([a_file([0, 0]), a_file([], "b.parquet")], 10, FINGERPRINT)) == []


def test_sids_are_a_function_of_recipe_and_input() -> None:
    files = [a_file([5, 5, 5]), a_file([3], "b.parquet")]

    def sids(files: list[SourceFile] = files, rows: int = 5, recipe=FINGERPRINT) -> list[str]:
        return [shard.sid for shard in cut_shards(files, rows, recipe)]

    assert sids() == sids()
    other_recipe = sids(recipe="another")
    changed_file = sids([replace(files[0], fingerprint="changed"), files[1]])
    renamed = sids([replace(files[0], source="z.parquet"), files[1]])
    assert not {*sids()} & {*other_recipe}
    assert [a == b for a, b in zip(sids(), changed_file, strict=True)] == [False] * 3 + [True]
    assert [a == b for a, b in zip(sids(), renamed, strict=True)] == [False] * 3 + [True]
    assert not {*sids()} & {*sids(rows=20)}


def test_a_sid_is_a_digest_of_recipe_and_spans() -> None:
    """Spelled out, so that a change of it, which orphans committed parts, is noticed."""
    (shard,) = cut_shards([a_file([3])], 5, FINGERPRINT)
    identity = [FINGERPRINT, {"source": "a.parquet", "fingerprint": "size:3"}]
    identity[1] |= {"first": 0, "stop": 3}
    assert shard.sid == bytes_digest(json.dumps(identity).encode())[:16]
    assert len(shard.sid) == 16


def some_spans() -> st.SearchStrategy[list[Span]]:
    """Spans of two files, in order, some with nothing between them."""
    gaps = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=8)

    def of(name: str, pairs: list[tuple[int, int]]) -> list[Span]:
        spans, row = [], 0
        for gap, rows in pairs:
            spans.append(Span(name, "f", row + gap, row + gap + rows))
            row += gap + rows
        return spans

    return st.tuples(gaps, gaps).map(lambda two: of("a", two[0]) + of("b", two[1]))


@settings(deadline=None)
@given(some_spans(), st.integers(1, 30))
def test_spans_are_cut_into_shards_of_the_same_rows(spans: list[Span], shard_rows: int) -> None:
    shards = list(cut_spans(spans, shard_rows, FINGERPRINT))
    planned = [(span.source, row) for span in spans for row in range(span.first, span.stop)]
    assert rows_of(shards) == planned
    assert all(0 < shard.rows <= shard_rows for shard in shards)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    for shard in shards:
        for one, other in itertools.pairwise(shard.spans):
            assert (one.source, one.stop) != (other.source, other.first), "these are one span"
    for before, shard in itertools.pairwise(shards):
        last, first = before.spans[-1], shard.spans[0]
        if shard.continues:
            assert (last.source, last.stop) == (first.source, first.first)


@settings(deadline=None)
@given(some_files(), st.integers(1, 50))
def test_columns_give_back_every_shard(files: list[SourceFile], shard_rows: int) -> None:
    cut = list(cut_shards(files, shard_rows, FINGERPRINT))
    shards = Shards.from_shards(cut)
    assert list(shards) == cut
    assert shards[2:5] == tuple(cut[2:5])
    assert [shards.sid(shard.index) for shard in cut] == [shard.sid for shard in cut]
    assert shards.rows_each.tolist() == [shard.rows for shard in cut]
    assert shards.rows == sum(file.rows for file in files)
    if cut:
        assert shards[-1] == cut[-1]
    with pytest.raises(IndexError):
        shards[len(cut)]


def test_shards_within_a_row_group_continue_the_one_before() -> None:
    shards = cut_shards([a_file([10, 4, 4, 9]), a_file([3], "b.parquet")], 4, FINGERPRINT)
    assert [(shard.rows, shard.continues) for shard in shards] == [
        (3, False),
        (3, True),
        (4, True),
        (4, False),
        (4, False),
        (3, False),
        (3, True),
        (3, True),
        (3, False),
    ]


def test_a_shard_costs_few_bytes() -> None:
    files = [a_file([1000] * 100, f"{number}.parquet") for number in range(50)]
    shards = Shards.from_shards(cut_shards(files, 1000, FINGERPRINT))
    arrays = [*shards.spans, shards.sids, shards.continues, shards._edges]
    assert len(shards) == 5000
    assert sum(array.nbytes for array in arrays) <= 50 * len(shards)


def test_sample_takes_the_first_rows() -> None:
    files = [SourceFile(f"{i}.parquet", "f", (10,)) for i in range(5)]
    assert sum(span.rows for span in first_spans(files, 24)) == 24
    assert first_spans([], 24) == []
