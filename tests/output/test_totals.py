"""What footers and records say is added up exactly, and nothing else is believed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.shards import Span
from gc2ray.core.stats import RunStats
from gc2ray.core.usage import Usage, UsageKind
from gc2ray.data.store import Store
from gc2ray.models.shape import LLAVA_7B
from gc2ray.output.heartbeats import DriverRecord
from gc2ray.output.parts import read_part_footer
from gc2ray.output.totals import BUCKETS, GROUPS, Moment, Timeline, read_totals
from tests.support.outputs import first_plan, retry_of, write_round

START = datetime(2026, 11, 1, tzinfo=UTC)


def worker_record(**changes: object) -> bytes:
    content = {
        "uuid": "w", "node": "n", "pid": 1, "device": "cpu", "model_digest": "d",
        "model_shape": LLAVA_7B.to_dict(), "gpus": 0.5, "cpus": 1.0,
        "started": START.isoformat(), "loaded": (START + timedelta(seconds=9)).isoformat(),
        "last_seen": (START + timedelta(minutes=2)).isoformat(), **changes,
    }  # fmt: skip
    return json.dumps(content).encode()


def driver_record(seconds: float, device_time: Usage, uuid: str = "d") -> DriverRecord:
    return DriverRecord(
        uuid,
        "host",
        1,
        START,
        START + timedelta(seconds=seconds),
        has_ended=True,
        usage=device_time,
    )


def fails_at(bad: set[int]):
    return lambda source, row: [Status.FAILED if row in bad else Status.OK]


def test_footers_add_up_to_the_totals_exactly(tmp_path: Path) -> None:
    plan = first_plan()
    store = write_round(tmp_path, 0, plan, fails_at({1, 6}))  # rows of both files
    names = store.names("data")
    ticks: list[int] = []
    totals = read_totals(str(tmp_path), ticks.append)
    assert totals.stats == sum((read_part_footer(store, name).stats for name in names), RunStats())
    (entry,) = totals.rounds
    assert (entry.parts, entry.rows, entry.stats.rows) == (len(names), plan.rows, plan.rows)
    assert sum(entry.groups, RunStats()) == entry.stats
    assert totals.stats.by_status == {"ok": plan.rows - 4, "failed": 4}
    assert sum(ticks) == len(names)
    assert totals.run.rows == plan.rows


def test_retry_rounds_are_counted_separately(tmp_path: Path) -> None:
    write_round(tmp_path, 0, first_plan(), fails_at({1}))
    write_round(tmp_path, 2, retry_of([Span("a.parquet", "fa", 1, 2)]))
    totals = read_totals(str(tmp_path))
    assert [entry.number for entry in totals.rounds] == [0, 2]
    assert totals.stats.rows == first_plan().rows + 1
    assert totals.rounds[1].stats.by_status == {"ok": 1}


def test_parts_are_grouped_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gc2ray.output.totals.GROUPS", 3)
    write_round(tmp_path, 0, first_plan(shard_rows=1))
    (entry,) = read_totals(str(tmp_path)).rounds
    assert (entry.parts, len(entry.groups)) == (17, 3)
    assert [group.rows for group in entry.groups] == [6, 6, 5]
    assert GROUPS == 64


def test_records_are_read_and_other_files_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_round(tmp_path, 0, first_plan(), lambda source, row: None if row == 9 else [Status.OK])
    store = Store(str(tmp_path))
    store.create("workers/a.json", worker_record())
    store.create("workers/b.json", worker_record(device="NVIDIA H200", loaded=None, gpus=0.0))
    store.create("workers/old.json", worker_record(model_shape=None))
    store.create("workers/stranger.json", b"[]")
    usages = [
        Usage({UsageKind.USEFUL: 10.0, UsageKind.LOADING: 2.0}),
        Usage({UsageKind.USEFUL: 5.0}),
    ]
    for number, device_time in enumerate(usages):
        record = driver_record(60.0 * (number + 1), device_time, f"d{number}")
        store.create(record.name, record.to_bytes())
    totals = read_totals(str(tmp_path))
    (entry,) = totals.rounds
    assert [worker.device for worker in totals.workers] == ["cpu", "NVIDIA H200", "cpu"]
    assert [worker.devices for worker in totals.workers] == [0.5, 1.0, 0.5]
    assert [worker.loaded is None for worker in totals.workers] == [False, True, False]
    assert totals.model_shape == LLAVA_7B.to_dict()
    assert totals.usage == Usage({UsageKind.USEFUL: 15.0, UsageKind.LOADING: 2.0})
    assert entry.dead_letter_count == len(entry.dead_letters) == 1
    assert entry.dead_letters[0][1] == "it died"
    assert "stranger.json is not a record" in caplog.text


def test_an_output_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run here"):
        read_totals(str(tmp_path))


def test_a_part_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_round(tmp_path, 0, first_plan())
    footer = read_part_footer(store, store.names("data")[2])
    foreign = replace(footer, run="another")
    monkeypatch.setattr(
        "gc2ray.output.totals.read_part_footer",
        lambda store, name: foreign if "0000002" in name else footer,
    )
    with pytest.raises(ConfigError, match=r"part-0000002-.* is not a part of this run; move it"):
        read_totals(str(tmp_path))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60), st.randoms())
def test_a_timeline_loses_nothing_and_stays_small(seconds: list[int], order: random.Random) -> None:
    order.shuffle(seconds)
    line = Timeline()
    for second in seconds:
        line.add(START + timedelta(seconds=second), Moment(answers=second + 1, busy_ns=1))
    moments = line.moments()
    assert 1 <= len(moments) <= BUCKETS
    assert sum(moment.answers for _, moment in moments) == sum(seconds) + len(seconds)
    begins = [when for when, _ in moments]
    assert begins == sorted(begins)
    width = timedelta(seconds=line.width_seconds)
    assert begins[0] <= START + timedelta(seconds=min(seconds)) < begins[0] + width
    assert begins[-1] <= START + timedelta(seconds=max(seconds)) < begins[-1] + width


def test_an_empty_timeline_has_no_moments() -> None:
    assert Timeline().moments() == []
