"""`Summary`: the numbers of a report, all of them derived from a `Ledger` and a table of prices.

Whatever a page, a text or a program is told comes from here. Costs are those of all generations;
what was saved is an estimate from operations, and says so.

Not covered: quality, which footers cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from gc2ray.core.records import MILLION
from gc2ray.core.scores import interval
from gc2ray.core.stats import RETENTION_BUCKETS, STAGES, RunStats
from gc2ray.core.usage import Use
from gc2ray.estimate.hardware import Hardware, find_hardware
from gc2ray.estimate.measured_rates import (
    ROOFLINE_SHARE,
    audit_share,
    busy_seconds,
    roofline_seconds,
)
from gc2ray.output.totals import Entry, Ledger, WorkerRecord
from gc2ray.report.format import Range

HOUR = 3600.0
UNACCOUNTED = "unaccounted"
"""Use of worker time that no driver tells of: one that was killed."""
SCALING_SPREAD = 0.3
"""Half-width of times on another device, where a run tells its own share of the roofline."""


@dataclass(frozen=True)
class Change:
    """A number before and after compression."""

    full: int
    kept: int

    @property
    def share(self) -> float | None:
        """What is left of it."""
        return self.kept / self.full if self.full else None


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
    device_hours: Range
    usd: Mapping[str, Range]


@dataclass(frozen=True)
class Rung:
    """A retention at which audited rows were answered anew.

    Attributes:
        retention: Requested.
        rows: Whose answer is of this retention now.
        agreed: Those of them that now say what was said uncompressed.
    """

    retention: float
    rows: int
    agreed: int


@dataclass(frozen=True)
class AuditSummary:
    """What a second look at some answers found.

    Attributes:
        audits: Answers that were compared with uncompressed ones.
        agreed: Share that said the same, with 95 % confidence.
        similarity: Mean similarity, 1 where they said the same.
        share_of_time: Of the time in which devices answered, what second looks took.
        audit_seconds: Busy time of devices for the uncompressed answers, by stage.
        audited_seconds: The same of the answers that they were compared with.
        least: Rows that differed most, as (similarity, row key).
        rungs: Answers that were given anew, by the retention of what they are now, rising.
    """

    audits: int
    agreed: Range
    similarity: float
    share_of_time: float
    audit_seconds: Mapping[str, float]
    audited_seconds: Mapping[str, float]
    least: tuple[tuple[float, str], ...]
    rungs: tuple[Rung, ...]

    @property
    def slowdown(self) -> float | None:
        """How much longer uncompressed answers took on the device, decoding of images aside."""
        ours, theirs = (sum(spent.values()) for spent in (self.audited_seconds, self.audit_seconds))
        return theirs / ours if ours else None


@dataclass(frozen=True)
class Generation:
    """What became of one generation: its number, rows, answers and parts."""

    number: int
    planned_rows: int
    rows: int
    parts: int
    by_status: Mapping[str, int]


@dataclass(frozen=True)
class Summary:
    """The numbers of a run.

    Attributes:
        output: Directory or URL.
        fingerprint: Of the recipe.
        recipe: As plain data.
        method: Of compression.
        retention_requested: 1 where nothing is compressed.
        versions: Of libraries, when the run began.
        started: When its first driver began; None where none tells.
        ended: When its last one was seen.
        generations: The run and its retries.
        by_status: Answers of all of them.
        empty_answers: Those that are `ok`, and blank.
        images: That were encoded.
        images_shared: Answers whose image another one had brought.
        visual: Visual tokens.
        newlines: Newline tokens.
        views: Visual tokens by view: the thumbnail, then crops by their place.
        retention: Answers by actual retention, from none kept to all, `RETENTION_BUCKETS` of them.
        prompt_tokens: Read by the language model.
        prompt_tokens_shared: Those of them that were computed for another answer.
        output_tokens: Written by it.
        kv_bytes: KV cache of prompts and answers.
        flops: Operations by stage.
        stage_seconds: Busy time by stage, which may overlap.
        starved_seconds: In which workers had nothing to do, and rows were still to come.
        rows_a_step: Rows that were decoded together, on average.
        peak_device_bytes: Largest allocation on a device; 0 where it does not tell.
        peak_host_bytes: Largest resident set of a worker.
        energy_joules: Of devices; 0 where they do not tell.
        throughput: Answers a second over time, with the share of time that workers starved.
        bill: Device-seconds by use.
        devices: What was used.
        price: Where prices are from, for people.
        usd: Of all device time; None without a price.
        usd_per_1000: Of a thousand encoded images; likewise.
        answering_seconds: Useful device-seconds, less those of second looks at some answers.
        saved_seconds: Device-seconds that compression saved: an estimate from operations.
        what_if: The work of answering on other devices.
        audit: What a second look found; None where there was none.
        slowest: Rows with the most busy time, as (seconds, row key).
        largest: Rows with the largest KV cache, as (bytes, row key).
        letters: Why shards were given up.
        letter_count: All of them.
    """

    output: str
    fingerprint: str
    recipe: Mapping[str, Any]
    method: str
    retention_requested: float
    versions: Mapping[str, str]
    started: datetime | None
    ended: datetime | None
    generations: tuple[Generation, ...]
    by_status: Mapping[str, int]
    empty_answers: int
    images: int
    images_shared: int
    visual: Change
    newlines: Change
    views: tuple[Change, ...]
    retention: tuple[int, ...]
    prompt_tokens: int
    prompt_tokens_shared: int
    output_tokens: int
    kv_bytes: Change
    flops: Mapping[str, Change]
    stage_seconds: Mapping[str, float]
    starved_seconds: float
    rows_a_step: float | None
    peak_device_bytes: int
    peak_host_bytes: int
    energy_joules: float
    throughput: tuple[tuple[datetime, float, float], ...]
    bill: Mapping[str, float]
    devices: tuple[DeviceTime, ...]
    price: str
    usd: float | None
    usd_per_1000: float | None
    answering_seconds: float
    saved_seconds: Range | None
    what_if: tuple[WhatIf, ...]
    audit: AuditSummary | None
    slowest: tuple[tuple[float, str], ...]
    largest: tuple[tuple[int, str], ...]
    letters: tuple[tuple[str, str], ...]
    letter_count: int

    @property
    def answers(self) -> int:
        """Answer rows."""
        return sum(self.by_status.values())

    @property
    def errors(self) -> int:
        """Answers that failed."""
        return self.answers - self.by_status.get("ok", 0)

    @property
    def operations(self) -> Change:
        """Of all stages."""
        full = sum(change.full for change in self.flops.values())
        return Change(full, sum(change.kept for change in self.flops.values()))

    @property
    def device_seconds(self) -> float:
        """Of all uses."""
        return sum(self.bill.values())

    def telling_rows(self, count: int) -> list[str]:
        """Keys of so many answered rows, those that differ most from uncompressed first."""
        least = [key for _, key in self.audit.least] if self.audit is not None else []
        large = [key for size, key in self.largest if size]
        return list(dict.fromkeys([*least, *large]))[:count]

    @property
    def useful_share(self) -> float | None:
        """Share of device time that led to answers."""
        total = self.device_seconds
        return self.bill.get(str(Use.USEFUL), 0.0) / total if total else None


@dataclass(frozen=True)
class Prices:
    """What device time costs.

    Attributes:
        table: Of hardware.
        kind: `on_demand` or `spot`.
        usd_per_hour: Of one device, whatever it is; None: as the table says.
    """

    table: tuple[Hardware, ...]
    kind: str = "on_demand"
    usd_per_hour: float | None = None

    def of(self, device: str) -> float | None:
        """What an hour of a device costs."""
        if self.usd_per_hour is not None:
            return self.usd_per_hour
        hardware = find_hardware(self.table, device)
        return hardware.usd_per_hour(self.kind) if hardware else None

    def __str__(self) -> str:
        if self.usd_per_hour is not None:
            return f"${self.usd_per_hour:g} a device-hour, as given"
        return f"{self.kind.replace('_', ' ')}, as in the hardware table"


def summarise(ledger: Ledger, prices: Prices) -> Summary:
    """The numbers of an output.

    Args:
        ledger: What it says.
        prices: What device time costs.
    """
    stats, first = ledger.stats, ledger.entries[0]
    drivers = [driver for entry in ledger.entries for driver in entry.drivers]
    devices = _devices(ledger.workers, prices)
    bill = _bill(ledger, devices)
    usd = _usd(bill, devices)
    answering = bill.get(str(Use.USEFUL), 0.0) * (1 - audit_share(stats))
    return Summary(
        output=ledger.output,
        fingerprint=first.run.recipe.fingerprint(),
        recipe=first.run.recipe.model_dump(mode="json"),
        method=first.run.recipe.compression.method,
        retention_requested=first.run.recipe.compression.retention_requested,
        versions=first.run.versions,
        started=min((driver.started for driver in drivers), default=None),
        ended=max((driver.last_seen for driver in drivers), default=None),
        generations=tuple(_generation(entry) for entry in ledger.entries),
        by_status=stats.by_status,
        empty_answers=stats.empty_answers,
        images=stats.images,
        images_shared=stats.images_shared,
        visual=Change(stats.visual_tokens_full, stats.visual_tokens_kept),
        newlines=Change(stats.newline_tokens_full, stats.newline_tokens),
        views=_views(stats),
        retention=tuple(
            stats.retention.get(f"{bucket:02d}", 0) for bucket in range(RETENTION_BUCKETS)
        ),
        prompt_tokens=stats.prompt_tokens,
        prompt_tokens_shared=stats.prompt_tokens_shared,
        output_tokens=stats.output_tokens,
        kv_bytes=Change(stats.kv_bytes_full, stats.kv_bytes),
        flops={
            stage: Change(stats.flops_full[stage], stats.flops.get(stage, 0))
            for stage in STAGES
            if stage in stats.flops_full
        },
        stage_seconds={stage: stats.stage_ns.get(stage, 0) / 1e9 for stage in STAGES},
        starved_seconds=stats.starved_ns / 1e9,
        rows_a_step=stats.output_tokens / stats.decode_steps if stats.decode_steps else None,
        peak_device_bytes=stats.peak_device_bytes,
        peak_host_bytes=stats.peak_host_bytes,
        energy_joules=stats.energy_millijoules / 1e3,
        throughput=_throughput(first),
        bill=bill,
        devices=devices,
        price=str(prices),
        usd=usd,
        usd_per_1000=1000 * usd / stats.images if usd is not None and stats.images else None,
        answering_seconds=answering,
        saved_seconds=_saved(stats, answering),
        what_if=_what_if(ledger, stats, answering, prices.table),
        audit=_audit(stats),
        slowest=tuple((ns / 1e9, key) for ns, key in stats.slowest),
        largest=stats.largest,
        letters=tuple(letter for entry in ledger.entries for letter in entry.letters),
        letter_count=sum(entry.letter_count for entry in ledger.entries),
    )


def _generation(entry: Entry) -> Generation:
    return Generation(
        entry.number, entry.run.rows, entry.rows, entry.parts, dict(entry.stats.by_status)
    )


def _audit(stats: RunStats) -> AuditSummary | None:
    if not stats.audits:
        return None
    agreed = interval(
        np.repeat([1.0, 0.0], [stats.audits_agreed, stats.audits - stats.audits_agreed])
    )
    return AuditSummary(
        audits=stats.audits,
        agreed=Range(agreed.low, agreed.mean, agreed.high),
        similarity=stats.agreement_millionths / stats.audits / MILLION,
        share_of_time=audit_share(stats),
        audit_seconds=busy_seconds(stats.audit_ns),
        audited_seconds=busy_seconds(stats.audited_ns),
        least=tuple((1 - off / MILLION, key) for off, key in stats.least_agreed),
        rungs=tuple(
            Rung(float(retention), rows, stats.escalated_agreed.get(retention, 0))
            for retention, rows in sorted(stats.escalated.items(), key=lambda item: float(item[0]))
        ),
    )


def _views(stats: RunStats) -> tuple[Change, ...]:
    places = sorted(map(int, stats.view_tokens_full))
    full, kept = stats.view_tokens_full, stats.view_tokens_kept
    return tuple(Change(full[str(place)], kept.get(str(place), 0)) for place in places)


def _throughput(entry: Entry) -> tuple[tuple[datetime, float, float], ...]:
    width = entry.timeline.width_seconds
    return tuple(
        (
            when,
            moment.answers / width,
            moment.starved_ns / max(1, moment.starved_ns + moment.busy_ns),
        )
        for when, moment in entry.timeline.moments()
    )


def _devices(workers: Sequence[WorkerRecord], prices: Prices) -> tuple[DeviceTime, ...]:
    seconds: dict[str, list[float]] = {}
    for worker in workers:
        lived = (worker.last_seen - worker.started).total_seconds()
        seconds.setdefault(worker.device, []).append(lived * worker.devices)
    return tuple(
        DeviceTime(device, len(found), sum(found), prices.of(device))
        for device, found in sorted(seconds.items())
    )


def _bill(ledger: Ledger, devices: Sequence[DeviceTime]) -> dict[str, float]:
    """By use; what workers lived beyond what drivers tell is nobody's."""
    bill = {str(use): seconds for use, seconds in ledger.bill.seconds.items()}
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


def _saved(stats: RunStats, answering: float) -> Range | None:
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
    return Range(more, more + decoding / 4, more + decoding).scaled(scale)


def _what_if(
    ledger: Ledger, stats: RunStats, answering: float, table: Sequence[Hardware]
) -> tuple[WhatIf, ...]:
    shape = ledger.shape
    if shape is None or not stats.flops:
        return ()
    names = {worker.device for worker in ledger.workers}
    own = find_hardware(table, next(iter(names))) if len(names) == 1 else None
    share = ROOFLINE_SHARE
    if own is not None and answering:
        reached = sum(roofline_seconds(stats, shape, own).values()) / answering
        share = Range(reached * (1 - SCALING_SPREAD), reached, reached * (1 + SCALING_SPREAD))
    found = []
    for hardware in table:
        ideal = sum(roofline_seconds(stats, shape, hardware).values()) / HOUR
        hours = Range(ideal / share.high, ideal / share.mid, ideal / share.low)
        if hardware is own:
            hours = Range.exactly(answering / HOUR)
        prices = {kind: hardware.usd_per_hour(kind) for kind in ("on_demand", "spot")}
        usd = {kind: hours.scaled(price) for kind, price in prices.items() if price is not None}
        found.append(WhatIf(hardware.name, hours, usd))
    return tuple(found)
