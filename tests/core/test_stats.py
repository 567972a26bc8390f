"""`RunStats` adds up exactly, in any order, and survives its JSON."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.stats import (
    RETENTION_BUCKETS,
    STAGES,
    TOP_ROWS,
    RunStats,
    apportion,
    retention_bucket,
)

COUNTS = st.integers(0, 2**70)
KEYS = st.sampled_from(["a#0", "a#1", "b/c#0", "ü#7"])
KEYS_OF = {"by_status": ("ok", "failed"), "stage_ns": STAGES, "retention": ("00", "19")}
DICTS = {
    item.name: KEYS_OF.get(item.name, ("0", "1", "10"))
    for item in fields(RunStats)
    if item.default_factory is dict
}
TOPS = ("slowest", "largest", "least_similar")


def top(rows: list[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    return tuple(sorted(rows, key=lambda row: (-row[0], row[1]))[:TOP_ROWS])


def stats() -> st.SearchStrategy[RunStats]:
    """Any statistics that rows can add up to, zeros and absent keys included."""
    values: dict[str, st.SearchStrategy] = {
        item.name: COUNTS for item in fields(RunStats) if item.name not in (*DICTS, *TOPS)
    }
    for name, keys in DICTS.items():
        values[name] = st.dictionaries(st.sampled_from(keys), COUNTS)
    for name in TOPS:
        rows = st.lists(st.tuples(st.integers(0, 5), KEYS), max_size=TOP_ROWS + 3)
        values[name] = rows.map(top)
    return st.builds(RunStats, **values)


@settings(deadline=None)
@given(stats(), stats())
def test_addition_commutes(a: RunStats, b: RunStats) -> None:
    assert a + b == b + a


@settings(deadline=None)
@given(stats(), stats(), stats())
def test_addition_is_associative(a: RunStats, b: RunStats, c: RunStats) -> None:
    assert (a + b) + c == a + (b + c)


@settings(deadline=None)
@given(stats())
def test_empty_stats_are_neutral(a: RunStats) -> None:
    assert a + RunStats() == a
    assert RunStats() + a == a


@settings(deadline=None)
@given(stats())
def test_json_is_lossless(a: RunStats) -> None:
    assert RunStats.from_json(a.to_json()) == a
    assert RunStats.from_json(a.to_json().encode()) == a


def test_json_of_zeros_names_every_field() -> None:
    zeros = RunStats(by_status={"ok": 0}, stage_ns=dict.fromkeys(STAGES, 0))
    assert RunStats.from_json(zeros.to_json()) == zeros
    assert all(f'"{item.name}"' in RunStats().to_json() for item in fields(RunStats))


def test_counts_add_up_and_peaks_do_not() -> None:
    """Every field, so that a new one cannot be left out of the sum."""
    names = [item.name for item in fields(RunStats) if item.name not in (*DICTS, *TOPS)]
    a = RunStats(**dict.fromkeys(names, 3))
    b = RunStats(**dict.fromkeys(names, 5))
    expected = {name: 5 if name.startswith("peak_") else 8 for name in names}
    assert a + b == RunStats(**expected)


def test_dictionaries_add_up_by_key() -> None:
    total = RunStats(by_status={"ok": 2, "failed": 1}) + RunStats(by_status={"ok": 3, "late": 4})
    assert total.by_status == {"ok": 5, "failed": 1, "late": 4}


def test_bad_rows_are_those_not_ok() -> None:
    assert RunStats(rows=7, by_status={"ok": 4, "failed": 2, "too_long": 1}).bad_rows == 3
    assert RunStats(rows=2, by_status={"failed": 2}).bad_rows == 2


def test_top_lists_are_bounded_and_ties_go_to_the_first_key() -> None:
    singles = [
        RunStats(slowest=((ns, f"a#{ns}"),), largest=((1, f"a#{ns:02d}"),)) for ns in range(25)
    ]
    total = sum(singles, RunStats())
    assert total.slowest == tuple((ns, f"a#{ns}") for ns in range(24, 24 - TOP_ROWS, -1))
    assert total.largest == tuple((1, f"a#{ns:02d}") for ns in range(TOP_ROWS))


@settings(deadline=None)
@given(st.integers(0, 2**62), st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
def test_shares_sum_exactly_and_are_fair(total: int, weights: list[int]) -> None:
    shares = apportion(total, weights)
    assert len(shares) == len(weights)
    assert sum(shares) == total
    whole = sum(weights)
    if whole:
        off = [abs(s * whole - total * w) for s, w in zip(shares, weights, strict=True)]
        assert max(off) < whole, "a share is off by one or more"


def test_shares_without_weight() -> None:
    assert apportion(10, [0, 0, 0]) == [10, 0, 0]
    assert apportion(10, []) == []
    assert apportion(10, [0, 1, 0]) == [0, 10, 0]
    assert apportion(0, [3, 4]) == [0, 0]


@pytest.mark.parametrize(
    ("kept", "full", "bucket"),
    [(0, 100, 0), (1, 100, 0), (5, 100, 0), (6, 100, 1), (10, 100, 1), (95, 100, 18),
     (96, 100, 19), (100, 100, 19), (120, 100, 19), (0, 0, 0), (3, 0, 0), (1, 3, 6)],
)  # fmt: skip
def test_bucket_edges_belong_to_the_lower_bucket(kept: int, full: int, bucket: int) -> None:
    assert retention_bucket(kept, full) == bucket


@settings(deadline=None)
@given(st.integers(1, 10**6), st.data())
def test_a_bucket_holds_its_share_of_retention(full: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, full))
    bucket = retention_bucket(kept, full)
    assert bucket * full < kept * RETENTION_BUCKETS <= (bucket + 1) * full
