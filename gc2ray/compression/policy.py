"""`CompressionPolicy`: how an image is compressed and packed. An engine has several, by name.

One is the recipe's and one compresses nothing; those of the audit keep more tokens, and others may
be added to compare them on the same engine. A request names its policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gc2ray.compression.base import Compressor
from gc2ray.compression.packing import Packing
from gc2ray.compression.registry import build_configured
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
    """

    compressor: Compressor
    packing: Packing
    retention_requested: float

    @staticmethod
    def from_config(config: CompressionConfig) -> CompressionPolicy:
        """The policy of a configuration."""
        compressor = build_configured(config)
        packing = Packing(config.positions, config.newlines, config.markers)
        return CompressionPolicy(compressor, packing, config.retention_requested)


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
