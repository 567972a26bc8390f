"""Formats numbers for people: durations, sizes, money, shares."""

from __future__ import annotations

from collections.abc import Callable

from gc2ray.core.intervals import Interval

SECONDS_PER_HOUR = 3600.0
MOST_HOURS = 48
"""Longer durations are given in days."""
SI_PREFIXES = (
    (1e21, "Z"),
    (1e18, "E"),
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
)
WHOLE_BELOW = 1e4
"""Smaller numbers are written in full in texts."""


def interval_text(value: Interval, text: Callable[[float], str] | None = None) -> str:
    """A number with its bounds; an exact number to the last digit."""
    if value.is_exact:
        return (text or whole)(value.mid)
    text = text or short
    return f"{text(value.mid)} ({text(value.low)} to {text(value.high)})"


def short(value: float) -> str:
    """Three digits of large numbers, with an SI prefix; small ones in full."""
    if value < WHOLE_BELOW:
        return whole(value)
    unit, prefix = _si_prefix(value)
    return f"{precise(value / unit)}{prefix}"


def si_number(value: float) -> str:
    """Three digits with an SI prefix, as on the axis of a chart."""
    unit, prefix = _si_prefix(value)
    return f"{value / unit:.3g}{prefix}"


def _si_prefix(value: float) -> tuple[float, str]:
    return next((item for item in SI_PREFIXES if abs(value) >= item[0]), (1.0, ""))


def precise(value: float) -> str:
    """A number with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(hours: float) -> str:
    """A number of hours, in a unit that suits it."""
    return seconds_text(hours * SECONDS_PER_HOUR)


def seconds_text(seconds: float) -> str:
    """A number of seconds, in a unit that suits it."""
    hours = seconds / SECONDS_PER_HOUR
    if seconds < 120:
        return f"{precise(seconds)} s" if seconds < 10 else f"{seconds:.0f} s"
    if hours < 2:
        return f"{seconds / 60:.0f} min"
    return f"{hours:.1f} h" if hours < MOST_HOURS else f"{hours / 24:.1f} d"


def money(usd: float) -> str:
    """Dollars, with cents while they matter."""
    return f"${usd:,.0f}" if usd >= 100 else f"${usd:.2f}" if usd >= 0.095 else f"${usd:.2g}"


def whole(value: float) -> str:
    """A number to the last digit before the point."""
    return f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A share in percent with one decimal; empty if it is not known."""
    return "" if share is None else f"{share:.1%}"


def size(size_bytes: float) -> str:
    """A number of bytes in MB or GB."""
    return f"{size_bytes / 1e9:.3g} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.3g} MB"
