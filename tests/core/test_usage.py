"""Every second of a worker is on the bill once."""

from __future__ import annotations

import json

import pytest

from gc2ray.core.usage import Bill, Meter, Use


def test_every_second_is_spent_once() -> None:
    meter = Meter(devices=2.0)
    meter.spend(1, Use.IDLE, 5.0)  # before it is up: nothing
    meter.start(1, 10.0)
    for use, now in [(Use.LOADING, 15.0), (Use.USEFUL, 45.0), (Use.IDLE, 46.0), (Use.USEFUL, 50.0)]:
        meter.spend(1, use, now)
    meter.stop(1, Use.DIED, 60.0)
    meter.stop(1, Use.IDLE, 99.0)  # once
    bill = meter.bill(99.0, {})
    assert dict(bill.seconds) == {
        Use.USEFUL: 68.0,
        Use.LOADING: 10.0,
        Use.IDLE: 2.0,
        Use.DIED: 20.0,
    }
    assert bill.total_seconds == (60.0 - 10.0) * 2


def test_bills_add_up_and_survive_json() -> None:
    one, two = Bill({Use.USEFUL: 3.0, Use.DIED: 0.5}), Bill({Use.USEFUL: 1.25})
    total = one + two
    assert dict(total.seconds) == {Use.USEFUL: 4.25, Use.DIED: 0.5}
    assert Bill.from_dict(json.loads(json.dumps(total.to_dict()))) == total
    assert (Bill() + one, Bill().total_seconds) == (one, 0.0)
    with pytest.raises(ValueError, match="coffee"):
        Bill.from_dict({"coffee": 1.0})


def test_what_is_in_flight_is_on_the_bill() -> None:
    meter = Meter()
    for worker in (1, 2):
        meter.start(worker, 10.0)
    meter.spend(1, Use.LOADING, 12.0)
    bill = meter.bill(20.0, {1: Use.ABANDONED, 2: Use.LOADING})
    assert dict(bill.seconds) == {Use.LOADING: 12.0, Use.ABANDONED: 8.0}
    meter.spend(1, Use.USEFUL, 30.0)
    assert meter.bill(30.0, {1: Use.IDLE, 2: Use.LOADING}).of(Use.USEFUL) == 18.0
