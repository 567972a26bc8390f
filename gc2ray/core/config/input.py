"""Settings of the input: which columns are read, how prompts are made, which images are accepted.

`InputConfig` is the section `recipe.input` of a job. `PromptConfig` also renders the text of a
row's prompt, and `ImageLimits` holds the limits for untrusted images.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from gc2ray.core.config.yaml_models import (
    Frozen,
)
from gc2ray.core.errors import BadRow, ConfigError, Status
from gc2ray.core.records import ANSWER_COLUMNS

ROOTS_KEY = "recipe.input.image_roots"
BYTES_KEY = "recipe.input.max_image_bytes"
PIXELS_KEY = "recipe.input.max_image_pixels"
"""The configuration keys behind `ImageLimits`; messages name them."""
MAX_PIXELS = 89_478_485
"""Most pixels a policy may allow: from here on Pillow itself warns, then refuses.

Silencing that would need a global of Pillow's or `warnings.catch_warnings`, and neither is safe
with threads. Equals `PIL.Image.MAX_IMAGE_PIXELS` as shipped.
"""
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

MIB = 1024 * 1024
MAX_IMAGE_BYTES = 64 * MIB
MAX_IMAGE_PIXELS = 80_000_000
"""Defaults of the limits for images."""


class PromptConfig(Frozen):
    """Where a prompt's text comes from: exactly one of the three.

    Attributes:
        column: Column of texts, or of lists of texts: several prompts, with an answer to each.
        template: Text with plain names of columns in braces, as `"{question} Be brief."`; nothing
            in it is evaluated.
        constant: The same text for every row.
    """

    column: str | None = None
    template: str | None = None
    constant: str | None = None

    @model_validator(mode="after")
    def _check_one_source(self) -> PromptConfig:
        if sum(value is not None for value in (self.column, self.template, self.constant)) != 1:
            raise ValueError("set exactly one of column, template, constant")
        if self.constant is not None and not self.constant.strip():
            raise ValueError("the constant is empty")
        if self.template is not None and not self.template.strip():
            raise ValueError("the template is empty")
        self.columns()
        return self

    def columns(self) -> tuple[str, ...]:
        """The input columns that the text needs.

        Raises:
            ValueError: The template has fields other than plain `{column}` ones.
        """
        if self.column is not None:
            return (self.column,)
        return () if self.template is None else _fields(self.template)

    def render(self, row: Mapping[str, Any]) -> str:
        """The text of a row.

        Raises:
            BadRow: A needed value is null, NaN or not text (`bad_prompt`).
        """
        values = {name: row[name] for name in self.columns()}
        for name, value in values.items():
            if value is None:
                raise BadRow(Status.BAD_PROMPT, f"prompt column {name!r} is null")
            if value != value:  # what pandas makes of a missing number
                raise BadRow(Status.BAD_PROMPT, f"prompt column {name!r} is not a number")
        if self.column is not None:
            text = values[self.column]
        else:
            text = self.constant if self.template is None else self.template.format(**values)
        if not isinstance(text, str):
            raise BadRow(Status.BAD_PROMPT, f"prompt column {self.column!r} holds {type(text)}")
        if not text.strip():
            raise BadRow(Status.BAD_PROMPT, "the prompt is empty")
        return text


class InputConfig(Frozen):
    """The rows.

    Attributes:
        uri: Parquet file, directory or glob, local or any fsspec URL; a directory that `datasets`
            has saved; `hf:OWNER/NAME?split=SPLIT`; or a list of these.
        image: Column of images: struct of bytes and path, binary, or path; or a list of them for
            several images a row, where an empty list is a row of text alone. Null: no row has an
            image.
        prompt: Where the prompt comes from.
        keep: Input columns to copy to the answers; `{answer: reference}` copies the input's
            column `answer` under the name `reference`.
        image_roots: Directories or URL prefixes under which image paths may be read.
        max_image_bytes: Largest image file; rows with a larger one are `bad_image`.
        max_image_pixels: Most pixels of an image, by its header; rows with more are `bad_image`.
    """

    uri: str | Annotated[tuple[str, ...], Field(min_length=1)]
    image: str | None = "image"
    prompt: PromptConfig
    keep: tuple[str | dict[str, str], ...] = ()
    image_roots: tuple[str, ...] = ()
    max_image_bytes: int = Field(default=MAX_IMAGE_BYTES, gt=0)
    max_image_pixels: int = Field(default=MAX_IMAGE_PIXELS, gt=0)

    @model_validator(mode="after")
    def _check_image_limits(self) -> InputConfig:
        self.image_limits()
        return self

    @field_validator("keep")
    @classmethod
    def _check_kept_names(
        cls, keep: tuple[str | dict[str, str], ...]
    ) -> tuple[str | dict[str, str], ...]:
        if any(isinstance(item, dict) and len(item) != 1 for item in keep):
            raise ValueError("a renamed column is written {column: name}, each by itself")
        names = [name for name, _ in map(_renamed, keep)]
        taken = [name for name in names if name in ANSWER_COLUMNS]
        if taken:
            raise ValueError(
                f"{taken[0]!r} is a column of the answers; write it under another name, as "
                f"{{{taken[0]}: input_{taken[0]}}}"
            )
        if len(set(names)) < len(names):
            raise ValueError("a column is named twice")
        return keep

    def uris(self) -> tuple[str, ...]:
        """The locations of the rows, one or several."""
        return (self.uri,) if isinstance(self.uri, str) else self.uri

    def image_limits(self) -> ImageLimits:
        """Limits for untrusted images."""
        return ImageLimits(
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            roots=self.image_roots,
        )

    def columns(self) -> tuple[str, ...]:
        """The input columns that are read."""
        kept = self.kept().values()
        images = () if self.image is None else (self.image,)
        return tuple(dict.fromkeys([*images, *self.prompt.columns(), *kept]))

    def kept(self) -> dict[str, str]:
        """Columns that are written back: by the name they are written under, the input's own."""
        return dict(map(_renamed, self.keep))


def _renamed(kept: str | dict[str, str]) -> tuple[str, str]:
    """The name that a kept column is written under, and its own."""
    if isinstance(kept, str):
        return kept, kept
    ((column, name),) = kept.items()
    return name, column


@lru_cache(maxsize=64)
def _fields(template: str) -> tuple[str, ...]:
    """The columns that a template names, each once; cached, because every row asks."""
    names: list[str] = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"template field {{{name}}}: only plain column names are allowed")
        names.append(name)
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class ImageLimits:
    """Limits for untrusted images; `gc2ray.data.image_decoding.MAX_SIDE` applies as well.

    Attributes:
        max_bytes: Most bytes of an encoded image.
        max_pixels: Most pixels, height times width; at most `MAX_PIXELS`.
        roots: Directories and URL prefixes under which images named by a path may lie; without
            any, none may. URLs of any protocol, http and https among them, need a root of theirs.

    Raises:
        ConfigError: A limit is out of range, or a root is empty, chained (`::`) or not plain text.
    """

    max_bytes: int = MAX_IMAGE_BYTES
    max_pixels: int = MAX_IMAGE_PIXELS
    roots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ConfigError(f"{BYTES_KEY} is {self.max_bytes}; it must be at least 1")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ConfigError(f"{PIXELS_KEY} is {self.max_pixels}; it must be 1 to {MAX_PIXELS}")
        for root in self.roots:
            if not root or "::" in root or CONTROL_CHARACTERS.search(root):
                raise ConfigError(f"{ROOTS_KEY}: {root!r} is neither a directory nor a URL prefix")
