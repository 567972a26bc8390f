"""Columns that folders spell out, as Hive and Spark name them: `lang=de/year=2024/a.parquet`.

A source's own name tells its values; only folders below the root are part of that. They are typed
as `pyarrow.dataset` types them, over all files: int32 where all values are, else text. That is how
they are written back. Prompts take them as they are spelled.

Not covered: other ways to name folders, as `2024/05/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from urllib.parse import unquote

import pyarrow as pa

NULL = "__HIVE_DEFAULT_PARTITION__"

Values = Mapping[str, str | None]


def values_of(source: str) -> dict[str, str | None]:
    """What the folders of a source say, by column."""
    found: dict[str, str | None] = {}
    for folder in source.split("/")[:-1]:
        name, equals, text = folder.partition("=")
        if equals:
            value = None if text == NULL else _decoded(text)
            found.setdefault(_decoded(name), value)
    return found


def kinds_of(sources: Iterable[Values]) -> dict[str, pa.DataType]:
    """The type of each column, by the values that it has in all sources."""
    values: dict[str, set[str | None]] = {}
    for source in sources:
        for name, value in source.items():
            values.setdefault(name, set()).add(value)
    return {name: _kind(known - {None}) for name, known in values.items()}


def _kind(values: set[str | None]) -> pa.DataType:
    if not values:
        return pa.null()
    try:
        pa.array(list(values), pa.string()).cast(pa.int32())
    except pa.ArrowInvalid:
        return pa.string()
    return pa.int32()


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text
