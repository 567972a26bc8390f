"""`Summary`: the figures of a report, derived from `RunTotals` and a table of prices.

Pages, texts and programs all show figures from here. Costs are those of all rounds; what
compression saved is an estimate from operations and is labelled so.

Not covered: the quality of answers, which the parts' footers do not record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from typing import Any

import numpy as np

from gc2ray.core.intervals import Interval, interval
from gc2ray.core.schema import MILLION
from gc2ray.core.stats import RETENTION_BUCKETS, STAGES, RunStats
from gc2ray.estimation.hardware import Prices
from gc2ray.estimation.roofline import audit_share, busy_seconds
from gc2ray.output.totals import RoundTotals, RunTotals
from gc2ray.reporting.costs import Costs


@dataclass(frozen=True)
class BeforeAfter:
    """A number before and after compression."""

    full: int
    kept: int

    @property
    def share(self) -> float | None:
        """The share that was kept; None of nothing."""
        return self.kept / self.full if self.full else None


@dataclass(frozen=True)
class EscalationStep:
    """A retention at which audited rows were answered again.

    Attributes:
        retention: Requested.
        rows: Rows whose final answer is of this retention.
        agreed: Those of them whose final answer equals the uncompressed one.
    """

    retention: float
    rows: int
    agreed: int


@dataclass(frozen=True)
class AuditSummary:
    """The result of an audit.

    Attributes:
        audits: Answers that were compared with uncompressed ones.
        agreed: Share of equal answers, with 95 % confidence.
        similarity: Mean similarity; 1 for equal answers.
        share_of_time: Share of the devices' answering time that audits took.
        uncompressed_seconds: Busy time of devices for the uncompressed answers, by stage.
        compressed_seconds: The same of the answers that they were compared with.
        least_similar: Rows that differed most, as (similarity, row key).
        steps: Answers that were given again, by the retention of the final one, rising.
    """

    audits: int
    agreed: Interval
    similarity: float
    share_of_time: float
    uncompressed_seconds: Mapping[str, float]
    compressed_seconds: Mapping[str, float]
    least_similar: tuple[tuple[float, str], ...]
    steps: tuple[EscalationStep, ...]

    @property
    def slowdown(self) -> float | None:
        """How much longer uncompressed answers took on the device, decoding of images aside."""
        ours, theirs = (
            sum(seconds.values())
            for seconds in (self.compressed_seconds, self.uncompressed_seconds)
        )
        return theirs / ours if ours else None


@dataclass(frozen=True)
class RoundSummary:
    """The run itself (round 0) or a retry: its rows, answers and parts."""

    number: int
    planned_rows: int
    rows: int
    parts: int
    by_status: Mapping[str, int]


@dataclass(frozen=True)
class Summary:
    """The figures of a run.

    Attributes:
        output: Directory or URL.
        fingerprint: Fingerprint of the recipe.
        recipe: As plain data.
        method: Method of compression.
        retention_requested: 1 where nothing is compressed.
        versions: Versions of libraries, when the run began.
        started: Start of the first driver; None where no driver left a record.
        ended: When the last driver was last seen; None likewise.
        rounds: The run and its retries.
        answered_rows: Input rows that have answers in any round.
        stats: Statistics of all their answers.
        throughput: Over time: answers a second, and the share of worker time spent waiting for
            input.
        costs: Device time and money.
        audit: Result of the audit; None where no row was audited.
        dead_letters: Why shards were given up, as shard and reason.
        dead_letter_count: All of them, those that are not listed included.
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
    answered_rows: int
    stats: RunStats
    throughput: tuple[tuple[datetime, float, float], ...]
    costs: Costs
    audit: AuditSummary | None
    dead_letters: tuple[tuple[str, str], ...]
    dead_letter_count: int

    @property
    def answers(self) -> int:
        """Answer rows."""
        return sum(self.stats.by_status.values())

    @property
    def errors(self) -> int:
        """Answers that failed."""
        return self.answers - self.stats.by_status.get("ok", 0)

    @property
    def visual(self) -> BeforeAfter:
        """Visual tokens."""
        return BeforeAfter(self.stats.visual_tokens_full, self.stats.visual_tokens_kept)

    @property
    def newlines(self) -> BeforeAfter:
        """Newline tokens."""
        return BeforeAfter(self.stats.newline_tokens_full, self.stats.newline_tokens)

    @property
    def views(self) -> tuple[BeforeAfter, ...]:
        """Visual tokens by view: the thumbnail, then crops by their place."""
        full, kept = self.stats.view_tokens_full, self.stats.view_tokens_kept
        indices = sorted(map(int, full))
        return tuple(BeforeAfter(full[str(index)], kept.get(str(index), 0)) for index in indices)

    @property
    def retention(self) -> tuple[int, ...]:
        """Answers by actual retention in `RETENTION_BUCKETS`, from none kept to all kept."""
        counts = self.stats.retention
        return tuple(counts.get(f"{bucket:02d}", 0) for bucket in range(RETENTION_BUCKETS))

    @property
    def kv_bytes(self) -> BeforeAfter:
        """KV cache of prompts and answers."""
        return BeforeAfter(self.stats.kv_bytes_full, self.stats.kv_bytes)

    @property
    def flops(self) -> Mapping[str, BeforeAfter]:
        """Operations by stage."""
        full, kept = self.stats.flops_full, self.stats.flops
        return {
            stage: BeforeAfter(full[stage], kept.get(stage, 0)) for stage in STAGES if stage in full
        }

    @property
    def operations(self) -> BeforeAfter:
        """Operations of all stages."""
        flops = self.flops.values()
        return BeforeAfter(sum(f.full for f in flops), sum(f.kept for f in flops))

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Busy time by stage; stages may overlap."""
        return {stage: self.stats.stage_ns.get(stage, 0) / 1e9 for stage in STAGES}

    @property
    def input_starved_seconds(self) -> float:
        """Time in which workers waited for input while rows remained."""
        return self.stats.input_starved_ns / 1e9

    @property
    def rows_a_step(self) -> float | None:
        """Average number of rows that were decoded together."""
        steps = self.stats.decode_steps
        return self.stats.output_tokens / steps if steps else None

    @property
    def energy_joules(self) -> float:
        """Energy of devices; 0 where they do not report it."""
        return self.stats.energy_millijoules / 1e3

    @property
    def usd_per_1000(self) -> float | None:
        """Cost of a thousand encoded images; None without a price."""
        usd, images = self.costs.usd, self.stats.images
        return 1000 * usd / images if usd is not None and images else None

    @property
    def slowest(self) -> tuple[tuple[float, str], ...]:
        """Rows with the most busy time, as (seconds, row key)."""
        return tuple((ns / 1e9, key) for ns, key in self.stats.slowest)

    def rows_to_show(self, count: int) -> list[str]:
        """Keys of so many answered rows, those that differ most from uncompressed first."""
        least = [key for _, key in self.audit.least_similar] if self.audit is not None else []
        large = [key for kv_bytes, key in self.stats.largest if kv_bytes]
        return list(dict.fromkeys([*least, *large]))[:count]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, flat: own fields, those of `costs`, and figures from `stats` by their names."""
        data = asdict(self)
        del data["stats"]
        data |= data.pop("costs")
        data |= {name: getattr(self.stats, name) for name in _FROM_STATS}
        return data | {name: _plain(getattr(self, name)) for name in _DERIVED}


_FROM_STATS = (
    "by_status", "empty_answers", "images", "images_shared", "prompt_tokens",
    "prompt_tokens_shared", "output_tokens", "peak_device_bytes", "peak_host_bytes", "largest",
)  # fmt: skip
_DERIVED = (
    "visual", "newlines", "views", "retention", "kv_bytes", "flops", "stage_seconds",
    "input_starved_seconds", "rows_a_step", "energy_joules", "usd_per_1000", "slowest",
)  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def summarise(totals: RunTotals, prices: Prices) -> Summary:
    """Summarise an output.

    Args:
        totals: Totals of the output.
        prices: Prices of device time.
    """
    first, recipe, stats = totals.rounds[0], totals.run.recipe, totals.stats
    drivers = [driver for round_totals in totals.rounds for driver in round_totals.drivers]
    return Summary(
        output=totals.output,
        fingerprint=recipe.fingerprint(),
        recipe=recipe.model_dump(mode="json"),
        method=recipe.compression.method,
        retention_requested=recipe.compression.retention_requested,
        versions=first.run.versions,
        started=min((driver.started for driver in drivers), default=None),
        ended=max((driver.last_seen for driver in drivers), default=None),
        rounds=tuple(_round_summary(round_totals) for round_totals in totals.rounds),
        answered_rows=totals.answered_rows,
        stats=stats,
        throughput=_throughput(first),
        costs=Costs.from_totals(totals, prices),
        audit=_audit(stats),
        dead_letters=tuple(
            letter for round_totals in totals.rounds for letter in round_totals.dead_letters
        ),
        dead_letter_count=sum(round_totals.dead_letter_count for round_totals in totals.rounds),
    )


def _round_summary(round_totals: RoundTotals) -> RoundSummary:
    return RoundSummary(
        round_totals.number,
        round_totals.run.rows,
        round_totals.rows,
        round_totals.parts,
        dict(round_totals.stats.by_status),
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
        similarity=stats.similarity_millionths / stats.audits / MILLION,
        share_of_time=audit_share(stats),
        uncompressed_seconds=busy_seconds(stats.audit_uncompressed_ns),
        compressed_seconds=busy_seconds(stats.audit_compressed_ns),
        least_similar=tuple((1 - off / MILLION, key) for off, key in stats.least_similar),
        steps=tuple(
            EscalationStep(float(retention), rows, stats.escalated_agreed.get(retention, 0))
            for retention, rows in sorted(stats.escalated.items(), key=lambda item: float(item[0]))
        ),
    )


def _throughput(round_totals: RoundTotals) -> tuple[tuple[datetime, float, float], ...]:
    width = round_totals.timeline.width_seconds
    return tuple(
        (
            when,
            moment.answers / width,
            moment.input_starved_ns / max(1, moment.input_starved_ns + moment.busy_ns),
        )
        for when, moment in round_totals.timeline.moments()
    )
