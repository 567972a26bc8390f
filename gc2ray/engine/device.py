"""`EnergyMeter`: what a GPU has consumed, by its own counter (NVML, Volta and newer).

The counter is the whole GPU's, whoever uses it: of workers that share one, each is to take its
share. Devices that do not tell (CPUs, parts of a GPU, old drivers) have consumed 0.

Not covered: the host's own consumption.
"""

from __future__ import annotations

import pynvml


class EnergyMeter:
    """Counts from when it is made.

    Args:
        uuid: Of the GPU, as CUDA has it; None where there is none.
    """

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._before = self._counter()

    def millijoules(self) -> int:
        """Consumed so far; 0 where the device does not tell."""
        now = self._counter()
        return 0 if now is None or self._before is None else now - self._before

    def _counter(self) -> int | None:
        if self._uuid is None:
            return None
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{self._uuid}")
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except pynvml.NVMLError:
            return None
