"""Which files an input is: folders, patterns, lists of them, and any storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gc2ray.data import input_entries
from tests.support.sources import MEMORY, refusal, rows_of, source_of, sources_in, whole, write


@pytest.mark.parametrize(
    ("pattern", "sources"),
    [
        ("", ["a.parquet", "b.parquet", "sub/c.parquet", "sub/deep/d.parquet"]),
        ("/", ["a.parquet", "b.parquet", "sub/c.parquet", "sub/deep/d.parquet"]),
        ("/sub", ["c.parquet", "deep/d.parquet"]),
        ("/a.parquet", ["a.parquet"]),
        ("/*.parquet", ["a.parquet", "b.parquet"]),
        ("/?.parquet", ["a.parquet", "b.parquet"]),
        ("/*/c.parquet", ["sub/c.parquet"]),
        ("/sub/**/*.parquet", ["c.parquet", "deep/d.parquet"]),
        ("/s*/d*/*", ["sub/deep/d.parquet"]),
    ],
)
def test_files_are_found_and_hidden_ones_are_not(
    parquet_tree: Path, pattern: str, sources: list[str]
) -> None:
    source = source_of(f"{parquet_tree}{pattern}")
    files, _ = source.scan()
    assert [file.source for file in files] == sources
    assert [request.source for request in rows_of(source)] == sources


def test_a_directory_may_be_called_like_a_file(tmp_path: Path) -> None:
    write(tmp_path / "in.parquet" / "part-0.parquet", image=[b"x"])
    files, _ = source_of(tmp_path / "in.parquet").scan()
    assert [file.source for file in files] == ["part-0.parquet"]


def test_a_file_that_is_named_may_be_hidden(tmp_path: Path) -> None:
    write(tmp_path / "_x.parquet", image=[b"x"])
    files, _ = source_of(tmp_path / "_x.parquet").scan()
    assert [file.source for file in files] == ["_x.parquet"]


@pytest.mark.parametrize("name", ["", "gone", "gone.parquet", "gone/*.parquet", "_hidden"])
def test_no_files_are_a_configuration_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "_hidden").mkdir()
    assert "no Parquet files at" in refusal(source_of(tmp_path / name))


def test_an_unknown_protocol_is_a_configuration_error() -> None:
    assert refusal(source_of("nosuch://x/y")).startswith("recipe.input.uri: ")


@pytest.mark.parametrize("pattern", ["", "/**/*.parquet"])
def test_any_filesystem_is_read(in_memory: str, pattern: str) -> None:
    rows = rows_of(source_of(f"{in_memory}{pattern}", keep=["id"]))
    assert [(row.row_key, row.kept_columns["id"].as_py()) for row in rows] == [
        ("a.parquet#0", 1),
        ("a.parquet#1", 2),
        ("sub/b.parquet#0", 1),
        ("sub/b.parquet#1", 2),
    ]


def test_a_list_is_read_entry_by_entry_and_no_file_twice(parquet_tree: Path) -> None:
    uris = [f"{parquet_tree}/sub", f"{parquet_tree}/a.parquet", f"{parquet_tree}/*.parquet"]
    source = source_of(uris)
    assert sources_in(source) == ["sub/c.parquet", "sub/deep/d.parquet", "a.parquet", "b.parquet"]
    assert [row.source for row in rows_of(source)] == sources_in(source)


def test_sources_of_a_list_are_named_below_what_its_entries_share(tmp_path: Path) -> None:
    for name in ("x/in/a.parquet", "y/in/a.parquet"):
        write(tmp_path / name, image=[name.encode()], prompt=["q"])
    source = source_of([f"{tmp_path}/y/in", f"{tmp_path}/x/in"])
    rows = rows_of(source)
    assert [row.row_key for row in rows] == ["y/in/a.parquet#0", "x/in/a.parquet#0"]
    assert [row.images[0].data for row in rows] == [b"y/in/a.parquet", b"x/in/a.parquet"]


def test_a_list_on_two_storages_is_refused(parquet_tree: Path, in_memory: str) -> None:
    refused = refusal(source_of([str(parquet_tree), in_memory]))
    assert "its entries are on different storages" in refused


def test_an_entry_without_files_adds_none(parquet_tree: Path) -> None:
    assert sources_in(source_of([f"{parquet_tree}/nothing", f"{parquet_tree}/a.parquet"])) == [
        "a.parquet"
    ]
    refused = refusal(source_of([f"{parquet_tree}/nothing", f"{parquet_tree}/none"]))
    assert f"no Parquet files at {parquet_tree}/nothing, {parquet_tree}/none" in refused


def test_the_entries_of_an_input_are_looked_up_once(
    parquet_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of its entries are files has to be asked of the storage, one by one."""
    located: list[str] = []
    from_uri = input_entries.InputEntry.from_uri

    def noted(uri: str, *rest: Any) -> input_entries.InputEntry:
        located.append(uri)
        return from_uri(uri, *rest)

    monkeypatch.setattr(input_entries.InputEntry, "from_uri", noted)
    uris = [f"{parquet_tree}/a.parquet", f"{parquet_tree}/b.parquet"]
    source = source_of(uris)
    files, _ = source.scan()
    for file in (*files, *files):
        assert len(list(source.read(whole(file), MEMORY))) == 1
    assert located == uris
