"""What a run takes on a device: memory first, then time, then money."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from gc2ray.core.config.job import Cluster
from gc2ray.core.format import SECONDS_PER_HOUR
from gc2ray.core.intervals import Interval
from gc2ray.core.usage import Usage, UsageKind
from gc2ray.estimation.device_estimate import (
    START_SECONDS,
    DeviceEstimate,
    RunSetup,
    estimate_device,
)
from gc2ray.estimation.hardware import Hardware, Price
from gc2ray.estimation.measured_rates import MeasuredRates
from gc2ray.estimation.roofline import ROOFLINE_SHARE, Work, roofline_seconds
from gc2ray.estimation.workload import Workload
from gc2ray.models.shape import LLAVA_7B
from tests.estimation.test_measured_rates import PART, run_totals

BIG = Hardware(
    name="big", devices=("NVIDIA Big",), tflops={"float32": 50, "bfloat16": 1000}, gb_per_s=4000,
    memory_gib=80, source="nowhere", date=date(2026, 11, 1),
    prices=(
        Price(kind="on_demand", usd_per_hour=4, where="a", source="b", date=date(2026, 11, 1)),
        Price(kind="on_demand", usd_per_hour=2, where="a", source="b", date=date(2026, 11, 1)),
        Price(kind="spot", usd_per_hour=1, where="a", source="b", date=date(2026, 11, 1)),
    ),
)  # fmt: skip
ROWS = 100_000
END = Work(
    rows=ROWS,
    output_tokens=32 * ROWS,
    flops={
        "encode": 2 * 10**12 * ROWS,
        "compress": 10**10,
        "prefill": 10**13 * ROWS,
        "generate": 1,
    },
    cache_read_bytes=10**10 * ROWS,
)
WORKLOAD = Workload(
    method="globalcom2", retention=0.25, visual_tokens=Interval.exactly(720 * ROWS),
    newline_tokens=Interval.exactly(20 * ROWS), prompt_tokens=Interval.exactly(800), longest=1000,
    too_long=Interval.exactly(0), work=(END, END, END),
)  # fmt: skip


def estimated(
    workload: Workload = WORKLOAD, hardware: Hardware = BIG, **changes: object
) -> DeviceEstimate:
    settings: dict = {"cluster": Cluster(), "hours": 2.0, "rates": None, **changes}
    return estimate_device(workload, hardware, RunSetup(LLAVA_7B, **settings))


def test_time_is_a_share_of_the_roofline() -> None:
    offer = estimated()
    assert offer.misfit is None
    assert offer.device_seconds is not None
    assert offer.live_rows is not None
    peaks = BIG.peaks
    assert peaks is not None
    steps = replace(END, decode_steps=-(-END.output_tokens // offer.live_rows))
    ideal = sum(roofline_seconds(steps, LLAVA_7B, peaks).values())
    assert offer.device_seconds.mid == pytest.approx(ideal / ROOFLINE_SHARE.mid)
    assert offer.device_seconds.low == pytest.approx(ideal / ROOFLINE_SHARE.high)
    assert offer.basis == "roofline"


def test_money_is_time_at_the_lowest_price() -> None:
    offer = estimated()
    assert offer.usd is not None
    assert offer.usd_per_1000 is not None
    assert offer.workers is not None
    assert offer.device_seconds is not None
    assert offer.device_hours is not None
    paid = (offer.device_seconds.mid + offer.workers * START_SECONDS.mid) / SECONDS_PER_HOUR
    assert offer.device_hours.mid == pytest.approx(paid)
    assert offer.usd["on_demand"].mid == pytest.approx(2 * paid)
    assert offer.usd["spot"].high == pytest.approx(offer.device_hours.high)
    assert offer.usd_per_1000["on_demand"].mid == pytest.approx(2 * paid / (ROWS / 1000))
    assert estimated(hardware=BIG.model_copy(update={"prices": ()})).usd == {}


def test_as_many_workers_as_end_in_time() -> None:
    for hours in (0.5, 2.0, 10.0):
        offer = estimated(hours=hours)
        assert offer.hours is not None
        assert offer.workers is not None
        assert offer.device_seconds is not None
        assert offer.hours.mid <= hours
        if offer.workers > 1:
            fewer = START_SECONDS.mid + offer.device_seconds.mid / (offer.workers - 1)
            assert fewer > hours * SECONDS_PER_HOUR
    hopeless = estimated(hours=0.01)
    assert hopeless.hours is not None
    assert hopeless.hours.mid > 0.01
    assert estimated(cluster=Cluster(workers={"max": 3})).workers == 3


def test_what_does_not_fit_is_reported_and_not_priced() -> None:
    small = BIG.model_copy(update={"memory_gib": 12})
    offer = estimated(hardware=small)
    assert "weights take 14.1 GB" in str(offer.misfit)
    assert (offer.device_seconds, offer.usd) == (None, None)
    long = replace(WORKLOAD, longest=10**6)
    assert "the longest prompt and answer take 1,000,000" in str(estimated(long).misfit)


def test_a_run_on_the_same_device_replaces_the_roofline() -> None:
    rates = MeasuredRates.from_totals(
        run_totals([PART] * 4, Usage({UsageKind.USEFUL: 36.0}), devices=("NVIDIA Big",))
    )
    offer = estimated(rates=rates)
    assert offer.basis == "run"
    assert offer.device_seconds is not None
    assert offer.device_seconds.mid == pytest.approx(rates.seconds(END))
    assert offer.device_seconds.low == pytest.approx(rates.seconds(END) * rates.factor.low)
    assert offer.start_seconds is not None
    assert offer.start_seconds.mid == pytest.approx(rates.start_seconds)
    other = estimated(hardware=BIG.model_copy(update={"devices": ()}), rates=rates)
    assert other.basis == "roofline"
    without = {"tflops": None, "gb_per_s": None, "memory_gib": None, "missing": "unread"}
    bare = BIG.model_copy(update=without)
    known = estimated(hardware=bare, rates=rates)
    assert (known.device_seconds, known.usd) == (offer.device_seconds, offer.usd)
    assert (known.basis, known.live_rows) == ("run", None)
    with pytest.raises(ValueError, match="big: neither peaks nor measured rates"):
        estimated(hardware=bare)


def test_audits_are_part_of_the_cost() -> None:
    """Every tenth row is as good as answered twice: a tenth more of everything."""
    tenth = replace(
        END,
        rows=ROWS // 10,
        output_tokens=END.output_tokens // 10,
        flops={stage: flops // 10 for stage, flops in END.flops.items()},
        cache_read_bytes=END.cache_read_bytes // 10,
    )
    audited = replace(WORKLOAD, audit_work=(Work(), tenth, END))
    rates = MeasuredRates.from_totals(
        run_totals([PART] * 4, Usage({UsageKind.USEFUL: 36.0}), devices=("NVIDIA Big",))
    )
    for measured in (None, rates):
        offer, plain = estimated(audited, rates=measured), estimated(rates=measured)
        assert offer.device_seconds is not None
        assert plain.device_seconds is not None
        assert offer.audit_seconds is not None
        assert plain.audit_seconds == Interval.exactly(0)
        assert offer.device_seconds.low == pytest.approx(plain.device_seconds.low)
        assert offer.device_seconds.mid == pytest.approx(1.1 * plain.device_seconds.mid, rel=1e-3)
        assert offer.device_seconds.high == pytest.approx(2 * plain.device_seconds.high)
        assert offer.audit_seconds.mid == pytest.approx(plain.device_seconds.mid / 10, rel=1e-3)
        assert offer.usd_per_1000 is not None
        assert plain.usd_per_1000 is not None
        assert offer.usd_per_1000["spot"].mid > plain.usd_per_1000["spot"].mid


def test_an_uncertain_workload_widens_the_estimate() -> None:
    low = replace(END, flops=END.flops | {"prefill": 0})
    unsure = replace(WORKLOAD, work=(low, END, END))
    offer, sure = estimated(unsure), estimated()
    for found in (offer.device_seconds, offer.hours, offer.device_hours):
        assert found is not None
        assert found.low <= found.mid <= found.high
    assert offer.device_seconds is not None
    assert sure.device_seconds is not None
    assert offer.device_seconds.low < sure.device_seconds.low
