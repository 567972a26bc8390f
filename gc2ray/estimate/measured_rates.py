"""`MeasuredRates`: device-seconds by stage of an earlier run, for the same model and device.

Stages scale with their operations, decoding with output tokens, what is left with the prompts.

Not covered: storage and network as a bottleneck; a run's pace on another kind of device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gc2ray.core.errors import ConfigError
from gc2ray.core.intervals import Interval, ratio
from gc2ray.core.stats import RunStats
from gc2ray.core.usage import UsageKind
from gc2ray.estimate.roofline import (
    audit_share,
    busy_seconds,
)
from gc2ray.output.totals import RunTotals

DRIFT = 0.12
"""Half-width, as a share, that a pace has at least: the same run takes so much more or less the
next time (clocks, neighbours, caches)."""
SCALED_BY_FLOPS = ("encode", "compress", "prefill")


@dataclass(frozen=True)
class MeasuredRates:
    """How fast a run's workers were.

    Attributes:
        device: What theirs calls itself.
        per_flop: Device-seconds of an operation, by stage.
        per_output_token: Device-seconds of decoding one.
        per_answer: Device-seconds of an answer that no stage accounts for.
        spread: Half-width of all of these, as a share, with 95 % confidence.
        worker_seconds: Device-seconds of one worker that no answer accounts for: loading,
            calibrating, idling; None where the run does not tell.
        start_seconds: Of the run's time, those in which it did not answer; likewise.
        output_tokens: Of an answer.
    """

    device: str
    per_flop: Mapping[str, float]
    per_output_token: float
    per_answer: float
    spread: float
    worker_seconds: float | None
    start_seconds: float | None
    output_tokens: Interval

    @staticmethod
    def from_totals(ledger: RunTotals) -> MeasuredRates:
        """The pace of an output's first round.

        Raises:
            ConfigError: Nothing was answered, or on devices of several kinds.
        """
        entry = ledger.rounds[0]
        parts, bill, total = entry.groups, entry.usage, entry.stats
        devices = sorted({worker.device for worker in entry.workers})
        answered = total.by_status.get("ok", 0)
        if not answered or not total.flops:
            raise ConfigError(f"{ledger.output}: nothing was answered that tells a pace")
        if len(devices) != 1:
            told = ", ".join(devices) or "nobody knows what"
            raise ConfigError(
                f"{ledger.output}: ran on {told}; a pace is that of one kind of device"
            )
        (device,), workers = devices, len(entry.workers)
        busy, once = busy_seconds(total.stage_ns), 1 - audit_share(total)
        useful = bill.of(UsageKind.USEFUL) or sum(busy.values()) / once
        answering = useful * once
        # On a GPU stages overlap, and their sum may be more than the time that passed.
        scale = min(1.0, answering / sum(busy.values()))
        per_flop = {
            stage: scale * busy[stage] / total.flops[stage]
            for stage in SCALED_BY_FLOPS
            if total.flops.get(stage)
        }
        wall = sum((d.last_seen - d.started).total_seconds() for d in entry.drivers)
        is_known = bool(workers and bill.total_seconds)
        return MeasuredRates(
            device=device,
            per_flop=per_flop,
            per_output_token=scale * busy.get("generate", 0.0) / max(1, total.output_tokens),
            per_answer=max(0.0, answering - scale * sum(busy.values())) / answered,
            spread=_spread(parts, per_flop),
            worker_seconds=(bill.total_seconds - useful) / workers if is_known else None,
            start_seconds=max(0.0, wall - useful / workers) if is_known else None,
            output_tokens=_output_tokens(parts),
        )

    def seconds(self, stats: RunStats) -> float:
        """Device-seconds of what is asked."""
        flops = sum(rate * stats.flops.get(stage, 0) for stage, rate in self.per_flop.items())
        decoding = self.per_output_token * stats.output_tokens
        return flops + decoding + self.per_answer * stats.rows

    @property
    def factor(self) -> Interval:
        """What its `seconds` may be off by."""
        return Interval(1 - self.spread, 1.0, 1 + self.spread)


def _spread(parts: Sequence[RunStats], per_flop: Mapping[str, float]) -> float:
    """How far a part's time is from what the whole run's pace says of it, and the usual drift."""
    busy = [sum(part.stage_ns.get(stage, 0) for stage in per_flop) / 1e9 for part in parts]
    expected = [
        sum(rate * part.flops.get(stage, 0) for stage, rate in per_flop.items()) for part in parts
    ]
    found = ratio(np.array(busy), np.array(expected))
    sampled = (found.high - found.low) / 2 / found.mean
    return float(min(1.0, np.hypot(sampled, DRIFT)))


def _output_tokens(parts: Sequence[RunStats]) -> Interval:
    """Tokens of an answer, at least 1."""
    tokens = np.array([part.output_tokens for part in parts], np.float64)
    answered = np.array([part.by_status.get("ok", 0) for part in parts], np.float64)
    found = ratio(tokens, answered)
    return Interval(max(1.0, found.low), max(1.0, found.mean), max(1.0, found.high))
