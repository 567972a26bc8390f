"""Device time and money of a run: what devices did, what it cost, what else it would have."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gc2ray.core.errors import first_line
from gc2ray.core.intervals import Interval
from gc2ray.core.stats import RunStats
from gc2ray.estimate.hardware import Hardware, Prices, find_hardware
from gc2ray.estimate.roofline import ROOFLINE_SHARE, busy_seconds, roofline_seconds
from gc2ray.models.shape import ModelShape
from gc2ray.output.heartbeats import WorkerRecord
from gc2ray.output.totals import RunTotals

log = logging.getLogger(__name__)
HOUR = 3600.0
UNACCOUNTED = "unaccounted"
"""Use of worker time that no driver tells of: one that was killed."""
SCALING_SPREAD = 0.3
"""Half-width of times on another device, where a run tells its own share of the roofline."""


@dataclass(frozen=True)
class DeviceTime:
    """What workers on one kind of device took.

    Attributes:
        device: What it calls itself.
        workers: Processes.
        seconds: Device-seconds from their start until they were last seen.
        usd_per_hour: Price; None where nobody tells.
    """

    device: str
    workers: int
    seconds: float
    usd_per_hour: float | None


@dataclass(frozen=True)
class WhatIf:
    """The same work on another kind of device.

    Attributes:
        hardware: Its name.
        device_hours: Of answering.
        usd: By kind of price.
    """

    hardware: str
    device_hours: Interval
    usd: Mapping[str, Interval]


def _devices(workers: Sequence[WorkerRecord], prices: Prices) -> tuple[DeviceTime, ...]:
    seconds: dict[str, list[float]] = {}
    for worker in workers:
        lived = (worker.last_seen - worker.started).total_seconds()
        seconds.setdefault(worker.device, []).append(lived * worker.devices)
    return tuple(
        DeviceTime(device, len(found), sum(found), prices.per_hour(device))
        for device, found in sorted(seconds.items())
    )


def _bill(ledger: RunTotals, devices: Sequence[DeviceTime]) -> dict[str, float]:
    """By use; what workers lived beyond what drivers tell is nobody's."""
    bill = {str(use): seconds for use, seconds in ledger.usage.seconds.items()}
    beyond = sum(device.seconds for device in devices) - sum(bill.values())
    # A worker is last seen up to half a minute before its end, and a driver a heartbeat before.
    return bill | ({UNACCOUNTED: beyond} if beyond > 1.0 else {})


def _usd(bill: Mapping[str, float], devices: Sequence[DeviceTime]) -> float | None:
    """All device time, at the prices of the devices in the shares that workers had of them."""
    lived = sum(device.seconds for device in devices)
    if not lived or any(device.usd_per_hour is None for device in devices):
        return None
    an_hour = sum((d.usd_per_hour or 0.0) * d.seconds for d in devices) / lived
    return sum(bill.values()) * an_hour / HOUR


def _saved(stats: RunStats, answering: float) -> Interval | None:
    """Device-seconds that the same answers would have taken uncompressed, less those they took.

    Each stage scales with its operations. Decoding is bound by reading weights, which does not
    change, and the KV cache, which does: it lies between both.
    """
    busy = busy_seconds(stats.stage_ns)
    if not stats.flops or not sum(busy.values()):
        return None
    scale = min(1.0, answering / sum(busy.values())) if answering else 1.0
    more = sum(
        busy.get(stage, 0.0) * (stats.flops_full[stage] / stats.flops[stage] - 1)
        for stage in ("encode", "compress", "prefill")
        if stats.flops.get(stage)
    )
    reads = stats.cache_read_bytes_full / max(1, stats.cache_read_bytes) - 1
    decoding = busy.get("generate", 0.0) * max(0.0, reads)
    return Interval(more, more + decoding / 4, more + decoding).scaled(scale)


def _what_if(
    ledger: RunTotals, stats: RunStats, answering: float, table: Sequence[Hardware]
) -> tuple[WhatIf, ...]:
    shape = _shape(ledger)
    if shape is None or not stats.flops:
        return ()
    names = {worker.device for worker in ledger.workers}
    own = find_hardware(table, next(iter(names))) if len(names) == 1 else None
    share = ROOFLINE_SHARE
    if own is not None and answering:
        reached = sum(roofline_seconds(stats, shape, own).values()) / answering
        share = Interval(reached * (1 - SCALING_SPREAD), reached, reached * (1 + SCALING_SPREAD))
    found = []
    for hardware in table:
        ideal = sum(roofline_seconds(stats, shape, hardware).values()) / HOUR
        hours = Interval(ideal / share.high, ideal / share.mid, ideal / share.low)
        if hardware is own:
            hours = Interval.exactly(answering / HOUR)
        prices = {kind: hardware.usd_per_hour(kind) for kind in ("on_demand", "spot")}
        usd = {kind: hours.scaled(price) for kind, price in prices.items() if price is not None}
        found.append(WhatIf(hardware.name, hours, usd))
    return tuple(found)


def _shape(ledger: RunTotals) -> ModelShape | None:
    """Of the model, as the first worker says that does."""
    noted = ledger.model_shape
    if noted is None:
        return None
    try:
        return ModelShape.from_dict(noted)
    except (KeyError, TypeError, ValueError) as error:
        log.warning("the model's sizes in a worker's record are damaged: %s", first_line(error))
        return None
