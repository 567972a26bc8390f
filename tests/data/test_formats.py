"""A format of input files is a line in the registry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest

from gc2ray.core.config.input import InputConfig
from gc2ray.core.shards import Span
from gc2ray.data.formats import registry
from gc2ray.data.formats.base import InputFile, RowFormat
from gc2ray.data.formats.registry import FORMATS, format_of
from gc2ray.data.source import Source


class CsvRows:
    """A text file as one row group."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.schema = table.schema

    def groups(self) -> tuple[int, ...]:
        return (len(self._table),)

    def group_bytes(self, columns: Sequence[str]) -> tuple[int, ...]:
        return (self._table.select(list(columns)).nbytes,)

    def batches(
        self, first: int, stop: int, columns: Sequence[str], host_memory_bytes: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        assert (first, stop, host_memory_bytes) == (0, 2, 1 << 20)
        yield 0, self._table.select(list(columns)).combine_chunks().to_batches()[0]


@contextmanager
def open_csv(file: InputFile) -> Iterator[CsvRows]:
    with file.open() as handle:
        yield CsvRows(pa.csv.read_csv(pa.BufferReader(handle.read())))


def test_a_format_that_is_registered_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = RowFormat(open_csv, lambda handle: handle.read())
    monkeypatch.setattr(registry, "FORMATS", {**FORMATS, ".csv": csv})
    (tmp_path / "a.csv").write_text("image,question\ncat.png,What is it?\ndog.png,How many?\n")
    config = InputConfig.model_validate(
        {
            "uri": f"{tmp_path}/*.csv",
            "prompt": {"column": "question"},
            "image_roots": [str(tmp_path)],
        }
    )
    source = Source(config)
    [file], _ = source.scan()
    assert (file.source, file.rows) == ("a.csv", 2)
    requests = list(source.read(Span(file.source, file.fingerprint, 0, 2), 1 << 20))
    assert [request.prompts for request in requests] == [("What is it?",), ("How many?",)]


@pytest.mark.parametrize(
    ("path", "ending"),
    [("a.parquet", ".parquet"), ("b/a.arrow", ".arrow"), ("part-0", ".parquet")],
)
def test_a_format_is_known_by_the_ending(path: str, ending: str) -> None:
    assert format_of(path) is FORMATS[ending]
