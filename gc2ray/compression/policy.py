"""`CompressionPolicy`: how an image is compressed and packed. An engine has several, by name.

One is the recipe's and one compresses nothing; those of the audit keep more tokens, and others may
be added to compare them on the same engine. A request names its policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gc2ray.compression.base import Compressor, MaskCompressor
from gc2ray.compression.packing import Packing
from gc2ray.compression.registry import build_configured
from gc2ray.compression.row_budget import WholeShare, row_shares
from gc2ray.compression.selection import Selection
from gc2ray.compression.views import Views
from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.records import RECIPES_POLICY, UNCOMPRESSED


@dataclass(frozen=True)
class CompressionPolicy:
    """A method and a packing.

    Attributes:
        compressor: The method that chooses tokens.
        packing: Their newlines, markers and positions.
        retention_requested: The configured retention; 1 for methods without one.
        shares_budget: Whether the images of a row share one budget.
    """

    compressor: Compressor
    packing: Packing
    retention_requested: float
    shares_budget: bool = False

    @staticmethod
    def from_config(config: CompressionConfig) -> CompressionPolicy:
        """The policy of a configuration."""
        compressor = build_configured(config)
        packing = Packing(config.positions, config.newlines, config.markers)
        shares = config.budget == "row" and not config.keeps_everything
        return CompressionPolicy(compressor, packing, config.retention_requested, shares)

    def shares_of(self, row: Sequence[Views]) -> list[float] | None:
        """The retention of each image of a row; None where each has the policy's own."""
        if not self.shares_budget or len(row) < 2:
            return None
        return row_shares(row, self.retention_requested)

    def select(
        self, images: Sequence[Views], shares: Sequence[float | None] | None = None
    ) -> list[Selection]:
        """What is kept of images.

        Args:
            images: The images.
            shares: Of each its own retention, or None for the policy's.
        """
        shares = shares or [None] * len(images)
        alike = [image for image, share in zip(images, shares, strict=True) if share is None]
        kept = iter(self.compressor.many(alike))
        chosen = [
            next(kept) if share is None else self.at_share(share)(image)
            for image, share in zip(images, shares, strict=True)
        ]
        return self.packing.apply(images, chosen)

    def at_share(self, share: float) -> Compressor:
        """The method at another retention; at 1, too, the image is one of a compressed row."""
        if share == 1 and isinstance(self.compressor, MaskCompressor):
            return WholeShare()
        other: Any = replace(self.compressor, retention=share)  # type: ignore[type-var]
        return other  # type: ignore[no-any-return]


def policies_of(
    recipe: Recipe, others: Mapping[str, CompressionConfig]
) -> dict[str, CompressionPolicy]:
    """The policies of the recipe and its audit, the one without compression, and the others."""
    named = {
        **others,
        **recipe.escalation_steps(),
        RECIPES_POLICY: recipe.compression,
        UNCOMPRESSED: CompressionConfig(method="none"),
    }
    return {name: CompressionPolicy.from_config(config) for name, config in named.items()}
