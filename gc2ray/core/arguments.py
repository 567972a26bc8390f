"""Arguments of the Python API, which are options of the command line: choices, limits and forms.

To import this loads no large library.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from gc2ray.core.errors import ConfigError

T = TypeVar("T", str, float)


class PriceKind(StrEnum):
    """Kinds of prices in a table of hardware; a `spot` device may be taken back."""

    ON_DEMAND = "on_demand"
    SPOT = "spot"


class ReferenceLists(StrEnum):
    """What a list of references is where rows have several prompts.

    `any`: each entry is right for every prompt; `each`: one entry for each prompt, in order.
    """

    ANY = "any"
    EACH = "each"


def as_tuple(values: T | Iterable[T] | None) -> tuple[T, ...]:
    """No value, one, or several as a tuple: a single text is not taken for its letters."""
    given: Any = values  # numbers of numpy are of neither type
    if given is None:
        return ()
    is_one = isinstance(given, str) or not isinstance(given, Iterable)
    return (given,) if is_one else tuple(given)


def check_range(name: str, value: object, least: float, most: float = sys.float_info.max) -> None:
    """Refuse a number that is out of range, and what is no number.

    Args:
        name: Name of the argument.
        value: Its value; NaN and infinity are out of every range.
        least: Smallest value that is accepted.
        most: Largest value that is accepted.

    Raises:
        ConfigError: Names the argument and the range.
    """
    if not isinstance(value, Real) or not least <= cast(float, value) <= most:
        limits = f"at least {least:g}" if most == sys.float_info.max else f"{least:g} to {most:g}"
        raise ConfigError(f"{name}: expected a number, {limits}; got {value!r}")


def check_count(name: str, value: object, least: int) -> None:
    """Refuse a number that is no whole number, or too small.

    Raises:
        ConfigError: Names the argument and the limit.
    """
    if not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name}: expected a whole number, at least {least}; got {value!r}")
