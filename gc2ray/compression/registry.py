"""Compression methods, one file each, and their registry.

To add one: a frozen dataclass in a file of its own (see `local.py`), a line in `COMPRESSORS` and
one in `gc2ray.core.config.methods`, a row in the README's table. The contract tests run over the
registry.
"""

from __future__ import annotations

from typing import Any

from gc2ray.compression.base import Compressor
from gc2ray.compression.methods.average_pool import AveragePool
from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.compression.methods.globalcom2_reference import GlobalCom2Reference
from gc2ray.compression.methods.local import Local
from gc2ray.compression.methods.none import NoCompression
from gc2ray.compression.methods.random import Random
from gc2ray.compression.methods.thumbnail import ThumbnailOnly
from gc2ray.compression.methods.uniform import Uniform
from gc2ray.core.config.compression import METHODS

COMPRESSORS: dict[str, type[Compressor]] = {
    method.name: method
    for method in (
        GlobalCom2, GlobalCom2Reference, NoCompression, Random, Uniform, Local, ThumbnailOnly,
        AveragePool,
    )
}  # fmt: skip


def build(method: str, **settings: float) -> Compressor:
    """The method with those of the settings that it takes.

    Raises:
        KeyError: No such method.
        ValueError: A setting is out of range.
    """
    cls: Any = COMPRESSORS[method]
    taken = {name: settings[name] for name in METHODS[method].settings if name in settings}
    compressor: Compressor = cls(**taken)
    return compressor
