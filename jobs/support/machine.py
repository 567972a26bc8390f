"""What this machine calls itself, and what a process takes of it, for figures that are quoted."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """Model of the CPU; its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return str(models[0]) if models else platform.machine()


def resident_bytes() -> int:
    """Memory of this process now; 0 where there is no /proc to tell."""
    path = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s*(\d+) kB", path.read_text() if path.exists() else "")
    return int(found.group(1)) * 1024 if found else 0
