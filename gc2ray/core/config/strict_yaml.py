"""A strict reader of YAML: it drops nothing and misreads nothing.

PyYAML takes the last of two equal keys, reads `010` as 8 and `1:30` as 90, and turns JSON escapes
beyond U+FFFF into lone surrogates. Here the first two are refused, with the line, and surrogates
are joined to characters. Only plain data is built, never objects.

Not covered: what the data mean (`gc2ray.core.config.job`).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def load(text: str) -> Any:
    """The one document of a text.

    Raises:
        ValueError: It is not YAML, has a key twice, or is ambiguous; in one line.
    """
    return _loaded(text, is_value=False)


def load_value(text: str) -> Any:
    """One value, all of it: a comment behind it is refused, because it may have been meant.

    Raises:
        ValueError: As `load`.
    """
    return _loaded(text, is_value=True)


def joined(text: str) -> str:
    """Text whose characters beyond U+FFFF came as pairs of surrogates, as JSON escapes them.

    Raises:
        ValueError: One of a pair is missing.
    """
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise ValueError("a lone surrogate") from error


def _loaded(text: str, *, is_value: bool) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            rest = text[node.end_mark.index :].strip() if node is not None else ""
            if is_value and rest:
                raise ValueError(f"{rest!r} would be a comment")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        reasons = [error.context, error.problem]
        raise ValueError(", ".join(filter(None, reasons)) + _place(error.problem_mark)) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except OverflowError as error:
        raise ValueError(f"not a valid character: {error}") from error


def _place(mark: yaml.Mark | None) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    """A number that everybody reads alike.

    Raises:
        yaml.YAMLError: It is octal or sexagesimal, or of thousands of digits.
    """
    text = str(node.value)
    if _OCTAL.fullmatch(text) or ":" in text:
        problem = f"{text} may mean several numbers; write it without leading zeros and colons"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    is_whole = node.tag == _NUMBERS[0]
    try:
        return loader.construct_yaml_int(node) if is_whole else loader.construct_yaml_float(node)
    except ValueError as error:
        raise yaml.constructor.ConstructorError(
            None, None, f"{text[:20]}… is no number: {error}", node.start_mark
        ) from error


def _date(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    """A date; what looks like one and is none stays text."""
    try:
        return loader.construct_yaml_timestamp(node)
    except ValueError:
        return node.value


class _Loader(yaml.SafeLoader):
    """Plain data, strictly."""

    yaml_constructors = {  # noqa: RUF012 - as PyYAML declares it
        **yaml.SafeLoader.yaml_constructors,
        **dict.fromkeys(_NUMBERS, _number),
        "tag:yaml.org,2002:timestamp": _date,
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written: those that are merged into it may have the same keys."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """A scalar with whole characters."""
        node = super().compose_scalar_node(anchor)
        try:
            node.value = joined(node.value)
        except ValueError as error:
            raise yaml.composer.ComposerError(None, None, str(error), node.start_mark) from error
        return node
