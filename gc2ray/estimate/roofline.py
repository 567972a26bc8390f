"""The least time that a device can take for some work, and the share of it that is reached.

A roofline is a lower bound: products at the device's peak, memory at its full bandwidth, stages one
after the other, nothing for norms, softmax, launches and waiting. Decoding reads the weights once a
step, whatever is live, and each row's own KV cache. Devices reach a share of it (`ROOFLINE_SHARE`).
"""

from __future__ import annotations

from collections.abc import Mapping

from gc2ray.core.intervals import Interval
from gc2ray.core.stats import RunStats
from gc2ray.estimate.hardware import Hardware
from gc2ray.models.shape import ModelShape

ROOFLINE_SHARE = Interval(0.25, 0.4, 0.6)
"""Of the roofline, what a device is taken to reach where no run has told: LLaVA-NeXT-7B on an H200
reached 0.30 at retention 0.1 to 0.58 at 0.75 (`jobs.benchmarks.full_size`, 2026-11-26)."""
DTYPES = {2: "bfloat16", 4: "float32"}
"""By bytes of a number; both half precisions have one peak."""


def roofline_seconds(stats: RunStats, shape: ModelShape, hardware: Hardware) -> dict[str, float]:
    """Lower bound by stage, for one device.

    Args:
        stats: What was, or will be, asked: `flops`, `cache_read_bytes`, `decode_steps`.
        shape: Of the model.
        hardware: The device.
    """
    peak = hardware.peak(DTYPES[shape.itemsize])
    seconds = {stage: flops / peak for stage, flops in stats.flops.items()}
    weights = stats.decode_steps * shape.itemsize * shape.text.step_weights
    reading = (stats.cache_read_bytes + weights) / (hardware.gb_per_s * 1e9)
    return seconds | {"generate": max(seconds.get("generate", 0.0), reading)}


def busy_seconds(stage_ns: Mapping[str, int]) -> dict[str, float]:
    """Of a device, by stage: decoding of images is the processor's."""
    return {stage: ns / 1e9 for stage, ns in stage_ns.items() if stage != "image"}


def audit_share(stats: RunStats) -> float:
    """Of the time in which a device answered, what second looks at some answers took."""
    seconds = [
        sum(busy_seconds(stage_ns).values())
        for stage_ns in (stats.stage_ns, stats.audit_uncompressed_ns, stats.escalation_ns)
    ]
    return sum(seconds[1:]) / sum(seconds) if sum(seconds) else 0.0
