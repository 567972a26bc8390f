"""A GPU's energy, from a library that only looks like NVML, and the host's free memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from gc2ray.engine import device
from gc2ray.engine.device import EnergyMeter, free_host_bytes, peak_host_bytes

COUNTER = [5_000, 5_700, 9_000]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    counter = iter(COUNTER)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: asked.append(name))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda _: next(counter))
    return asked


def test_energy_counts_from_creation(nvml: list[str]) -> None:
    meter = EnergyMeter("1234")
    assert (meter.millijoules(), meter.millijoules()) == (700, 4_000)
    assert set(nvml) == {"GPU-1234"}


def test_a_device_without_a_counter_reports_zero(
    nvml: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> int:
        raise pynvml.NVMLError_NotSupported

    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    assert EnergyMeter("1234").millijoules() == 0
    assert EnergyMeter(None).millijoules() == 0


def test_a_machine_without_a_driver_reports_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert EnergyMeter("1234").millijoules() == 0


@pytest.mark.parametrize(
    ("most", "used", "free"),
    [("900", 300, 600), ("900", 950, 0), ("max", 300, 1000), (None, 0, 1000)],
)
def test_free_memory_ends_at_the_control_groups_limit(
    most: str | None, used: int, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(device, "CONTROL_GROUP", tmp_path)
    if most is not None:
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
    assert free_host_bytes() == free


def test_the_peak_is_the_processes_own_and_not_its_parents() -> None:
    """A child that was started by a large process has not been large itself."""
    held = bytearray(b"x" * (400 << 20))
    script = "from gc2ray.engine.device import peak_host_bytes; print(peak_host_bytes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 0 < int(done.stdout) < len(held) < peak_host_bytes()
