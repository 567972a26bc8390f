"""Compression methods, one file each, and their registry.

To add one: a frozen dataclass in a file of its own (see `local.py`), a line in `COMPRESSORS`, a row
in the README's table. The contract tests run over the registry.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gc2ray.compression.compressor import Compressor
from gc2ray.compression.globalcom2 import GlobalCom2
from gc2ray.compression.globalcom2_reference import GlobalCom2Reference
from gc2ray.compression.local import Local
from gc2ray.compression.none import NoCompression
from gc2ray.compression.pool import Pool
from gc2ray.compression.random import Random
from gc2ray.compression.thumbnail import ThumbnailOnly
from gc2ray.compression.uniform import Uniform

COMPRESSORS: dict[str, type[Compressor]] = {
    method.name: method
    for method in (
        GlobalCom2, GlobalCom2Reference, NoCompression, Random, Uniform, Local, ThumbnailOnly, Pool,
    )
}  # fmt: skip


def parameters(method: str) -> tuple[str, ...]:
    """The settings that a method takes."""
    cls: Any = COMPRESSORS[method]
    return tuple(item.name for item in fields(cls))


def build(method: str, **settings: float) -> Compressor:
    """The method with those of the settings that it takes.

    Raises:
        KeyError: No such method.
        ValueError: A setting is out of range.
    """
    cls: Any = COMPRESSORS[method]
    taken = {name: settings[name] for name in parameters(method) if name in settings}
    compressor: Compressor = cls(**taken)
    return compressor
