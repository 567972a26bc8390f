"""Every second of a worker is on the bill once."""

from __future__ import annotations

import json

import pytest

from gc2ray.core.usage import Usage, UsageKind, UsageMeter


def test_every_second_is_spent_once() -> None:
    meter = UsageMeter(devices=2.0)
    meter.spend(1, UsageKind.IDLE, 5.0)  # before it is up: nothing
    meter.start(1, 10.0)
    for use, now in [
        (UsageKind.LOADING, 15.0),
        (UsageKind.USEFUL, 45.0),
        (UsageKind.IDLE, 46.0),
        (UsageKind.USEFUL, 50.0),
    ]:
        meter.spend(1, use, now)
    meter.stop(1, UsageKind.DIED, 60.0)
    meter.stop(1, UsageKind.IDLE, 99.0)  # once
    device_time = meter.usage(99.0, {})
    assert dict(device_time.seconds) == {
        UsageKind.USEFUL: 68.0,
        UsageKind.LOADING: 10.0,
        UsageKind.IDLE: 2.0,
        UsageKind.DIED: 20.0,
    }
    assert device_time.total_seconds == (60.0 - 10.0) * 2


def test_usages_add_up_and_survive_json() -> None:
    one, two = Usage({UsageKind.USEFUL: 3.0, UsageKind.DIED: 0.5}), Usage({UsageKind.USEFUL: 1.25})
    total = one + two
    assert dict(total.seconds) == {UsageKind.USEFUL: 4.25, UsageKind.DIED: 0.5}
    assert Usage.from_dict(json.loads(json.dumps(total.to_dict()))) == total
    assert (Usage() + one, Usage().total_seconds) == (one, 0.0)
    with pytest.raises(ValueError, match="coffee"):
        Usage.from_dict({"coffee": 1.0})


def test_time_in_flight_counts_as_device_time() -> None:
    meter = UsageMeter()
    for worker in (1, 2):
        meter.start(worker, 10.0)
    meter.spend(1, UsageKind.LOADING, 12.0)
    device_time = meter.usage(20.0, {1: UsageKind.ABANDONED, 2: UsageKind.LOADING})
    assert dict(device_time.seconds) == {UsageKind.LOADING: 12.0, UsageKind.ABANDONED: 8.0}
    meter.spend(1, UsageKind.USEFUL, 30.0)
    assert (
        meter.usage(30.0, {1: UsageKind.IDLE, 2: UsageKind.LOADING}).seconds_for(UsageKind.USEFUL)
        == 18.0
    )
