"""Rooflines by hand, and the pace of runs that are made up."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from gc2ray.core.errors import ConfigError
from gc2ray.core.stats import RunStats
from gc2ray.core.usage import Usage, UsageKind
from gc2ray.estimation.hardware import Peaks
from gc2ray.estimation.measured_rates import DRIFT, MeasuredRates
from gc2ray.estimation.roofline import Work, audit_share, roofline_seconds
from gc2ray.models.shape import LLAVA_7B, ModelShape, TextModel, Tower
from gc2ray.output.heartbeats import WorkerRecord
from gc2ray.output.run_directory import Run
from gc2ray.output.totals import RoundTotals, RunTotals, Timeline
from tests.output.test_totals import START, driver_record
from tests.support.outputs import RECIPE

DEVICE = Peaks({"float32": 1, "bfloat16": 4}, gb_per_s=100, memory_gib=8)
SHAPE = ModelShape(
    Tower(2, 2, width=8, ffn=8, patches=4, pixels=12, text_width=8),
    TextModel(2, 8, queries=8, keys=8, ffn=16, vocabulary=100),
    itemsize=2,
)
PART = RunStats(
    rows=12,
    by_status={"ok": 10, "failed": 2},
    output_tokens=40,
    flops={"encode": 4 * 10**12, "compress": 10**12, "prefill": 8 * 10**12, "generate": 5},
    stage_ns={
        "image": 10**10, "encode": 2 * 10**9, "compress": 10**9, "prefill": 4 * 10**9,
        "generate": 2 * 10**9,
    },
)  # fmt: skip
WORK = Work.from_stats(PART)


def test_a_stage_takes_its_products_at_the_peak() -> None:
    work = Work(flops={"encode": 8 * 10**12, "prefill": 4 * 10**12, "generate": 10**12})
    assert roofline_seconds(work, SHAPE, DEVICE) == {"encode": 2, "prefill": 1, "generate": 0.25}
    in_float32 = replace(SHAPE, itemsize=4)
    assert roofline_seconds(work, in_float32, DEVICE)["encode"] == 8


def test_decoding_reads_weights_once_a_step_and_each_rows_cache() -> None:
    weights = 2 * SHAPE.text.step_weights
    work = Work(flops={"generate": 10**9}, decode_steps=7, cache_read_bytes=10**10)
    seconds = roofline_seconds(work, SHAPE, DEVICE)["generate"]
    assert seconds == pytest.approx((10**10 + 7 * weights) / 100e9)
    assert roofline_seconds(Work(), SHAPE, DEVICE) == {"generate": 0}


def test_the_7b_on_an_h200_takes_the_documented_time() -> None:
    """Prefill of 2880 visual and 60 text tokens: 51 ms at 790 TFLOP/s; decoding 73 rows: 12.9 ms
    a row for 31 steps at 4.3 TB/s."""
    h200 = Peaks({"float32": 60, "bfloat16": 790}, gb_per_s=4300, memory_gib=139)
    text, rows = LLAVA_7B.text, 73
    reads = sum(2940 + step for step in range(1, 32))
    work = Work(
        flops={"prefill": text.prefill(2940)},
        decode_steps=31,
        cache_read_bytes=rows * reads * LLAVA_7B.kv_bytes_per_token,
    )
    seconds = roofline_seconds(work, LLAVA_7B, h200)
    assert seconds["prefill"] == pytest.approx(51.07e-3, rel=0.02)
    assert seconds["generate"] / rows == pytest.approx(12.88e-3, rel=0.05)


def run_totals(
    parts: list[RunStats],
    device_time: Usage,
    wall: float = 60.0,
    devices: tuple[str, ...] = ("cpu", "cpu"),
) -> RunTotals:
    end = START + timedelta(seconds=50)
    workers = tuple(
        WorkerRecord("w", "n", 1, device, "d", SHAPE, 1.0, 1.0, START, None, end)
        for device in devices
    )
    entry = RoundTotals(
        number=0,
        run=Run(RECIPE, "digest", len(parts), 12 * len(parts), {}),
        parts=len(parts),
        rows=12 * len(parts),
        stats=sum(parts, RunStats()),
        groups=tuple(parts),
        timeline=Timeline(),
        workers=workers,
        drivers=(driver_record(wall, device_time),),
        dead_letters=(),
        dead_letter_count=0,
    )
    return RunTotals("out", (entry,), entry.rows)


def test_rates_of_a_run_predict_its_own_time() -> None:
    device_time = Usage({UsageKind.USEFUL: 40.0, UsageKind.LOADING: 8.0, UsageKind.IDLE: 2.0})
    found = MeasuredRates.from_totals(run_totals([PART] * 4, device_time, wall=26.0))
    total = sum([PART] * 4, RunStats())
    answered = replace(Work.from_stats(total), rows=40)  # those that can be answered
    assert found.seconds(answered) == pytest.approx(40.0)
    assert found.seconds(replace(WORK, rows=10)) == pytest.approx(10.0)
    assert (found.worker_seconds, found.start_seconds) == (5.0, pytest.approx(6.0))
    assert found.output_tokens.mid == 4
    assert found.device == "cpu"
    assert found.spread == pytest.approx(DRIFT)
    assert found.factor.high == pytest.approx(1 + DRIFT)


def test_stages_scale_with_their_work() -> None:
    found = MeasuredRates.from_totals(run_totals([PART] * 4, Usage({UsageKind.USEFUL: 36.0})))
    less = replace(WORK, rows=10, flops=PART.flops | {"prefill": 10**12})
    whole = found.seconds(replace(WORK, rows=10))
    assert whole - found.seconds(less) == pytest.approx(4 * 7 / 8)
    longer = replace(WORK, rows=10, output_tokens=80)
    assert found.seconds(longer) - whole == pytest.approx(2.0)


def test_stages_that_overlapped_are_not_counted_twice() -> None:
    """On a GPU vision runs beside decoding: 9 s of stages in 6 s."""
    found = MeasuredRates.from_totals(run_totals([PART] * 2, Usage({UsageKind.USEFUL: 12.0})))
    assert found.per_answer == 0
    assert found.seconds(replace(WORK, rows=10)) == pytest.approx(6.0)


def test_audits_do_not_lower_measured_rates() -> None:
    """Half as long again as the answers themselves, one device after the other."""
    audited_stats = replace(
        PART,
        audit_uncompressed_ns={stage: ns // 4 for stage, ns in PART.stage_ns.items()},
        escalation_ns={stage: ns // 4 for stage, ns in PART.stage_ns.items()},
    )
    assert audit_share(audited_stats) == pytest.approx(1 / 3)
    assert audit_share(PART) == audit_share(RunStats()) == 0
    device_time = Usage({UsageKind.USEFUL: 60.0, UsageKind.LOADING: 8.0, UsageKind.IDLE: 2.0})
    found = MeasuredRates.from_totals(run_totals([audited_stats] * 4, device_time, wall=36.0))
    plain = MeasuredRates.from_totals(
        run_totals([PART] * 4, Usage({**device_time.seconds, UsageKind.USEFUL: 40.0}), wall=26.0)
    )
    assert found.per_flop == pytest.approx(plain.per_flop)
    assert found.per_answer == pytest.approx(plain.per_answer)
    assert found.per_output_token == pytest.approx(plain.per_output_token)
    assert found.worker_seconds == plain.worker_seconds == 5.0
    assert found.start_seconds == pytest.approx(plain.start_seconds)
    without_usage = MeasuredRates.from_totals(run_totals([audited_stats] * 4, Usage()))
    assert (
        without_usage.per_flop
        == MeasuredRates.from_totals(run_totals([PART] * 4, Usage())).per_flop
    )


def test_parts_that_differ_widen_the_interval() -> None:
    slow = replace(PART, stage_ns=PART.stage_ns | {"encode": 9 * 10**9})
    even, uneven = (
        MeasuredRates.from_totals(run_totals(parts, Usage({UsageKind.USEFUL: 60.0})))
        for parts in ([PART] * 6, [PART, slow] * 3)
    )
    assert even.spread < uneven.spread < 0.6
    assert MeasuredRates.from_totals(run_totals([PART], Usage())).spread == 1.0


def test_a_run_without_measurable_rates_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are no answers to measure rates from"):
        MeasuredRates.from_totals(run_totals([RunStats(rows=3, by_status={"failed": 3})], Usage()))
    with pytest.raises(
        ConfigError, match=r"the run used several device types \(A, B\); --like needs one"
    ):
        MeasuredRates.from_totals(run_totals([PART], Usage(), devices=("B", "A")))
    alone = MeasuredRates.from_totals(run_totals([PART], Usage()))
    assert (alone.worker_seconds, alone.start_seconds) == (None, None)
