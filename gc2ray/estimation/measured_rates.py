"""`MeasuredRates`: device-seconds by stage of an earlier run, for the same model and device.

Stages scale with their operations, decoding with output tokens, and the rest with the prompts.

Not covered: storage and network as a bottleneck; rates on another kind of device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gc2ray.core.errors import ConfigError
from gc2ray.core.intervals import Interval, ratio
from gc2ray.core.stats import RunStats
from gc2ray.core.usage import UsageKind
from gc2ray.estimation.roofline import Work, WorkRange, audit_share, busy_seconds
from gc2ray.output.totals import RunTotals

DRIFT = 0.12
"""Least half-width of the rates, as a share: the same run takes so much more or less the next time
(clock rates, other programs, caches)."""
SCALED_BY_FLOPS = ("encode", "compress", "prefill")


@dataclass(frozen=True)
class MeasuredRates:
    """How fast the workers of a run were.

    Attributes:
        device: Name that its driver reports.
        per_flop: Device-seconds of an operation, by stage.
        per_output_token: Device-seconds of decoding one token.
        per_answer: Device-seconds of an answer that belong to no stage.
        spread: Half-width of all of these, as a share, with 95 % confidence.
        worker_seconds: Device-seconds of one worker that belong to no answer: loading, calibrating,
            waiting; None where the run has no record of them.
        start_seconds: Seconds of the run without answers; None likewise.
        output_tokens: Tokens of an answer.
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
    def from_totals(totals: RunTotals) -> MeasuredRates:
        """The rates of the first round of an output.

        Raises:
            ConfigError: Nothing was answered, or on devices of several kinds.
        """
        round_totals = totals.rounds[0]
        parts, usage, stats = round_totals.groups, round_totals.usage, round_totals.stats
        devices = sorted({worker.device for worker in round_totals.workers})
        answered = stats.by_status.get("ok", 0)
        if not answered or not stats.flops:
            raise ConfigError(f"{totals.output}: there are no answers to measure rates from")
        if len(devices) != 1:
            raise ConfigError(f"{totals.output}: {_device_problem(devices)}")
        (device,), workers = devices, len(round_totals.workers)
        busy, once = busy_seconds(stats.stage_ns), 1 - audit_share(stats)
        useful = usage.seconds_for(UsageKind.USEFUL) or sum(busy.values()) / once
        answering = useful * once
        # On a GPU stages overlap, and their sum may be more than the time that passed.
        scale = min(1.0, answering / sum(busy.values()))
        per_flop = {
            stage: scale * busy[stage] / stats.flops[stage]
            for stage in SCALED_BY_FLOPS
            if stats.flops.get(stage)
        }
        wall = sum((d.last_seen - d.started).total_seconds() for d in round_totals.drivers)
        is_known = bool(workers and usage.total_seconds)
        return MeasuredRates(
            device=device,
            per_flop=per_flop,
            per_output_token=scale * busy.get("generate", 0.0) / max(1, stats.output_tokens),
            per_answer=max(0.0, answering - scale * sum(busy.values())) / answered,
            spread=_spread(parts, per_flop),
            worker_seconds=(usage.total_seconds - useful) / workers if is_known else None,
            start_seconds=max(0.0, wall - useful / workers) if is_known else None,
            output_tokens=_output_tokens(parts),
        )

    def seconds(self, work: Work) -> float:
        """Best guess of the device-seconds of some work."""
        flops = sum(rate * work.flops.get(stage, 0) for stage, rate in self.per_flop.items())
        decoding = self.per_output_token * work.output_tokens
        return flops + decoding + self.per_answer * work.rows

    def range_of(self, work: WorkRange) -> Interval:
        """Device-seconds of some work, with the uncertainty of the work and of the rates."""
        low, mid, high = (self.seconds(end) for end in work)
        return Interval(low, mid, high).times(self.factor)

    @property
    def factor(self) -> Interval:
        """Factor by which `seconds` may be off."""
        return Interval(1 - self.spread, 1.0, 1 + self.spread)


def _device_problem(devices: Sequence[str]) -> str:
    if not devices:
        return "no worker record names the device; --like needs one"
    return f"the run used several device types ({', '.join(devices)}); --like needs one"


def _spread(parts: Sequence[RunStats], per_flop: Mapping[str, float]) -> float:
    """How far the time of a part is from that of the whole run's rates, and the usual drift."""
    busy = [sum(part.stage_ns.get(stage, 0) for stage in per_flop) / 1e9 for part in parts]
    expected = [
        sum(rate * part.flops.get(stage, 0) for stage, rate in per_flop.items()) for part in parts
    ]
    relative = ratio(np.array(busy), np.array(expected))
    sampled = (relative.high - relative.low) / 2 / relative.mean
    return float(min(1.0, np.hypot(sampled, DRIFT)))


def _output_tokens(parts: Sequence[RunStats]) -> Interval:
    """Tokens of an answer, at least 1."""
    tokens = np.array([part.output_tokens for part in parts], np.float64)
    answered = np.array([part.by_status.get("ok", 0) for part in parts], np.float64)
    each = ratio(tokens, answered)
    return Interval(max(1.0, each.low), max(1.0, each.mean), max(1.0, each.high))
