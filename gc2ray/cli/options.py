"""Arguments and options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer


def finite(value: float | list[float] | None) -> float | list[float] | None:
    """Refuse NaN, which no limit of an option stops, and infinity."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number.")
    return value


Config = Annotated[Path, typer.Argument(help="YAML with output, recipe and cluster.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings as a.b=c.", show_default=False)
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to join; else RAY_ADDRESS, else this machine.")
]
Extend = Annotated[
    bool, typer.Option("--extend", help="Also plan input files that are new since the run began.")
]
HardwareFile = Annotated[
    Path | None,
    typer.Option("--hardware", help="YAML of devices and prices in place of gc2ray's own."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Usd = Annotated[
    float | None,
    typer.Option(
        "--usd-per-hour", callback=finite, min=0, help="Price of one device, not the table's."
    ),
]
Output = Annotated[str, typer.Argument(help="Output directory or URL of a run.")]
