"""`Work`, and the least time in which a device can do it.

A roofline is a lower bound: products at the device's peak, memory at its full bandwidth, stages one
after the other, nothing for norms, softmax, launches and waiting. Each decoding step reads the
weights once, however many rows are live, and each row's own KV cache. Devices reach a share of this
bound (`ROOFLINE_SHARE`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gc2ray.core.intervals import Interval
from gc2ray.core.stats import RunStats, merged
from gc2ray.estimation.hardware import Peaks
from gc2ray.models.shape import ModelShape

ROOFLINE_SHARE = Interval(0.25, 0.4, 0.6)
"""Share of the roofline that a device is assumed to reach where no earlier run was measured:
LLaVA-NeXT-7B on an H200 reached 0.30 at retention 0.1 to 0.58 at 0.75 (`jobs.benchmarks.full_size`,
2026-11-26)."""
DTYPE_OF_SIZE = {2: "bfloat16", 4: "float32"}
"""Dtypes by the bytes of a number; both half precisions have the same peak."""


@dataclass(frozen=True)
class Work:
    """What answering some prompts asks of a device.

    Attributes:
        rows: Answers.
        output_tokens: Tokens of all answers.
        flops: Operations of matrix products by stage.
        cache_read_bytes: KV cache that decoding reads.
        decode_steps: Forwards of the language model.
    """

    rows: int = 0
    output_tokens: int = 0
    flops: Mapping[str, int] = field(default_factory=dict)
    cache_read_bytes: int = 0
    decode_steps: int = 0

    @staticmethod
    def from_stats(stats: RunStats) -> Work:
        """The work that a run did."""
        return Work(
            rows=stats.rows,
            output_tokens=stats.output_tokens,
            flops=stats.flops,
            cache_read_bytes=stats.cache_read_bytes,
            decode_steps=stats.decode_steps,
        )

    def __add__(self, other: Work) -> Work:
        return Work(
            rows=self.rows + other.rows,
            output_tokens=self.output_tokens + other.output_tokens,
            flops=merged((self.flops, other.flops)),
            cache_read_bytes=self.cache_read_bytes + other.cache_read_bytes,
            decode_steps=self.decode_steps + other.decode_steps,
        )

    def part(self, share: float) -> Work:
        """The work of a share of the prompts."""
        return Work(
            rows=round(self.rows * share),
            output_tokens=round(self.output_tokens * share),
            flops={stage: round(flops * share) for stage, flops in self.flops.items()},
            cache_read_bytes=round(self.cache_read_bytes * share),
            decode_steps=round(self.decode_steps * share),
        )


WorkRange = tuple[Work, Work, Work]
"""At the low end, the best guess and the high end."""


def roofline_seconds(work: Work, shape: ModelShape, peaks: Peaks) -> dict[str, float]:
    """Lower bound by stage, for one device.

    Args:
        work: Done, or to be done.
        shape: Shape of the model.
        peaks: Peaks of the device.
    """
    operations = peaks.operations(DTYPE_OF_SIZE[shape.itemsize])
    seconds = {stage: flops / operations for stage, flops in work.flops.items()}
    weights = work.decode_steps * shape.itemsize * shape.text.step_weights
    reading = (work.cache_read_bytes + weights) / peaks.bytes_per_second
    return seconds | {"generate": max(seconds.get("generate", 0.0), reading)}


def busy_seconds(stage_ns: Mapping[str, int]) -> dict[str, float]:
    """Seconds of the device by stage; images are decoded on the processor."""
    return {stage: ns / 1e9 for stage, ns in stage_ns.items() if stage != "image"}


def audit_share(stats: RunStats) -> float:
    """Share of the devices' answering time that audits took."""
    seconds = [
        sum(busy_seconds(stage_ns).values())
        for stage_ns in (stats.stage_ns, stats.audit_uncompressed_ns, stats.escalation_ns)
    ]
    return sum(seconds[1:]) / sum(seconds) if sum(seconds) else 0.0
