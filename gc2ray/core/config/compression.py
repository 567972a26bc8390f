"""Which visual tokens to keep: `CompressionConfig`, and which methods of compression there are.

The methods' code takes torch, which takes seconds and hundreds of megabytes to import. Commands,
drivers and reports only read the configuration and need no torch, so the names of the methods and
the settings that each takes are here; tests hold `gc2ray.compression.registry` to them. Methods
that are not part of gc2ray (`gc2ray.core.config.method_source`) all take the settings of `CUSTOM`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from gc2ray.core.config.method_source import (
    MethodSource,
    entry_point_names,
    find_method,
    is_dotted,
)
from gc2ray.core.config.yaml_models import (
    Frozen,
    setting_error,
    unknown_key,
)
from gc2ray.core.errors import ConfigError

Positions = Literal["compact", "original"]
Newlines = Literal["kept_rows", "all", "none"]
Markers = Literal["all", "kept_views"]
Budget = Literal["image", "row"]
Score = Literal["class_token", "mean_distance", "mean_query", "received", "distinct"]
CLASSLESS_SCORE: Score = "received"
"""The default where the vision tower has no class token. The paper's own there is `mean_distance`;
on the demo's SmolVLM this one was clearly better (docs/quality.md)."""


class CompressionConfig(Frozen):
    """The compression method and its settings.

    Attributes:
        method: Name of the method: one of gc2ray's, or an entry point of the group
            `gc2ray.methods` of an installed package; or `package.module:Class`, where `allow_code`
            is true.
        retention: Fraction of visual tokens that is KEPT.
        temperature: Temperature of the softmax by which the thumbnail sets the crops' budgets; the
            higher, the more alike they are. Only methods that use the thumbnail's scores read it.
        positions: Whether kept tokens are numbered as they are read (`compact`), or keep the
            positions that they have without compression (`original`).
        newlines: Which canvas rows end in a newline token: those that keep a token, as in the
            paper, all, or none. Models without learned newlines have none to set.
        markers: Which of the text tokens around views stay (`<row_1_col_2>` and the like, in models
            that have them): all, or those of views that keep a token.
        budget: Whether each image of a row keeps its own share (`image`), or all images of a row
            share one (`row`), of which those that differ most from the others get more.
        score: How patches are scored (`class_token`, `mean_distance`, `mean_query`, `received`,
            `distinct`; the methods' page defines them). Null: `class_token` where the vision tower
            has one, else `received`.
        allow_code: Whether `method` may be `package.module:Class`, whose code is then run.
        source_sha256: Digest of the source file of a method that is not gc2ray's. None: it is
            filled in when the recipe is read. A changed source is a different recipe.
    """

    method: str = "globalcom2"
    retention: float = Field(default=0.25, gt=0, le=1)
    temperature: float = Field(default=10.0, gt=0)
    positions: Positions = "compact"
    newlines: Newlines = "kept_rows"
    markers: Markers = "all"
    budget: Budget = "image"
    score: Score | None = None
    allow_code: bool = Field(default=False, strict=True)
    source_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="before")
    @classmethod
    def _with_source(cls, data: Any) -> Any:
        """Fill in the digest of a method's source, where it is found."""
        if not isinstance(data, Mapping) or data.get("source_sha256") is not None:
            return data
        method = data.get("method")
        if not isinstance(method, str) or method in METHODS:
            return data
        try:
            return {**data, "source_sha256": find_method(method).sha256}
        except LookupError:  # `_check_method` says so
            return data

    @model_validator(mode="after")
    def _check_packing(self) -> CompressionConfig:
        """`globalcom2-reference` writes tokens where its authors do, whatever stands elsewhere."""
        packing = {"positions": "compact", "newlines": "kept_rows", "markers": "all"}
        for name, default in packing.items():
            if self.method == "globalcom2-reference" and getattr(self, name) != default:
                raise setting_error(
                    name, f"globalcom2-reference packs images as its authors do, with {default}"
                )
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> CompressionConfig:
        if self.budget == "row" and not self.kind.takes_retention:
            raise setting_error("budget", f"{self.method} has no retention to share out")
        return self

    @model_validator(mode="after")
    def _check_method(self) -> CompressionConfig:
        method = self.method
        if method in METHODS:
            if self.source_sha256 is not None:
                raise setting_error("source_sha256", f"{method!r} is a method of gc2ray: remove it")
            return self
        if is_dotted(method) and not self.allow_code:
            raise setting_error(
                "method",
                "this is Python code that is not part of gc2ray; if you trust it, set "
                "recipe.compression.allow_code: true",
            )
        if self.source_sha256 is None:
            raise setting_error("method", _why_unknown(method))
        return self

    def source(self) -> MethodSource | None:
        """The source of the method, checked; None for a method of gc2ray.

        Raises:
            ConfigError: It is not found, or is not the one that the recipe was read with.
        """
        if self.method in METHODS:
            return None
        try:
            source = find_method(self.method)
        except LookupError as error:
            raise ConfigError(f"recipe.compression.method: {error}") from error
        if source.sha256 != self.source_sha256:
            raise ConfigError(
                f"recipe.compression.source_sha256: the source of {self.method} is not that of the "
                f"recipe ({self.source_sha256}): {source.file} has {source.sha256}; restore that "
                "file, or choose a new output"
            )
        return source

    def check_source(self) -> None:
        """Refuse a method that is missing, changed, or not in its module; none of it is run.

        Raises:
            ConfigError: As `source`, or its module has no such class.
        """
        source = self.source()
        try:
            if source is not None:
                source.check_class()
        except LookupError as error:
            raise ConfigError(f"recipe.compression.method: {error}") from error

    @property
    def kind(self) -> Method:
        """What is known of the method without its code."""
        return METHODS.get(self.method, CUSTOM)

    @property
    def retention_requested(self) -> float:
        """The retention that the method is given; 1.0 for methods that take none."""
        return self.retention if self.kind.takes_retention else 1.0

    @property
    def keeps_everything(self) -> bool:
        """Whether images are left as they are."""
        return self.retention >= self.kind.whole_from


@dataclass(frozen=True)
class Method:
    """What is known of a compression method without its code.

    Attributes:
        settings: Names of the settings that it takes.
        whole_from: The lowest retention at which images pass untouched; 0 where they always do,
            infinite where they never do.
        only_model_type: The one model type whose images it can compress; None: it takes all.
    """

    settings: tuple[str, ...] = ("retention",)
    whole_from: float = 1.0
    only_model_type: str | None = None

    @property
    def takes_retention(self) -> bool:
        """Whether its retention can be set."""
        return "retention" in self.settings


CUSTOM = Method(("retention", "temperature"))
"""Every method that is not part of gc2ray: it takes a retention, and keeps everything at 1."""

METHODS = {
    "globalcom2": Method(("retention", "temperature")),
    "globalcom2-reference": Method(
        ("retention", "temperature"), whole_from=math.inf, only_model_type="llava_next"
    ),
    "none": Method((), whole_from=0.0),
    "random": Method(),
    "uniform": Method(),
    "local": Method(),
    "thumbnail": Method((), whole_from=math.inf),
    "pool": Method(),
}
"""By the name in a recipe."""


def check_suits(method: str, model_type: str) -> None:
    """Refuse a method that cannot compress a model's images.

    Raises:
        ConfigError: It cannot.
    """
    only = METHODS.get(method, CUSTOM).only_model_type
    if only not in (None, model_type):
        raise ConfigError(
            f"recipe.compression.method: {method} compresses the images of {only} models alone, "
            f"and this is a {model_type} model; choose another method"
        )


def _why_unknown(method: str) -> str:
    """Why there is no such method."""
    if not is_dotted(method) and method not in entry_point_names():
        return unknown_key(method, sorted({*METHODS, *entry_point_names()}))
    try:
        find_method(method)
    except LookupError as error:
        return str(error)
    return f"{method!r} cannot be read"
