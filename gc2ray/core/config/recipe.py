"""The recipe: everything that decides what an answer says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.config.generation import GenerationConfig, TakenOver
from gc2ray.core.config.input import InputConfig
from gc2ray.core.config.locations import (
    is_url,
)
from gc2ray.core.config.yaml_models import (
    Frozen,
    flattened,
    parsed,
)
from gc2ray.core.errors import ConfigError


class ModelConfig(Frozen):
    """The model that answers.

    `adapter` and `quantization` are not supported yet.

    Attributes:
        path: Directory, hub id or any fsspec URL.
        revision: Branch, tag or commit of a hub id; null is the hub's default branch.
        dtype: Precision of weights and activations.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    adapter: None = None
    quantization: None = None

    @property
    def is_url(self) -> bool:
        """Whether it is behind an fsspec URL."""
        return is_url(self.path)

    @property
    def is_local(self) -> bool:
        """Whether it is, or should be, a directory here; what is none of both is a hub id."""
        named = self.path.startswith((".", "/", "~")) or Path(self.path).is_dir()
        return named and not self.is_url

    def check(self) -> None:
        """Look for the model as far as that needs neither network nor its libraries.

        Raises:
            ConfigError: `path` is a local one, and there is no model.
        """
        if self.is_local and not (Path(self.path).expanduser() / "config.json").is_file():
            raise ConfigError(f"recipe.model.path: there is no model in {self.path}")


class AuditConfig(Frozen):
    """Audits: some prompts are answered a second time, uncompressed, and both answers compared.

    Attributes:
        share: Share of the prompts to audit; which ones depends on their keys alone.
        escalate: Rising retentions at which a row whose answers disagree is answered again, until
            one agrees; that answer, or else the last, is the row's. Empty: no row is.
        min_similarity: Answers that are less similar than this disagree.
    """

    share: float = Field(default=0.0, ge=0, le=1)
    escalate: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    min_similarity: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _check_escalation(self) -> AuditConfig:
        if list(self.escalate) != sorted(set(self.escalate)):
            raise ValueError("escalate: retentions must rise, one after the other")
        if self.escalate and not self.share:
            raise ValueError("escalate needs a share above 0: only audited rows are answered again")
        return self


class Recipe(Frozen):
    """What is computed. All runs into one output must have the same recipe."""

    model: ModelConfig
    compression: CompressionConfig = CompressionConfig()
    generation: GenerationConfig = GenerationConfig()
    audit: AuditConfig = AuditConfig()
    input: InputConfig

    @model_validator(mode="after")
    def _check_audit(self) -> Recipe:
        if self.audit.share and self.compression.keeps_everything:
            raise ValueError("audit.share is above 0, but nothing is compressed; set it to 0")
        lowest = min(self.audit.escalate, default=None)
        if lowest is not None and lowest <= self.compression.retention:
            raise ValueError(
                f"audit.escalate: {lowest:g} is not above the retention of the compression, "
                f"{self.compression.retention:g}"
            )
        if self.audit.escalate and not self.compression.kind.takes_retention:
            raise ValueError(f"audit.escalate: {self.compression.method} has no retention to raise")
        return self

    def escalation_steps(self) -> dict[str, CompressionConfig]:
        """The compressions that answer disagreeing audited rows again, by name, in order."""
        return {
            f"retention {retention:g}": self.compression.model_copy(update={"retention": retention})
            for retention in self.audit.escalate
        }

    def taken_over(self) -> TakenOver:
        """Settings that the recipe decides instead of the model's files and family."""
        compression = self.compression
        return replace(
            self.generation.taken_over(), score=compression.score, method=compression.method
        )

    def fingerprint(self) -> str:
        """Digest of every setting that is not its default: new settings change no old recipe."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, as stored with a run.

    Raises:
        ConfigError: As `load_job`.
    """
    return parsed(Recipe, data)


def recipe_difference(stored: Recipe, yours: Recipe) -> list[str]:
    """The settings that differ, one readable line each."""
    a, b = dict(flattened(stored.model_dump())), dict(flattened(yours.model_dump()))
    return [
        f"recipe.{key}: {a.get(key)!r} (stored) -> {b.get(key)!r} (yours)"
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]
