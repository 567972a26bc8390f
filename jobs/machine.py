"""What this machine calls itself, for figures that are quoted."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """Model of the CPU; its architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return str(models[0]) if models else platform.machine()
