"""The page of all settings, from the pydantic models: `python -m jobs.docs_configuration`.

Rewrites `docs/configuration.md`. What a setting means is said once, in the docstring of its model
under "Attributes"; a test fails when the page is not what this makes of them.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gc2ray.core.config.job import Job

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
MIB = 1 << 20
INTRODUCTION = """\
<!-- Made by `python -m jobs.docs_configuration` from gc2ray/core/config/; edit the docstrings. -->

# Configuration

A job is one YAML file with three keys at the top: `output`, `recipe` and `cluster`. The recipe
decides what the answers say and is fixed for an output; the cluster decides how the work is done
and may change from run to run. [Getting started](getting-started.md#your-first-job) has an example.
Every setting can also be given
[on the command line](getting-started.md#settings-on-the-command-line).
"""
_PLAIN_TYPES = {
    str: "text", int: "whole number", float: "number", bool: "`true` or `false`", NoneType: "null",
}  # fmt: skip
_BOUNDS: tuple[tuple[type, str, str], ...] = (
    (Gt, "gt", "> "), (Ge, "ge", "≥ "), (Lt, "lt", "< "), (Le, "le", "≤ "),
)  # fmt: skip
_ENTRY = re.compile(r"^ {4}(\w+): ", re.MULTILINE)


def main() -> int:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")
    return 0


def render() -> str:
    """The whole page."""
    return INTRODUCTION + "".join(_sections(Job, ""))


def settings(model: type[BaseModel] = Job, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting that has a value, by its dotted name, and what it means."""
    meanings = _attributes(model)
    for name, _ in _own(model):
        yield f"{prefix}{name}", meanings.get(name, "")
    for name, below in _below(model):
        yield from settings(below, f"{prefix}{name}.")


def _sections(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A heading, what the model is, a table of its settings, and the same for those below it."""
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    yield f"\n## {title}\n\n{_summary(model)}\n"
    rows = [_row(prefix, name, field, _attributes(model)) for name, field in _own(model)]
    if rows:
        yield "\n| setting | type | default | meaning |\n|---|---|---|---|\n"
        yield "".join(rows)
    for name, below in _below(model):
        yield from _sections(below, f"{prefix}{name}.")


def _own(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """The settings of a model that are values; what can only be null is not one yet."""
    return [
        (name, field)
        for name, field in model.model_fields.items()
        if field.annotation is not NoneType and not _is_section(field.annotation)
    ]


def _below(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The groups of settings in a model, those that stand beside a plain value among them."""
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if _is_section(kind):
                yield name, kind


def _row(prefix: str, name: str, field: FieldInfo, meanings: dict[str, str]) -> str:
    kind = _kind(field.annotation, field.metadata)
    default = "required" if field.is_required() else f"`{_default(field.default)}`{_mib(field)}"
    return f"| `{prefix}{name}` | {kind} | {default} | {_cell(meanings.get(name, ''))} |\n"


def _is_section(annotation: Any) -> bool:
    """Whether a setting is nothing but a group of settings."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0], arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_kind(kind, metadata) for kind in arguments)
    if origin is tuple:
        item = _kind(arguments[0])
        return f"list of ({item})" if " or " in item else f"list of {_plural(item)}"
    if origin is dict:
        return "`{column: name}`"
    if _is_section(annotation):
        return "`{" + ", ".join(annotation.model_fields) + "}`"
    words = _PLAIN_TYPES[annotation]
    return words if annotation not in (int, float) else words + _bounds(metadata)


def _plural(kind: str) -> str:
    return kind.replace("number", "numbers", 1).replace("text", "texts", 1)


def _bounds(metadata: Sequence[Any]) -> str:
    """Bounds of a number, as ` > 0, ≤ 1`."""
    nested = (m.metadata if isinstance(m, FieldInfo) else [m] for m in metadata)
    bounds = [
        (sign, getattr(item, name))
        for item in itertools.chain.from_iterable(nested)
        for kind, name, sign in _BOUNDS
        if isinstance(item, kind)
    ]
    texts = [f"{sign}{bound:g}" for sign, bound in bounds if bound < MIB]
    return f" {', '.join(texts)}" if texts else ""


def _default(value: object) -> str:
    """A default as it would stand in YAML."""
    if isinstance(value, tuple):
        return json.dumps(list(value))
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _mib(field: FieldInfo) -> str:
    """Large sizes once more, in MiB."""
    value = field.default
    is_size = isinstance(value, int) and value >= MIB and value % MIB == 0
    return f" ({value // MIB} MiB)" if is_size else ""


def _summary(model: type[BaseModel]) -> str:
    """What stands before the attributes of a docstring."""
    return inspect.cleandoc(model.__doc__ or "").partition("\nAttributes:")[0].strip()


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """The attributes of a docstring: what each is, in one line."""
    text = inspect.cleandoc(model.__doc__ or "").partition("\nAttributes:\n")[2]
    parts = _ENTRY.split(text)[1:]
    names, bodies = parts[::2], parts[1::2]
    return {name: " ".join(body.split()) for name, body in zip(names, bodies, strict=True)}


def _cell(text: str) -> str:
    """Text as a cell of a table can hold it, for readers who write YAML."""
    return re.sub(r"\bNone\b", "null", text).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
