"""Compression methods that gc2ray does not bring, as a user has them."""

from __future__ import annotations

from pathlib import Path

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar

from gc2ray.compression.methods.local import Local


@dataclass(frozen=True)
class Own(Local):
    name: ClassVar[str] = "own"
"""


def write_method(folder: Path, module: str, source: str = SOURCE) -> Path:
    path = folder / f"{module}.py"
    path.write_text(source)
    return path


def install_method(folder: Path, name: str, value: str) -> None:
    """Give a folder of the Python path an installed package with an entry point."""
    about = folder / f"{name.replace('-', '_')}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[gc2ray.methods]\n{name} = {value}\n")
