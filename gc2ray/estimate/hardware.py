"""`Hardware`: what accelerators can do and cost, from a YAML that users may replace.

`hardware.yaml` beside this module is the default; each figure in it has its source and date. Peaks
are dense ones, bandwidth is the device memory's, all as the vendor states them. Prices change:
whoever decides by them edits a copy (`--hardware FILE`).

Not covered: CPUs, interconnects, what storage and network cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from gc2ray.core.config.yaml_models import Frozen, parsed, read_yaml
from gc2ray.core.errors import ConfigError

DEFAULT = Path(__file__).with_name("hardware.yaml")
Positive = Annotated[float, Field(gt=0)]


class Price(Frozen):
    """What an hour of one device costs.

    Attributes:
        kind: `on_demand`, or `spot`: may be taken back.
        usd_per_hour: Of one device, its share of the machine around it included.
        where: Provider, machine and region.
        source: Where it was read.
        date: When.
    """

    kind: Literal["on_demand", "spot"]
    usd_per_hour: Positive
    where: str
    source: str
    date: date


class Hardware(Frozen):
    """A kind of accelerator.

    Attributes:
        name: For people.
        devices: What it calls itself.
        tflops: Dense peak by dtype, in 1e12 operations a second.
        gb_per_s: Of its memory, 1e9 bytes a second.
        memory_gib: Its memory, 2**30 bytes.
        source: Where these were read.
        date: When.
        prices: What it costs; none where nobody rents it out.
    """

    name: str
    devices: tuple[str, ...] = ()
    tflops: dict[str, Positive]
    gb_per_s: Positive
    memory_gib: Positive
    source: str
    date: date
    prices: tuple[Price, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Its memory."""
        return int(self.memory_gib * 2**30)

    def peak(self, dtype: str) -> float:
        """Dense operations a second; of a dtype that it has no figure for, those of float32."""
        return 1e12 * self.tflops.get(dtype, self.tflops["float32"])

    def usd_per_hour(self, kind: str) -> float | None:
        """The lowest price of a kind; None where there is none."""
        return min((p.usd_per_hour for p in self.prices if p.kind == kind), default=None)

    @field_validator("tflops")
    @classmethod
    def _known(cls, tflops: dict[str, float]) -> dict[str, float]:
        if not {"float32"} <= tflops.keys() <= {"float32", "bfloat16", "float16"}:
            raise ValueError("expected float32, and bfloat16 and float16 where they are faster")
        return tflops


class _Table(Frozen):
    hardware: tuple[Hardware, ...]


def load_hardware(path: Path | None = None) -> tuple[Hardware, ...]:
    """The table of a file, or the default one.

    Raises:
        ConfigError: It is none, is empty, or names a kind or a device twice.
    """
    path = path or DEFAULT
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected the key hardware at the top")
    try:
        table = parsed(_Table, data).hardware
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    names = [item.name for item in table] + [name for item in table for name in item.devices]
    if not table:
        raise ConfigError(f"{path}: there is no hardware in it")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: {twice[0]!r} is named twice")
    return table


def find_hardware(table: Sequence[Hardware], device: str) -> Hardware | None:
    """The kind that a device is of, by what it calls itself."""
    return next((item for item in table if device in item.devices), None)


@dataclass(frozen=True)
class Prices:
    """What device time costs.

    Attributes:
        table: Of hardware.
        kind: `on_demand` or `spot`.
        usd_per_hour: Of one device, whatever it is; None: as the table says.
    """

    table: tuple[Hardware, ...]
    kind: str = "on_demand"
    usd_per_hour: float | None = None

    def per_hour(self, device: str) -> float | None:
        """What an hour of a device costs."""
        if self.usd_per_hour is not None:
            return self.usd_per_hour
        hardware = find_hardware(self.table, device)
        return hardware.usd_per_hour(self.kind) if hardware else None

    def __str__(self) -> str:
        if self.usd_per_hour is not None:
            return f"${self.usd_per_hour:g} a device-hour, as given"
        return f"{self.kind.replace('_', ' ')}, as in the hardware table"
