"""Inputs for tests: Parquet files, their `Source`, and what it reads or refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gc2ray.core.errors import ConfigError
from gc2ray.core.records import Request
from gc2ray.core.shards import SourceFile, Span
from gc2ray.data.source import Source
from tests.support.rows import make_recipe

MEMORY = 1 << 20
COLUMN = {"column": "prompt"}


def source_of(uri: Path | str | list[str], **changes: Any) -> Source:
    """The input of a recipe; `changes` are other settings of `recipe.input`."""
    where = uri if isinstance(uri, list) else str(uri)
    settings_ = {f"input__{key}": value for key, value in {"uri": where, **changes}.items()}
    return Source(make_recipe("model", **settings_).input)


def write(path: Path, *, row_group: int = 1000, **columns: Any) -> Path:
    """A Parquet file of these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def parquet_bytes(**changes: Any) -> bytes:
    """A Parquet file of two rows, with other columns or more."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x", b"y"], "prompt": ["q", "r"], **changes}), sink)
    return sink.getvalue()


def whole(file: SourceFile) -> Span:
    """All rows of a file."""
    return Span(file.source, file.fingerprint, 0, file.rows)


def rows_of(source: Source, memory: int = MEMORY) -> list[Request]:
    files, _ = source.scan()
    return [request for file in files for request in source.read(whole(file), memory)]


def refusal(source: Source) -> str:
    """Why a scan of it is refused."""
    with pytest.raises(ConfigError) as caught:
        source.scan()
    return str(caught.value)


def sources_in(source: Source) -> list[str]:
    return [file.source for file in source.scan()[0]]


def sources_read(source: Source) -> list[str]:
    """The sources of an input, each of which has been read."""
    found = sources_in(source)
    assert list(dict.fromkeys(row.source for row in rows_of(source))) == found
    return found
