"""`DeviceEstimate`: what a run takes on one kind of device at one retention: memory, time, money.

Time is at a run's pace where one is known for the device, else a share of the device's roofline.

Not covered: several kinds of device in one run; storage and network as a bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import ConfigError
from gc2ray.core.intervals import Interval
from gc2ray.engine.batch_sizes import derive_batch_sizes
from gc2ray.engine.device import Memory
from gc2ray.estimate.hardware import Hardware
from gc2ray.estimate.measured_rates import MeasuredRates
from gc2ray.estimate.roofline import ROOFLINE_SHARE, roofline_seconds
from gc2ray.estimate.workload import Ends, Workload
from gc2ray.models.shape import ModelShape

START_SECONDS = Interval(20.0, 60.0, 240.0)
"""Of a run and of each worker, where no run has told: processes, libraries, weights from a disk."""
HOUR = 3600.0
GPU_CORES = 16
PRICES = ("on_demand", "spot")


@dataclass(frozen=True)
class DeviceEstimator:
    """What is compared, whatever the device.

    Attributes:
        shape: Of the model.
        cluster: How it is run; its number of workers is taken where it is set.
        hours: That the run may take, where it is not.
        pace: Of an earlier run.
    """

    shape: ModelShape
    cluster: Cluster
    hours: float
    pace: MeasuredRates | None = None

    def offer(self, forecast: Workload, hardware: Hardware) -> DeviceEstimate:
        """Of a kind of device."""
        nothing = DeviceEstimate(hardware.name, forecast.method, forecast.retention)
        memory = Memory(is_gpu=True, total_bytes=hardware.memory_bytes, cores=GPU_CORES)
        try:
            room = derive_batch_sizes(self.cluster, self.shape.needs(), memory).kv_tokens
        except ConfigError as error:
            return replace(nothing, misfit=str(error))
        if forecast.longest > room:
            told = f"the longest prompt and answer, {forecast.longest:,} tokens, against {room:,}"
            return replace(nothing, misfit=f"the KV cache is too small for {told}")
        mid = forecast.ends[1]
        each = forecast.prompt_tokens.mid + mid.output_tokens / max(1, mid.rows)
        live = max(1, int(room / max(1.0, each)))
        if self.pace is not None and self.pace.device in hardware.devices:
            clock, basis = partial(_at_pace, pace=self.pace), "run"
        else:
            clock, basis = partial(self._by_roofline, hardware=hardware, live=live), "roofline"
        offer = replace(nothing, live_rows=live, basis=basis)
        return self._priced(offer, forecast, clock, hardware)

    def _by_roofline(self, ends: Ends, hardware: Hardware, live: int) -> Interval:
        ideal = []
        for end in ends:
            steps = math.ceil(end.output_tokens / min(live, max(1, end.rows)))
            asked = replace(end, decode_steps=steps)
            ideal.append(sum(roofline_seconds(asked, self.shape, hardware).values()))
        low, mid, high = ideal
        share = ROOFLINE_SHARE
        return Interval(low / share.high, mid / share.mid, high / share.low)

    def known(self, forecast: Workload, pace: MeasuredRates) -> DeviceEstimate:
        """Of the device of an earlier run, which no table knows."""
        offer = DeviceEstimate(pace.device, forecast.method, forecast.retention, basis="run")
        return self._priced(offer, forecast, partial(_at_pace, pace=pace), None)

    def _priced(
        self,
        offer: DeviceEstimate,
        forecast: Workload,
        clock: Callable[[Ends], Interval],
        hardware: Hardware | None,
    ) -> DeviceEstimate:
        pace, prompts = self.pace, forecast.ends[1].rows
        audits = clock(forecast.audits)
        seconds = clock(forecast.ends).plus(audits)
        start = own = START_SECONDS
        if pace is not None and pace.start_seconds is not None and pace.worker_seconds is not None:
            start = Interval.exactly(pace.start_seconds).times(pace.factor)
            own = Interval.exactly(pace.worker_seconds).times(pace.factor)
        wanted = self.cluster.workers
        workers = wanted.max if wanted else _workers(seconds, start, self.hours)
        hours = start.plus(seconds.scaled(1 / workers)).scaled(1 / HOUR)
        paid = seconds.plus(own.scaled(workers)).scaled(1 / HOUR)
        prices = {kind: hardware.usd_per_hour(kind) for kind in PRICES} if hardware else {}
        usd = {k: paid.scaled(p) for k, p in prices.items() if p is not None}
        return replace(
            offer,
            device_seconds=seconds,
            audit_seconds=audits,
            worker_seconds=own,
            start_seconds=start,
            workers=workers,
            hours=hours,
            device_hours=paid,
            usd=usd,
            usd_per_1000={k: cost.scaled(1000 / max(1, prompts)) for k, cost in usd.items()},
        )


@dataclass(frozen=True)
class DeviceEstimate:
    """What a run takes on one kind of device at one retention.

    Attributes:
        hardware: Name of the kind, or of the device whose pace is known.
        method: The compression method.
        retention: The fraction KEPT, nominal.
        basis: Where time is from: a `run`, or a share of the `roofline`.
        misfit: Why the run does not fit the device, or None; nothing else is known then.
        live_rows: Rows of average length that fit its KV cache together.
        device_seconds: Of answering, second looks included.
        audit_seconds: Of those second looks.
        worker_seconds: Device-seconds of one worker beside answering.
        start_seconds: Until answers come.
        workers: As configured, or as many as end within the hours that were asked for.
        hours: From start to end, with so many workers.
        device_hours: What is paid for: answering, and what workers take beside it.
        usd: By kind of price.
        usd_per_1000: Likewise, of a thousand answers.
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


def _at_pace(ends: Ends, pace: MeasuredRates) -> Interval:
    low, mid, high = (pace.seconds(end) for end in ends)
    return Interval(low, mid, high).times(pace.factor)


def _workers(seconds: Interval, start: Interval, hours: float) -> int:
    """As many as are likely to end in time; at least 1, and no more than one for each minute."""
    left = hours * HOUR - start.mid
    if left <= 0:
        return max(1, math.ceil(seconds.mid / 60))
    return max(1, math.ceil(seconds.mid / left))
