"""Values that arguments and options choose from; to import them loads nothing else."""

from __future__ import annotations

from enum import StrEnum


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
