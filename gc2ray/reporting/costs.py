"""Device time and money of a run: use, cost, savings, and the same work on other devices."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gc2ray.core.arguments import PriceKind
from gc2ray.core.errors import first_line
from gc2ray.core.format import SECONDS_PER_HOUR
from gc2ray.core.intervals import Interval
from gc2ray.core.stats import RunStats
from gc2ray.core.usage import UsageKind
from gc2ray.estimation.hardware import (
    Hardware,
    Prices,
    find_hardware,
    incomplete_notes,
)
from gc2ray.estimation.roofline import (
    ROOFLINE_SHARE,
    Work,
    audit_share,
    busy_seconds,
    roofline_seconds,
)
from gc2ray.models.shape import ModelShape
from gc2ray.output.heartbeats import WorkerRecord
from gc2ray.output.totals import RunTotals

log = logging.getLogger(__name__)
UNACCOUNTED = "unaccounted"
"""Use of worker time that no driver recorded, because the driver was killed."""
SCALING_SPREAD = 0.3
"""Half-width of times on another device, where the run's own share of the roofline is known."""


@dataclass(frozen=True)
class DeviceTime:
    """Time of the workers on one kind of device.

    Attributes:
        device: Name that its driver reports.
        workers: Worker processes.
        seconds: Device-seconds from their start until they were last seen.
        usd_per_hour: Price; None where it is not known.
    """

    device: str
    workers: int
    seconds: float
    usd_per_hour: float | None


@dataclass(frozen=True)
class WhatIf:
    """The same work on another kind of device.

    Attributes:
        hardware: Name of the kind.
        device_hours: Device-hours of answering.
        usd: By kind of price.
    """

    hardware: str
    device_hours: Interval
    usd: Mapping[str, Interval]


@dataclass(frozen=True)
class Costs:
    """Device time and money of a run and its retries.

    Attributes:
        device_seconds_by_use: Device-seconds by use.
        devices: Devices that the workers ran on.
        price: Source of the prices, for people.
        no_cost: Why there is no cost; None where there is one.
        usd: Cost of all device time; None without a price.
        answering_seconds: Useful device-seconds without those of audits.
        saved_seconds: Device-seconds that compression saved, estimated from operations.
        what_if: The work of answering on other devices.
        left_out: Why some devices are not among those, one line each reason.
    """

    device_seconds_by_use: Mapping[str, float]
    devices: tuple[DeviceTime, ...]
    price: str
    no_cost: str | None
    usd: float | None
    answering_seconds: float
    saved_seconds: Interval | None
    what_if: tuple[WhatIf, ...]
    left_out: tuple[str, ...]

    @staticmethod
    def from_totals(totals: RunTotals, prices: Prices) -> Costs:
        """The costs of an output at some prices."""
        stats = totals.stats
        devices = _devices(totals.workers, prices)
        by_use = _by_use(totals, devices)
        answering = by_use.get(str(UsageKind.USEFUL), 0.0) * (1 - audit_share(stats))
        what_if = _what_if(totals, stats, answering, prices.table)
        return Costs(
            device_seconds_by_use=by_use,
            devices=devices,
            price=str(prices),
            no_cost=prices.missing([device.device for device in devices]),
            usd=_usd(by_use, devices),
            answering_seconds=answering,
            saved_seconds=_saved(stats, answering),
            what_if=what_if,
            left_out=tuple(incomplete_notes(prices.table, "No comparison with")),
        )

    @property
    def device_seconds(self) -> float:
        """Seconds of all uses."""
        return sum(self.device_seconds_by_use.values())

    @property
    def useful_seconds(self) -> float:
        """Device-seconds that led to answers."""
        return self.device_seconds_by_use.get(str(UsageKind.USEFUL), 0.0)

    @property
    def useful_share(self) -> float | None:
        """Share of device time that led to answers."""
        return self.useful_seconds / self.device_seconds if self.device_seconds else None


def _devices(workers: Sequence[WorkerRecord], prices: Prices) -> tuple[DeviceTime, ...]:
    seconds: dict[str, list[float]] = {}
    for worker in workers:
        lifetime = (worker.last_seen - worker.started).total_seconds()
        seconds.setdefault(worker.device, []).append(lifetime * worker.devices)
    return tuple(
        DeviceTime(device, len(each), sum(each), prices.per_hour(device))
        for device, each in sorted(seconds.items())
    )


def _by_use(totals: RunTotals, devices: Sequence[DeviceTime]) -> dict[str, float]:
    """Device-seconds by use; lifetimes of workers beyond what drivers recorded are unaccounted."""
    by_use = {str(use): seconds for use, seconds in totals.usage.seconds.items()}
    beyond = sum(device.seconds for device in devices) - sum(by_use.values())
    # A worker is last seen up to half a minute before its end, and a driver a heartbeat before.
    return by_use | ({UNACCOUNTED: beyond} if beyond > 1.0 else {})


def _usd(by_use: Mapping[str, float], devices: Sequence[DeviceTime]) -> float | None:
    """Cost of all device time, priced by the share of it that each kind of device had."""
    lifetime = sum(device.seconds for device in devices)
    if not lifetime or any(device.usd_per_hour is None for device in devices):
        return None
    an_hour = sum((d.usd_per_hour or 0.0) * d.seconds for d in devices) / lifetime
    return sum(by_use.values()) * an_hour / SECONDS_PER_HOUR


def _saved(stats: RunStats, answering: float) -> Interval | None:
    """Device-seconds that the same answers would have taken uncompressed, less those they took.

    Each stage scales with its operations. Decoding reads weights, which does not change, and the KV
    cache, which does: its time lies between both.
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
    totals: RunTotals, stats: RunStats, answering: float, table: Sequence[Hardware]
) -> tuple[WhatIf, ...]:
    shape = _shape(totals)
    if shape is None or not stats.flops:
        return ()
    names = {worker.device for worker in totals.workers}
    own = find_hardware(table, next(iter(names))) if len(names) == 1 else None
    ideal = {
        hardware.name: sum(roofline_seconds(Work.from_stats(stats), shape, hardware.peaks).values())
        for hardware in table
        if hardware.peaks is not None
    }
    share = ROOFLINE_SHARE
    if own is not None and answering and own.name in ideal:
        reached = ideal[own.name] / answering
        share = Interval(reached * (1 - SCALING_SPREAD), reached, reached * (1 + SCALING_SPREAD))
    others = []
    for hardware in table:
        if hardware.name in ideal:
            seconds = ideal[hardware.name]
            time = Interval(seconds / share.high, seconds / share.mid, seconds / share.low)
            others.append(
                _priced(hardware, Interval.exactly(answering) if hardware is own else time)
            )
    return tuple(others)


def _priced(hardware: Hardware, seconds: Interval) -> WhatIf:
    hours = seconds.scaled(1 / SECONDS_PER_HOUR)
    prices = {str(kind): hardware.usd_per_hour(kind) for kind in PriceKind}
    usd = {kind: hours.scaled(price) for kind, price in prices.items() if price is not None}
    return WhatIf(hardware.name, hours, usd)


def _shape(totals: RunTotals) -> ModelShape | None:
    """Shape of the model, from the first worker record that has it."""
    recorded = totals.model_shape
    if recorded is None:
        return None
    try:
        return ModelShape.from_dict(recorded)
    except (KeyError, TypeError, ValueError) as error:
        log.warning("a worker record holds a damaged model shape: %s", first_line(error))
        return None
