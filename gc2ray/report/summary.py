"""`Summary`: the numbers of a report, all of them derived from a `RunTotals` and a table of prices.

Whatever a page, a text or a program is told comes from here. Costs are those of all rounds;
what was saved is an estimate from operations, and says so.

Not covered: quality, which footers cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from gc2ray.core.intervals import Interval, interval
from gc2ray.core.schema import MILLION
from gc2ray.core.stats import RETENTION_BUCKETS, STAGES, RunStats
from gc2ray.core.usage import UsageKind
from gc2ray.estimate.hardware import Prices
from gc2ray.estimate.roofline import audit_share, busy_seconds
from gc2ray.output.totals import RoundTotals, RunTotals
from gc2ray.report.costs import (
    DeviceTime,
    WhatIf,
    _bill,
    _devices,
    _saved,
    _usd,
    _what_if,
)


@dataclass(frozen=True)
class BeforeAfter:
    """A number before and after compression."""

    full: int
    kept: int

    @property
    def share(self) -> float | None:
        """What is left of it."""
        return self.kept / self.full if self.full else None


@dataclass(frozen=True)
class EscalationStep:
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
    agreed: Interval
    similarity: float
    share_of_time: float
    audit_seconds: Mapping[str, float]
    audited_seconds: Mapping[str, float]
    least: tuple[tuple[float, str], ...]
    rungs: tuple[EscalationStep, ...]

    @property
    def slowdown(self) -> float | None:
        """How much longer uncompressed answers took on the device, decoding of images aside."""
        ours, theirs = (sum(spent.values()) for spent in (self.audited_seconds, self.audit_seconds))
        return theirs / ours if ours else None


@dataclass(frozen=True)
class RoundSummary:
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
        rounds: The run and its retries.
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
    rounds: tuple[RoundSummary, ...]
    by_status: Mapping[str, int]
    empty_answers: int
    images: int
    images_shared: int
    visual: BeforeAfter
    newlines: BeforeAfter
    views: tuple[BeforeAfter, ...]
    retention: tuple[int, ...]
    prompt_tokens: int
    prompt_tokens_shared: int
    output_tokens: int
    kv_bytes: BeforeAfter
    flops: Mapping[str, BeforeAfter]
    stage_seconds: Mapping[str, float]
    input_starved_seconds: float
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
    saved_seconds: Interval | None
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
    def operations(self) -> BeforeAfter:
        """Of all stages."""
        full = sum(change.full for change in self.flops.values())
        return BeforeAfter(full, sum(change.kept for change in self.flops.values()))

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
        return self.bill.get(str(UsageKind.USEFUL), 0.0) / total if total else None


def summarise(ledger: RunTotals, prices: Prices) -> Summary:
    """The numbers of an output.

    Args:
        ledger: What it says.
        prices: What device time costs.
    """
    stats, first = ledger.stats, ledger.rounds[0]
    drivers = [driver for entry in ledger.rounds for driver in entry.drivers]
    devices = _devices(ledger.workers, prices)
    bill = _bill(ledger, devices)
    usd = _usd(bill, devices)
    answering = bill.get(str(UsageKind.USEFUL), 0.0) * (1 - audit_share(stats))
    return Summary(
        output=ledger.output,
        fingerprint=first.run.recipe.fingerprint(),
        recipe=first.run.recipe.model_dump(mode="json"),
        method=first.run.recipe.compression.method,
        retention_requested=first.run.recipe.compression.retention_requested,
        versions=first.run.versions,
        started=min((driver.started for driver in drivers), default=None),
        ended=max((driver.last_seen for driver in drivers), default=None),
        rounds=tuple(_round_summary(entry) for entry in ledger.rounds),
        by_status=stats.by_status,
        empty_answers=stats.empty_answers,
        images=stats.images,
        images_shared=stats.images_shared,
        visual=BeforeAfter(stats.visual_tokens_full, stats.visual_tokens_kept),
        newlines=BeforeAfter(stats.newline_tokens_full, stats.newline_tokens),
        views=_views(stats),
        retention=tuple(
            stats.retention.get(f"{bucket:02d}", 0) for bucket in range(RETENTION_BUCKETS)
        ),
        prompt_tokens=stats.prompt_tokens,
        prompt_tokens_shared=stats.prompt_tokens_shared,
        output_tokens=stats.output_tokens,
        kv_bytes=BeforeAfter(stats.kv_bytes_full, stats.kv_bytes),
        flops={
            stage: BeforeAfter(stats.flops_full[stage], stats.flops.get(stage, 0))
            for stage in STAGES
            if stage in stats.flops_full
        },
        stage_seconds={stage: stats.stage_ns.get(stage, 0) / 1e9 for stage in STAGES},
        input_starved_seconds=stats.input_starved_ns / 1e9,
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
        letters=tuple(letter for entry in ledger.rounds for letter in entry.dead_letters),
        letter_count=sum(entry.dead_letter_count for entry in ledger.rounds),
    )


def _round_summary(entry: RoundTotals) -> RoundSummary:
    return RoundSummary(
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
        agreed=agreed,
        similarity=stats.agreement_millionths / stats.audits / MILLION,
        share_of_time=audit_share(stats),
        audit_seconds=busy_seconds(stats.audit_uncompressed_ns),
        audited_seconds=busy_seconds(stats.audit_compressed_ns),
        least=tuple((1 - off / MILLION, key) for off, key in stats.least_agreed),
        rungs=tuple(
            EscalationStep(float(retention), rows, stats.escalated_agreed.get(retention, 0))
            for retention, rows in sorted(stats.escalated.items(), key=lambda item: float(item[0]))
        ),
    )


def _views(stats: RunStats) -> tuple[BeforeAfter, ...]:
    places = sorted(map(int, stats.view_tokens_full))
    full, kept = stats.view_tokens_full, stats.view_tokens_kept
    return tuple(BeforeAfter(full[str(place)], kept.get(str(place), 0)) for place in places)


def _throughput(entry: RoundTotals) -> tuple[tuple[datetime, float, float], ...]:
    width = entry.timeline.width_seconds
    return tuple(
        (
            when,
            moment.answers / width,
            moment.input_starved_ns / max(1, moment.input_starved_ns + moment.busy_ns),
        )
        for when, moment in entry.timeline.moments()
    )
