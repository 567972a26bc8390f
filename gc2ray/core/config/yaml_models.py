"""Pydantic models out of YAML: frozen, strict, with overrides and errors that name the setting."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gc2ray.core.config.strict_yaml import joined, load, load_value
from gc2ray.core.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
MAX_PROBLEMS = 20
"""Most problems of a configuration that one message lists."""
_OF_SETTING = "setting"
_SHOWN = 300
"""Most characters of a value in a message: YAML aliases can make gigabytes of a few lines."""


class Frozen(BaseModel):
    """Base of all settings: immutable; refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _check_booleans(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false, which YAML also reads from `on` and `no`, in other settings."""
        takes_boolean = cls.model_fields[info.field_name or ""].annotation is bool
        if isinstance(value, bool) and not takes_boolean:
            raise ValueError("true and false (yes, no, on, off) are not valid here")
        return value


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or has a key twice.
    """
    try:
        return load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def flattened(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings, by its dotted path."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def apply_override(model: type[BaseModel], data: dict[str, Any], override: object) -> None:
    """Put one `a.b=c` into the data of a configuration, in place."""
    if not isinstance(override, str):
        raise ConfigError(f"{override!r}: overrides are text, written a.b=c")
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override!r}: overrides are written a.b=c")
    for key in keys[:-1]:
        below = data.get(key)
        if below is None:  # not there, or a section without anything in it
            below = data[key] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{override!r}: {key} has no keys below it")
        data = below
    try:
        data[keys[-1]] = _value(_kinds(model, keys), text)
    except ValueError as error:
        raise ConfigError(
            f"{override!r}: {text!r} is not valid YAML: {error}; text with any of : # [ {{ in it "
            "goes into quotes there"
        ) from error


def _kinds(model: type[BaseModel], keys: Sequence[str]) -> set[Any]:
    """The types that a setting accepts; none if there is no setting of that name."""
    kinds: set[Any] = {model}
    for key in keys:
        models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        fields = models[0].model_fields if models else {}
        if key not in fields:
            return set()
        kind = fields[key].annotation
        kinds = {*get_args(kind)} if get_origin(kind) in (Union, UnionType) else {kind}
    return kinds


def _value(kinds: set[Any], text: str) -> Any:
    """The value of an override, as one of the types that the setting accepts.

    Text is taken as typed, blanks included; other values are read as YAML.

    Raises:
        ValueError: The text is not a value.
    """
    if text in ("", "null"):
        return None
    texts = {kind for kind in kinds if kind is str or get_origin(kind) is Literal}
    if texts and texts == kinds - {NoneType}:
        return text
    if str not in texts:
        return load_value(text)
    try:
        value = load_value(text) if text.startswith("[") else text
    except ValueError:
        return text
    return value if isinstance(value, list) else text


def parsed(model: type[M], data: Mapping[str, Any]) -> M:
    """Validate plain data as a pydantic model.

    Raises:
        ConfigError: The data is invalid; a line for each problem, with its path and, for an unknown
            key, the nearest valid one.
    """
    try:
        validated = model.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        lines = [_explain(model, problem) for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            lines.append(f"and {len(problems) - MAX_PROBLEMS} more problems")
        raise ConfigError("\n".join(lines)) from error
    _check_characters(validated)
    return validated


def _check_characters(validated: BaseModel) -> None:
    """Refuse text that cannot be written anywhere: bytes of a shell that are no characters.

    Raises:
        ConfigError: There is some; the message names its setting.
    """
    for key, value in flattened(validated.model_dump()):
        for text in value if isinstance(value, tuple) else (value,):
            try:
                joined(text if isinstance(text, str) else "").encode()
            except ValueError as error:
                raise ConfigError(f"{key}: {text!a} is not text: {error}") from error


def _explain(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    given = problem["input"]
    if problem["type"] == _OF_SETTING:
        path.append(problem["ctx"]["setting"])
        given = given.get(path[-1]) if isinstance(given, Mapping) else None
    where = ".".join(path) or "configuration"
    if problem["type"] == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        return f"{where}: {unknown_key(path[-1], list(owner.model_fields))}"
    if problem["type"] == "missing":
        return f"{where}: required, and not set"
    if problem["type"] == "none_required":
        return f"{where}: not supported yet; leave it null"
    unquoted = problem["type"] == "string_type" and not isinstance(given, list | dict | None)
    hint = " (in quotes it is text)" if unquoted else ""
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{hint}; got {_shown(given)}"


def _shown(value: object) -> str:
    """A value for people: at most a few hundred characters of it."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 3, 10, 10, 10
    short.maxstring = short.maxother = _SHOWN
    text = short.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _model_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for key in path:
        if key.isdigit():  # a place in a list of them
            continue
        kind = model.model_fields[key].annotation
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            break
        model = kind
    return model


def setting_error(setting: str, message: str) -> PydanticCustomError:
    """An error of a check over several settings; the message will name the one at fault."""
    return PydanticCustomError(_OF_SETTING, "{message}", {"setting": setting, "message": message})


def unknown_key(key: str, known: Sequence[str]) -> str:
    """What to say of a key that nobody knows."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {str(near[0])!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {key!r}; {hint}"
