"""The device of an engine: its name, memory and cores, and what it has consumed.

`EnergyMeter` reads a GPU's own counter (NVML, Volta and newer). It counts the whole GPU, with all
processes that use it, so workers that share a GPU each take their share. Devices without a counter
(CPUs, parts of a GPU, old drivers) have consumed 0.

Not covered: energy that the host consumes.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pynvml

if TYPE_CHECKING:
    import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")
PROCESS_STATUS = Path("/proc/self/status")


class EnergyMeter:
    """Counts energy from when it is made.

    Args:
        uuid: The GPU's UUID as CUDA has it; None without a GPU.
    """

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._before = self._counter()

    def millijoules(self) -> int:
        """Energy consumed so far; 0 where the device has no counter."""
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


def own_device() -> str:
    """The device on which this process runs models: the GPU that it was given, else the CPU."""
    return "cuda" if _cuda().is_available() else "cpu"


def memory(device: torch.device) -> Memory:
    """Memory of the device: all of a GPU's, the free part of a host's."""
    if device.type == "cuda":
        total = _cuda().get_device_properties(device).total_memory
        return Memory(is_gpu=True, total_bytes=total, cores=cores())
    return Memory(is_gpu=False, total_bytes=free_host_bytes(), cores=cores())


def device_name(device: torch.device) -> str:
    """The device's own name."""
    return str(_cuda().get_device_name(device)) if device.type == "cuda" else device.type


def own_device_name() -> str:
    """The name of the device on which this process runs models."""
    import torch  # late, as in `_cuda`

    return device_name(torch.device(own_device()))


def gpu_uuid(device: torch.device) -> str | None:
    """The UUID of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    return str(_cuda().get_device_properties(device).uuid)


@dataclass(frozen=True)
class Memory:
    """Memory and cores of a device: all memory of a GPU, or the free part of a host's."""

    is_gpu: bool
    total_bytes: int
    cores: int


def free_host_bytes() -> int:
    """Memory that this process may still take, of the machine and of its control group."""
    free = psutil.virtual_memory().available
    limit, used = CONTROL_GROUP / "memory.max", CONTROL_GROUP / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def peak_host_bytes() -> int:
    """Largest resident set of this process so far.

    psutil knows the current size only, and `ru_maxrss` on Linux is inherited from the parent over
    fork and exec, so it is read where there is no /proc (macOS) only.
    """
    if not PROCESS_STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    lines = PROCESS_STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(psutil.Process, "cpu_affinity"):  # not on macOS
        return len(psutil.Process().cpu_affinity())
    return psutil.cpu_count() or 1


def _cuda() -> Any:
    """The CUDA module of torch, imported late: a worker reads its memory before it needs torch."""
    import torch

    return torch.cuda
