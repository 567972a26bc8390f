"""`Method`: what a configuration can say of compression, known without the code that does it.

That code takes torch, which takes seconds and hundreds of megabytes to import; whoever only reads a
configuration (the command line, drivers, reports) is spared both. `gc2ray.compression` has the
methods themselves, `gc2ray.compression.packing` lays out what they keep; tests hold them to what is
said here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Positions = Literal["compact", "original"]
Newlines = Literal["kept_rows", "all", "none"]


@dataclass(frozen=True)
class Method:
    """A method of compression, as it is chosen.

    Attributes:
        settings: What it can be told.
        whole_from: The lowest retention at which images pass untouched; 0 where they always do,
            infinite where they never do.
    """

    settings: tuple[str, ...] = ("retention",)
    whole_from: float = 1.0

    @property
    def takes_retention(self) -> bool:
        """Whether its retention can be set."""
        return "retention" in self.settings


METHODS = {
    "globalcom2": Method(("retention", "temperature")),
    "globalcom2-reference": Method(("retention", "temperature"), whole_from=math.inf),
    "none": Method((), whole_from=0.0),
    "random": Method(),
    "uniform": Method(),
    "local": Method(),
    "thumbnail": Method((), whole_from=math.inf),
    "pool": Method(),
}
"""By the name in a recipe."""
