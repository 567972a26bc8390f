"""How numbers are told to people: lengths, sizes, money, shares."""

from __future__ import annotations

from collections.abc import Callable

from gc2ray.core.intervals import Interval

MOST_HOURS = 48
"""Longer ones are told in days."""
LETTERS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))


def shown(value: Interval, text: Callable[[float], str] | None = None) -> str:
    """A number, with what it may be instead; exact ones to the last digit."""
    if value.is_exact:
        return (text or whole)(value.mid)
    text = text or short
    return f"{text(value.mid)} ({text(value.low)} to {text(value.high)})"


def short(value: float) -> str:
    """Three digits of large numbers."""
    for size, letter in LETTERS:
        if value >= size:
            unit = max(size, 1e3) if letter != "k" else 1e3
            return f"{precise(value / unit)}{letter}"
    return whole(value)


def precise(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(hours: float) -> str:
    """Hours as a person says them."""
    seconds = hours * 3600
    if seconds < 120:
        return f"{precise(seconds)} s" if seconds < 10 else f"{seconds:.0f} s"
    if hours < 2:
        return f"{seconds / 60:.0f} min"
    return f"{hours:.1f} h" if hours < MOST_HOURS else f"{hours / 24:.1f} d"


def money(usd: float) -> str:
    """Dollars, with cents while they matter."""
    return f"${usd:,.0f}" if usd >= 100 else f"${usd:.2f}" if usd >= 0.095 else f"${usd:.2g}"


def whole(value: float) -> str:
    """To the last digit."""
    return f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A share, to a tenth of a hundredth; nothing where it is not known."""
    return "" if share is None else f"{share:.1%}"


def size(size_bytes: float) -> str:
    """Of something in memory."""
    return f"{size_bytes / 1e9:.3g} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.3g} MB"
