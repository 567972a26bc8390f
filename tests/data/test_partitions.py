"""Columns that folders spell out: values and types are those that pyarrow finds."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from gc2ray.data.listing import partition_types, partition_values
from tests.support.sources import refusal, rows_of, source_of, write

NULL_VALUE = "__HIVE_DEFAULT_PARTITION__"
TREES = [
    ["a=1", "a=2"],
    ["a=01", "a=2"],
    ["a=x", "a=2"],
    ["a=1", f"a={NULL_VALUE}"],
    ["a=1", "plain"],
    ["a=", "a=2"],
    ["a=x%20y", "a=%2F", "a=%C3%A9"],
    ["a%20b=1"],
    ["a=2147483647"],
    ["a=2147483648"],
    ["a=-5", "a=-0", "a=0x1F"],
    ["a=+5"],
    ["a= 5"],
    ["a=1.5", "a=1"],
    ["a=true"],
    ["a=1=2"],
    ["a=%zz"],
    ["a=1/a=2"],
    ["lang=de/year=2024", "lang=fr/year=2025", "lang=fr/plain/year=2025"],
]


@pytest.mark.parametrize("folders", TREES, ids=" ".join)
def test_values_and_types_are_those_of_pyarrow(tmp_path: Path, folders: list[str]) -> None:
    for number, folder in enumerate(folders):
        write(tmp_path / folder / f"{number}.parquet", number=[number])
    read = ds.dataset(tmp_path, partitioning="hive").to_table().sort_by("number")
    expected = read.drop_columns(["number"])
    said = [partition_values(f"{folder}/{number}.parquet") for number, folder in enumerate(folders)]
    kinds = partition_types(said)
    assert pa.schema(list(kinds.items())).equals(expected.schema.remove_metadata())
    columns = {
        name: pa.array([values.get(name) for values in said], pa.string()).cast(kind)
        for name, kind in kinds.items()
    }
    assert pa.table(columns).to_pylist() == expected.to_pylist()


def test_a_column_without_values_is_null() -> None:
    assert partition_types([partition_values(f"a={NULL_VALUE}/x")]) == {"a": pa.null()}
    assert partition_values("a=%ff/x") == {"a": "%ff"}, "not text, so it is what it is"
    assert partition_values("a=1.parquet") == {}, "a file is no folder"


def test_folders_are_columns(tmp_path: Path) -> None:
    """Prompts take them as they are spelled; what is kept is typed."""
    for month, rows in (("01", 2), ("11", 1)):
        write(tmp_path / f"in=x/lang=de/month={month}/a.parquet", image=[b"x"] * rows)
    write(tmp_path / "in=x/b.parquet", image=[b"x"])
    keep = ["month", {"lang": "language"}]
    source = source_of(tmp_path / "in=x", prompt={"template": "{month} {lang}"}, keep=keep)
    _, kept_columns = source.scan()
    assert kept_columns == pa.schema([("month", pa.int32()), ("language", pa.string())])
    rows = rows_of(source)
    assert [row.prompts for row in rows] == [(), ("01 de",), ("01 de",), ("11 de",)]
    assert [row.kept_columns.get("language", pa.scalar(None)).as_py() for row in rows] == [
        None,
        *["de"] * 3,
    ]
    assert rows[0].fault is not None
    assert rows[0].fault.message == "prompt column 'month' is null"
    prompts = rows_of(source_of(tmp_path / "in=x", prompt={"column": "lang"}))
    assert [row.prompts for row in prompts] == [(), ("de",), ("de",), ("de",)]
    missing = refusal(source_of(tmp_path / "in=x/*/*/*.parquet", keep=["in"]))
    assert missing.startswith("recipe.input: no column 'in' in lang=de/month=01/a.parquet")
    assert "lang, month" in missing


def test_a_folder_with_the_name_of_a_column_is_refused_where_it_is_used(tmp_path: Path) -> None:
    write(tmp_path / "lang=de/a.parquet", image=[b"x"], lang=["de"])
    message = refusal(source_of(tmp_path, keep=["lang"]))
    assert message.startswith("recipe.input: 'lang' is a column of lang=de/a.parquet, and folders ")
    assert len(rows_of(source_of(tmp_path))) == 1
