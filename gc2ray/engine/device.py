"""The device of an engine: its name, memory and cores, and what it has consumed.

`EnergyMeter` reads a GPU's own counter (NVML, Volta and newer). The counter is the whole GPU's,
whoever uses it: of workers that share one, each is to take its share. Devices that do not tell
(CPUs, parts of a GPU, old drivers) have consumed 0.

Not covered: the host's own consumption.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pynvml
import torch


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


def own_device() -> str:
    """Where this process runs models: the GPU that it was given, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory(device: torch.device) -> Memory:
    """All memory of a GPU; what is free of a host's."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Memory(is_gpu=True, total_bytes=total, cores=cores())
    return Memory(is_gpu=False, total_bytes=free_host_bytes(), cores=cores())


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def gpu_uuid(device: torch.device) -> str | None:
    """A GPU's name among all; None where there is none."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


@dataclass(frozen=True)
class Memory:
    """The device's memory: all of a GPU, or what is free of a host's."""

    is_gpu: bool
    total_bytes: int
    cores: int


def free_host_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its control group."""
    known = Path("/proc/meminfo")
    if not known.exists():  # no Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    lines = known.read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
