"""`DeviceEstimate`: memory, time and money of a run on one kind of device at one retention.

Time follows from the rates of an earlier run on the same device, or else from a share of the
device's roofline.

Not covered: several kinds of device in one run; storage and network as a bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gc2ray.core.arguments import PriceKind
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import ConfigError
from gc2ray.core.format import SECONDS_PER_HOUR
from gc2ray.core.intervals import Interval
from gc2ray.engine.batch_sizes import derive_batch_sizes
from gc2ray.engine.device import Memory
from gc2ray.estimation.hardware import Hardware, Peaks
from gc2ray.estimation.measured_rates import MeasuredRates
from gc2ray.estimation.roofline import ROOFLINE_SHARE, WorkRange, roofline_seconds
from gc2ray.estimation.workload import Workload
from gc2ray.models.shape import ModelShape

START_SECONDS = Interval(20.0, 60.0, 240.0)
"""Start-up of a run, and of each worker, where no earlier run was measured: processes, libraries,
weights from a disk."""
GPU_CORES = 16


@dataclass(frozen=True)
class RunSetup:
    """What estimates for all devices have in common.

    Attributes:
        shape: Shape of the model.
        cluster: Its settings; its number of workers is used where it is set.
        hours: Wanted duration of the run, where the number of workers is not set.
        rates: Measured in an earlier run; None where there is none.
    """

    shape: ModelShape
    cluster: Cluster
    hours: float
    rates: MeasuredRates | None = None

    def rates_for(self, hardware: Hardware) -> MeasuredRates | None:
        """The measured rates, where they were measured on this kind of device."""
        measured = self.rates is not None and self.rates.device in hardware.devices
        return self.rates if measured else None


@dataclass(frozen=True)
class DeviceEstimate:
    """Memory, time and money of a run on one kind of device at one retention.

    Attributes:
        hardware: Name of the kind of device.
        method: The compression method.
        retention: The fraction KEPT, nominal.
        basis: What time is based on: the rates of a `run`, or a share of the `roofline`.
        misfit: Why the run does not fit the device; all figures are None then.
        live_rows: Rows of average length that fit the KV cache together; None where the memory of
            the device is not known.
        device_seconds: Device-seconds of answering, audits included.
        audit_seconds: Device-seconds of audits.
        worker_seconds: Device-seconds of one worker that are not spent on answers.
        start_seconds: Until the first answers.
        workers: As configured, or as many as finish within the wanted hours.
        hours: Duration of the run with so many workers.
        device_hours: Paid device time: answering, and what workers need beside it.
        usd: Cost by kind of price.
        usd_per_1000: Cost of a thousand answers by kind of price.
    """

    hardware: str
    method: str
    retention: float
    basis: str = "roofline"
    misfit: str | None = None
    live_rows: int | None = None
    device_seconds: Interval | None = None
    audit_seconds: Interval | None = None
    worker_seconds: Interval | None = None
    start_seconds: Interval | None = None
    workers: int | None = None
    hours: Interval | None = None
    device_hours: Interval | None = None
    usd: Mapping[str, Interval] | None = None
    usd_per_1000: Mapping[str, Interval] | None = None


def estimate_device(workload: Workload, hardware: Hardware, setup: RunSetup) -> DeviceEstimate:
    """Estimate a run on one kind of device.

    Args:
        workload: At one retention.
        hardware: The kind of device: its peaks are known, or an earlier run was measured on it.
        setup: The same for all devices.

    Raises:
        ValueError: The device has neither peaks nor measured rates.
    """
    empty = DeviceEstimate(hardware.name, workload.method, workload.retention)
    peaks, rates, live_rows = hardware.peaks, setup.rates_for(hardware), None
    if peaks is not None:
        try:
            live_rows = _live_rows(workload, peaks, setup)
        except ConfigError as error:
            return replace(empty, misfit=str(error))
    if rates is not None:
        seconds, audits = (rates.range_of(work) for work in (workload.work, workload.audit_work))
        basis = "run"
    elif peaks is not None and live_rows is not None:
        seconds, audits = (
            _roofline_range(work, setup.shape, peaks, live_rows)
            for work in (workload.work, workload.audit_work)
        )
        basis = "roofline"
    else:
        raise ValueError(f"{hardware.name}: neither peaks nor measured rates")
    timed = replace(
        empty,
        basis=basis,
        live_rows=live_rows,
        device_seconds=seconds.plus(audits),
        audit_seconds=audits,
    )
    return _with_cost(timed, hardware, setup, answers=workload.work[1].rows)


def _live_rows(workload: Workload, peaks: Peaks, setup: RunSetup) -> int:
    """Rows of average length that fit the KV cache together.

    Raises:
        ConfigError: The model, or the longest prompt and answer, does not fit.
    """
    memory = Memory(is_gpu=True, total_bytes=peaks.memory_bytes, cores=GPU_CORES)
    kv_tokens = derive_batch_sizes(setup.cluster, setup.shape.needs(), memory).kv_tokens
    if workload.longest > kv_tokens:
        raise ConfigError(
            f"its KV cache holds {kv_tokens:,} tokens; the longest prompt and answer take "
            f"{workload.longest:,}"
        )
    mid = workload.work[1]
    row_tokens = workload.prompt_tokens.mid + mid.output_tokens / max(1, mid.rows)
    return max(1, int(kv_tokens / max(1.0, row_tokens)))


def _roofline_range(work: WorkRange, shape: ModelShape, peaks: Peaks, live_rows: int) -> Interval:
    ideal = []
    for end in work:
        steps = math.ceil(end.output_tokens / min(live_rows, max(1, end.rows)))
        stages = roofline_seconds(replace(end, decode_steps=steps), shape, peaks)
        ideal.append(sum(stages.values()))
    low, mid, high = ideal
    share = ROOFLINE_SHARE
    return Interval(low / share.high, mid / share.mid, high / share.low)


def _with_cost(
    timed: DeviceEstimate, hardware: Hardware, setup: RunSetup, answers: int
) -> DeviceEstimate:
    """Add workers, duration and money to an estimate of device-seconds."""
    rates, seconds = setup.rates, timed.device_seconds or Interval.exactly(0)
    start = own = START_SECONDS
    if rates is not None and rates.start_seconds is not None and rates.worker_seconds is not None:
        start = Interval.exactly(rates.start_seconds).times(rates.factor)
        own = Interval.exactly(rates.worker_seconds).times(rates.factor)
    configured = setup.cluster.workers
    workers = configured.max if configured else _workers(seconds, start, setup.hours)
    paid = seconds.plus(own.scaled(workers)).scaled(1 / SECONDS_PER_HOUR)
    prices = {str(kind): hardware.usd_per_hour(kind) for kind in PriceKind}
    usd = {kind: paid.scaled(price) for kind, price in prices.items() if price is not None}
    return replace(
        timed,
        worker_seconds=own,
        start_seconds=start,
        workers=workers,
        hours=start.plus(seconds.scaled(1 / workers)).scaled(1 / SECONDS_PER_HOUR),
        device_hours=paid,
        usd=usd,
        usd_per_1000={kind: cost.scaled(1000 / max(1, answers)) for kind, cost in usd.items()},
    )


def _workers(seconds: Interval, start: Interval, hours: float) -> int:
    """Number of workers that are likely to finish in time: 1 to one for each minute of work."""
    left = hours * SECONDS_PER_HOUR - start.mid
    if left <= 0:
        return max(1, math.ceil(seconds.mid / 60))
    return max(1, math.ceil(seconds.mid / left))
