"""Which visual tokens to keep: `CompressionConfig`, and which methods of compression there are.

The methods' code takes torch, which takes seconds and hundreds of megabytes to import. Commands,
drivers and reports only read the configuration and need no torch, so the names of the methods and
the settings that each takes are here; tests hold `gc2ray.compression.registry` to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from gc2ray.core.config.yaml_models import (
    Frozen,
    unknown_key,
)

Positions = Literal["compact", "original"]
Newlines = Literal["kept_rows", "all", "none"]


class CompressionConfig(Frozen):
    """The compression method and its settings.

    Attributes:
        method: Name of the method.
        retention: Fraction of visual tokens that is KEPT.
        temperature: Of the softmax by which the thumbnail sets the crops' budgets; the higher, the
            more alike they are. Only methods that use the thumbnail's scores read it.
        positions: Whether kept tokens are numbered as they are read (`compact`), or keep the
            positions that they have without compression (`original`).
        newlines: Which canvas rows end in a newline token: those that keep a token, as in the
            paper, all, or none.
    """

    method: str = "globalcom2"
    retention: float = Field(default=0.25, gt=0, le=1)
    temperature: float = Field(default=10.0, gt=0)
    positions: Positions = "compact"
    newlines: Newlines = "kept_rows"

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(unknown_key(method, sorted(METHODS)))
        return method

    @property
    def kind(self) -> Method:
        """What is known of the method."""
        return METHODS[self.method]

    @property
    def retention_requested(self) -> float:
        """What the method was asked to keep: 1.0 where it has no retention to set."""
        return self.retention if self.kind.takes_retention else 1.0

    @property
    def keeps_everything(self) -> bool:
        """Whether images are left as they are."""
        return self.retention >= self.kind.whole_from


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
