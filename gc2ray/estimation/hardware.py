"""`Hardware`: the peaks and prices of accelerators, from a YAML file that users may replace.

The default is `hardware.yaml` beside this module. Its figures come from vendors' data sheets and
clouds' price pages only; where none was read, the figure is empty and the entry says why. Peaks are
dense, bandwidth is that of device memory. Prices change, so decide by a copy of the file that you
keep up to date (`--hardware FILE`).

Not covered: CPUs, interconnects, the cost of storage and network.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from gc2ray.core.arguments import PriceKind, check_range
from gc2ray.core.config.yaml_models import Frozen, parsed, read_yaml, unknown_key
from gc2ray.core.errors import ConfigError

DEFAULT = Path(__file__).with_name("hardware.yaml")
_PEAKS = ("tflops", "gb_per_s", "memory_gib")
Positive = Annotated[float, Field(gt=0)]


class Price(Frozen):
    """The price of one device for an hour.

    Attributes:
        kind: `on_demand`, or `spot` for a device that may be taken back.
        usd_per_hour: Price of one device, including its share of the machine around it.
        where: Provider, machine and region.
        source: Where the price was read.
        date: When it was read.
    """

    kind: PriceKind
    usd_per_hour: Positive
    where: str
    source: str
    date: datetime.date


@dataclass(frozen=True)
class Peaks:
    """The peaks of a device.

    Attributes:
        tflops: Dense peak by dtype, in 1e12 operations a second.
        gb_per_s: Memory bandwidth in 1e9 bytes a second.
        memory_gib: Memory in 2**30 bytes.
    """

    tflops: Mapping[str, float]
    gb_per_s: float
    memory_gib: float

    @property
    def memory_bytes(self) -> int:
        """Memory of the device."""
        return int(self.memory_gib * 2**30)

    @property
    def bytes_per_second(self) -> float:
        """Memory bandwidth."""
        return self.gb_per_s * 1e9

    def operations(self, dtype: str) -> float:
        """Dense operations a second; a dtype without a figure of its own runs as float32."""
        return 1e12 * self.tflops.get(dtype, self.tflops["float32"])


class Hardware(Frozen):
    """A kind of accelerator. Figures without a reliable source are None.

    Attributes:
        name: For people.
        devices: Names that drivers report for it.
        tflops: Dense peak by dtype, in 1e12 operations a second.
        gb_per_s: Memory bandwidth in 1e9 bytes a second.
        memory_gib: Memory in 2**30 bytes.
        source: Where these three figures were read.
        date: When they were read.
        prices: Prices of one device; none where no price was read.
        missing: Why figures are empty.
    """

    name: str
    devices: tuple[str, ...] = ()
    tflops: dict[str, Positive] | None = None
    gb_per_s: Positive | None = None
    memory_gib: Positive | None = None
    source: str | None = None
    date: datetime.date | None = None
    prices: tuple[Price, ...] = ()
    missing: str | None = None

    @property
    def empty_figures(self) -> tuple[str, ...]:
        """Names of the peaks that are not known."""
        return tuple(name for name in _PEAKS if getattr(self, name) is None)

    @property
    def peaks(self) -> Peaks | None:
        """All peaks; None where one of them is not known."""
        if self.tflops is None or self.gb_per_s is None or self.memory_gib is None:
            return None
        return Peaks(self.tflops, self.gb_per_s, self.memory_gib)

    def usd_per_hour(self, kind: str) -> float | None:
        """The lowest price of a kind; None where there is none."""
        return min((p.usd_per_hour for p in self.prices if p.kind == kind), default=None)

    @field_validator("tflops")
    @classmethod
    def _check_dtypes(cls, tflops: dict[str, float] | None) -> dict[str, float] | None:
        dtypes = {"float32", "bfloat16", "float16"}
        if tflops is not None and not {"float32"} <= tflops.keys() <= dtypes:
            raise ValueError("expected float32, and bfloat16 and float16 where they are faster")
        return tflops

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        if self.empty_figures and not self.missing:
            raise ValueError(
                f"{' and '.join(self.empty_figures)} empty: give the figure, or say in `missing` "
                "why it is not known"
            )
        if len(self.empty_figures) < len(_PEAKS) and (self.source is None or self.date is None):
            raise ValueError("expected source and date of the figures")
        return self


class _Table(Frozen):
    hardware: tuple[Hardware, ...]


def load_hardware(path: str | Path | None = None) -> tuple[Hardware, ...]:
    """The table of a file, or the default one.

    Raises:
        ConfigError: The file is not such a table, is empty, or names a kind or a device twice.
    """
    path = Path(path or DEFAULT)
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
    """The entry of a device, by the name that its driver reports."""
    return next((item for item in table if device in item.devices), None)


def incomplete_notes(table: Sequence[Hardware], consequence: str) -> list[str]:
    """Which devices lack which peaks and why, in one line for all that lack the same.

    Args:
        table: Table of hardware.
        consequence: Start of the line, such as "No estimate for".
    """
    names: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for item in table:
        if item.empty_figures:
            names.setdefault((item.empty_figures, item.missing or ""), []).append(item.name)
    return [
        f"{consequence} {', '.join(devices)}: the hardware table has no {', '.join(figures)} "
        f"({why}); use --hardware FILE with your own."
        for (figures, why), devices in names.items()
    ]


@dataclass(frozen=True)
class Prices:
    """Prices of device time.

    Attributes:
        table: Table of hardware.
        kind: `on_demand` or `spot`.
        usd_per_hour: Price of any device; None takes the table's prices.

    Raises:
        ConfigError: There is no such kind, or the price is out of range.
    """

    table: tuple[Hardware, ...]
    kind: str = PriceKind.ON_DEMAND
    usd_per_hour: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in list(PriceKind):
            raise ConfigError(f"price: {unknown_key(self.kind, sorted(PriceKind))}")
        if self.usd_per_hour is not None:
            check_range("usd_per_hour", self.usd_per_hour, 0)

    def per_hour(self, device: str) -> float | None:
        """The price of a device for an hour; None where none is known."""
        if self.usd_per_hour is not None:
            return self.usd_per_hour
        hardware = find_hardware(self.table, device)
        return hardware.usd_per_hour(self.kind) if hardware else None

    def missing(self, devices: Sequence[str]) -> str | None:
        """One line that says why there is no cost; None where every device has a price."""
        unpriced = [device for device in devices if self.per_hour(device) is None]
        if not unpriced:
            return None
        reasons = {
            hardware.missing
            for device in unpriced
            if (hardware := find_hardware(self.table, device)) is not None and hardware.missing
        }
        why = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        return (
            f"No cost: the hardware table has no {_kind(self.kind)} price of "
            f"{', '.join(unpriced)}{why}; use --usd-per-hour, or --hardware FILE with your own."
        )

    def __str__(self) -> str:
        if self.usd_per_hour is not None:
            return f"${self.usd_per_hour:g} a device-hour, as given"
        return f"{_kind(self.kind)}, from the hardware table"


def _kind(kind: str) -> str:
    return kind.replace("_", "-")
