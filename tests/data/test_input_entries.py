"""Which files an input is: every one that is there, once, under the name that it always had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import s3fs

from gc2ray.data.store import Store
from tests.support.sources import parquet_bytes, refusal, source_of, sources_read, write


def put(*paths: Path) -> None:
    """A Parquet file of one row at each."""
    for path in paths:
        write(path, image=[str(path).encode()], prompt=["q"])


def link(place: Path, target: Path | str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


# --- links --------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """An input of one folder, and of links to everything that there is."""
    data = tmp_path / "data"
    put(data / "disk1/a.parquet", data / "x.parquet", tmp_path / "disk2/b.parquet")
    put(tmp_path / "disk2/deep/c.parquet", tmp_path / "hidden/d.parquet")
    link(data / "disk2", "../disk2")  # another disk
    link(data / "self", data)  # a loop
    link(tmp_path / "disk2/up", "..")  # a loop by a detour, that passes the hidden ones
    link(data / "0.parquet", "x.parquet")  # a second name, which sorts before the first
    link(data / "alone.parquet", tmp_path / "hidden/d.parquet")
    link(data / "_left_out", tmp_path / "hidden")
    return data


@pytest.mark.parametrize(
    ("pattern", "sources"),
    [
        (
            "",
            [
                "alone.parquet",
                "disk1/a.parquet",
                "disk2/b.parquet",
                "disk2/deep/c.parquet",
                "x.parquet",
            ],
        ),
        ("/**/[abc].parquet", ["disk1/a.parquet", "disk2/b.parquet", "disk2/deep/c.parquet"]),
        ("/disk*/*.parquet", ["disk1/a.parquet", "disk2/b.parquet"]),
        ("/disk2/*/*.parquet", ["deep/c.parquet"]),
        ("/se*/*.parquet", ["self/0.parquet", "self/alone.parquet"]),
        ("/_left_out", ["d.parquet"]),
        ("/_*/*.parquet", ["_left_out/d.parquet"]),
        ("/0.parquet", ["0.parquet"]),
    ],
)
def test_linked_folders_are_followed_and_each_file_is_read_once(
    linked: Path, pattern: str, sources: list[str]
) -> None:
    """Under the name without a link in it, where there is one."""
    assert sources_read(source_of(f"{linked}{pattern}")) == sources


def test_folders_that_link_to_each_other_are_walked_once(tmp_path: Path) -> None:
    for name in "abc":
        put(tmp_path / name / f"{name}.parquet")
        for other in "abc":
            link(tmp_path / name / f"to_{other}", tmp_path / other)
    assert sources_read(source_of(tmp_path)) == [f"{name}/{name}.parquet" for name in "abc"]


def test_a_root_that_is_linked_keeps_plain_names(tmp_path: Path) -> None:
    put(tmp_path / "real/a.parquet")
    link(tmp_path / "real/0.parquet", "a.parquet")
    link(tmp_path / "alias", tmp_path / "real")
    assert sources_read(source_of(tmp_path / "alias")) == ["a.parquet"]


def test_another_link_to_a_planned_file_is_not_a_new_file(tmp_path: Path) -> None:
    """Though it comes first among its names now, or its rows would be planned again."""
    put(tmp_path / "store" / "s.parquet")
    link(tmp_path / "in" / "monday.parquet", tmp_path / "store" / "s.parquet")
    source = source_of(tmp_path / "in")
    planned = {file.source for file in source.scan()[0]}
    assert planned == {"monday.parquet"}
    link(tmp_path / "in" / "latest.parquet", tmp_path / "store" / "s.parquet")
    put(tmp_path / "in" / "tuesday.parquet")
    assert source.unplanned(planned) == ["tuesday.parquet"]
    files = source.apart(source.scan()[0], planned)
    assert [file.source for file in files] == ["tuesday.parquet"]


def test_a_file_named_like_a_row_key_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "x.parquet", tmp_path / "x.parquet#1")
    names = [str(tmp_path / "x.parquet"), str(tmp_path / "x.parquet#1")]
    assert "the name x.parquet#1 is also the row_key of a row of x.parquet" in refusal(
        source_of(names)
    )
    assert sources_read(source_of(names[1:])) == ["x.parquet#1"]


@pytest.mark.parametrize("name", ["set::v2", "zip::set", "::", "s3:", "set::file:"])
def test_a_local_path_may_contain_colons(tmp_path: Path, name: str) -> None:
    """To fsspec `::` is a chain, and what stands before it another folder."""
    put(tmp_path / "set" / "no.parquet", tmp_path / name / "yes.parquet")
    assert sources_read(source_of(tmp_path / name)) == ["yes.parquet"]
    store = Store(str(tmp_path / name))
    assert store.create("a.json", b"{}")
    assert (tmp_path / name / "a.json").is_file()
    assert not store.holds(Store(str(tmp_path / "set")))


def test_a_broken_link_is_reported(tmp_path: Path, caplog: Any) -> None:
    put(tmp_path / "a.parquet")
    link(tmp_path / "disk2", "/nowhere/at/all")
    assert sources_read(source_of(tmp_path)) == ["a.parquet"]
    assert "disk2: a broken link" in caplog.text
    link(tmp_path / "b.parquet", "/nowhere/b.parquet")
    assert "b.parquet cannot be read" in refusal(source_of(tmp_path))


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    put(tmp_path / "a.parquet", tmp_path / "closed/b.parquet")
    scandir = os.scandir

    def closed(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert "closed" in refusal(source_of(tmp_path))


# --- one file by two names ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        ["in", "in/sub/../a.parquet"],
        ["in/a.parquet", "in/../in/a.parquet"],
        ["in/a.parquet", "in//a.parquet", "in/./a.parquet", "file://{root}/in/a.parquet"],
        ["in/a.parquet", "alias.parquet"],
        ["alias/a.parquet", "in/a.parquet"],
        ["in/*.parquet", "in/a*", "*/a.parquet"],
        ["alias/../in/a.parquet", "in/a.parquet"],
    ],
)
def test_a_file_is_planned_once_under_any_name(tmp_path: Path, entries: list[str]) -> None:
    put(tmp_path / "in/a.parquet")
    (tmp_path / "in/sub").mkdir()
    link(tmp_path / "alias", tmp_path / "in")
    link(tmp_path / "alias.parquet", "in/a.parquet")
    uris = [e.format(root=tmp_path) if ":" in e else f"{tmp_path}/{e}" for e in entries]
    assert len(sources_read(source_of(uris))) == 1


def test_dots_are_resolved_after_links(tmp_path: Path) -> None:
    put(tmp_path / "far/a.parquet", tmp_path / "b.parquet")
    (tmp_path / "far/off").mkdir()
    link(tmp_path / "near", tmp_path / "far/off")
    assert sources_read(source_of(f"{tmp_path}/near/../a.parquet")) == ["a.parquet"]


def test_an_entry_without_files_is_reported(tmp_path: Path, caplog: Any) -> None:
    put(tmp_path / "a/x.parquet")
    assert sources_read(source_of([f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c*.pq"])) == [
        "a/x.parquet"
    ]
    reported = {record.getMessage().rsplit("/", 1)[-1] for record in caplog.records}
    assert reported == {"b", "c*.pq"}


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pq", "a.PARQUET", "a.parquet.gzip", "part-0", "_a", "[x]?*"])
def test_a_named_file_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a", tmp_path / name)
    assert sources_read(source_of(tmp_path / name)) == [name]


@pytest.mark.parametrize(
    ("pattern", "sources"),
    [
        ("*.pq", ["a.pq", "b.pq"]),
        ("[ac].pq", ["a.pq"]),
        ("[!a].pq", ["b.pq"]),
        ("part-*", ["part-0", "part-1"]),
        ("*", ["c.PARQUET", "d.parquet"]),
        ("", ["c.PARQUET", "d.parquet", "s.parquet/part-0.parquet"]),
        ("*.parquet", ["d.parquet", "s.parquet/part-0.parquet"]),
        ("_h*.parquet", ["_h.parquet"]),
        ("_t*/*", ["_tmp/e.parquet"]),
    ],
)
def test_a_pattern_matches_files_and_folders(
    tmp_path: Path, pattern: str, sources: list[str]
) -> None:
    names = ["a.pq", "b.pq", "part-0", "part-1", "c.PARQUET", "d.parquet", "_h.parquet"]
    put(*(tmp_path / name for name in [*names, "s.parquet/part-0.parquet", "_tmp/e.parquet"]))
    for name in ("notes.txt", "_SUCCESS", "s.parquet/_SUCCESS"):
        (tmp_path / name).write_text("no rows")
    assert sources_read(source_of(tmp_path / pattern)) == sources


def test_files_that_a_folder_leaves_out_are_reported(tmp_path: Path, caplog: Any) -> None:
    put(tmp_path / "a.parquet", tmp_path / "sub/b.pq", tmp_path / "c.parquet.gzip")
    (tmp_path / "README.md").write_text("no rows")
    assert sources_read(source_of(tmp_path)) == ["a.parquet"]
    assert "2 files are left out" in caplog.text


def test_folders_that_a_pattern_matches_beside_files_are_reported(
    tmp_path: Path, caplog: Any
) -> None:
    put(tmp_path / "2023" / "a.parquet", tmp_path / "2024.parquet")
    assert sources_read(source_of(tmp_path / "20*")) == ["2024.parquet"]
    assert "1 folders match, too, and nothing of them is read (2023)" in caplog.text
    caplog.clear()
    assert sources_read(source_of(tmp_path / "**" / "*.parquet")) == [
        "2023/a.parquet",
        "2024.parquet",
    ]
    assert not caplog.messages


FOLDERS = ["run [v2]", "what?", "a*b", "[", "[!x]", "[[]", "**"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("names", ["", "/*.parquet", "/x[01].parquet", "/x1.parquet"])
def test_wildcards_in_existing_names_are_literal(tmp_path: Path, folder: str, names: str) -> None:
    put(tmp_path / folder / "x1.parquet", tmp_path / "run v/x0.parquet", tmp_path / "w/x0.parquet")
    assert sources_read(source_of(f"{tmp_path}/{folder}{names}")) == ["x1.parquet"]


@pytest.mark.parametrize("folder", ["br[1]", "what?", "a*b"])
def test_wildcards_in_existing_keys_are_literal_on_s3(s3: str, folder: str) -> None:
    upload(f"{s3}/{folder}/x1.parquet", f"{s3}/br1/x0.parquet")
    for names in ("", "/*.parquet", "/x[01].parquet", "/x1.parquet"):
        assert sources_read(source_of(f"{s3}/{folder}{names}")) == ["x1.parquet"]


def test_a_character_range_matches_on_s3(s3: str) -> None:
    upload(*(f"{s3}/in/{name}.parquet" for name in ("a1", "b1", "q1")))
    assert sources_read(source_of(f"{s3}/in/[aq]*.parquet")) == ["a1.parquet", "q1.parquet"]


def upload(*urls: str) -> None:
    for url in urls:
        s3fs.S3FileSystem().pipe_file(url, parquet_bytes())


def test_keys_with_empty_components_are_read(s3: str) -> None:
    upload(f"{s3}/dbl//a.parquet", f"{s3}/dbl/a.parquet")
    assert sources_read(source_of(f"{s3}/dbl//a.parquet")) == ["a.parquet"]
    assert sources_read(source_of(f"{s3}/dbl")) == ["/a.parquet", "a.parquet"]
    both = [f"{s3}/dbl//a.parquet", f"{s3}/dbl/a.parquet"]
    assert sources_read(source_of(both)) == ["/a.parquet", "a.parquet"]


def test_buckets_may_differ(s3: str) -> None:
    other = f"{s3}-other"
    s3fs.S3FileSystem().mkdir(other)
    upload(f"{s3}/a.parquet", f"{other}/a.parquet")
    found = sources_read(source_of([f"{s3}/a.parquet", other]))
    assert found == [f"{url.removeprefix('s3://')}/a.parquet" for url in (s3, other)]


def test_a_bucket_that_is_not_there_is_named(s3: str) -> None:
    gone = f"{s3.removeprefix('s3://')}-gone"
    for uri in (f"s3://{gone}/in", f"s3://{gone}/in/*.parquet", f"s3://{gone}/a.parquet"):
        assert f"there is no bucket {gone!r}" in refusal(source_of(uri))
    assert "there is no bucket" not in refusal(source_of(f"{s3}/in"))


# --- what cannot be read ------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty (0 bytes)"),
        (b"<!DOCTYPE html><html>", "an HTML or XML page (21 bytes)"),
        (POINTER, "a pointer of Git LFS"),
        (b"id,question\n1,What?\n", "no Parquet file (20 bytes)"),
        (parquet_bytes()[:300], "a Parquet file that is cut short or damaged (300 bytes)"),
    ],
)
@pytest.mark.parametrize("name", ["a.parquet", "m.parquet", "z.parquet"])
def test_the_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    put(tmp_path / "b.parquet", tmp_path / "n.parquet")
    (tmp_path / name).write_bytes(content)
    assert refusal(source_of(tmp_path)).startswith(
        f"recipe.input.uri: {name} cannot be read: {message}"
    )


# --- outputs in their inputs --------------------------------------------------------------------

OWN = ["plan/0000.parquet", "data/part-0000000-0000000000000000.parquet"]


@pytest.mark.parametrize(
    ("uri", "output", "taken"),
    [
        ("in", "in/out", True),
        ("in", "in", True),
        ("in", "in/_out", False),
        ("in", "in/.out/o", False),
        ("in", "inside", False),
        ("in", "x/../in/out", True),
        ("in", "linked/out", True),
        ("in", "disk2/out", True),
        ("in/a.parquet", "in", False),
        ("in/*.parquet", "in", False),
        ("in/*/*.parquet", "in", True),
        ("in/*/*.parquet", "in/out", False),
        ("in/**/*.parquet", "in/out", True),
        ("in/**/part-*", "in/out", True),
        ("in/**/q*.parquet", "in/out", False),
        ("out/data", "out", True),
        ("out/plan/*.parquet", "out", True),
        (["in/a.parquet", "in/sub"], "in/sub/out", True),
    ],
)
def test_an_output_within_the_input_is_detected(
    tmp_path: Path, uri: str | list[str], output: str, *, taken: bool
) -> None:
    put(tmp_path / "in/a.parquet", tmp_path / "in/sub/b.parquet", tmp_path / "out/data/c.parquet")
    put(tmp_path / "out/plan/d.parquet", tmp_path / "disk2/e.parquet")
    link(tmp_path / "linked", tmp_path / "in")
    link(tmp_path / "in/disk2", tmp_path / "disk2")
    uris = [f"{tmp_path}/{entry}" for entry in ([uri] if isinstance(uri, str) else uri)]
    assert source_of(uris).would_take(f"{tmp_path}/{output}", OWN) is taken


@pytest.mark.parametrize(("output", "taken"), [("in/out", True), ("in", True), ("out", False)])
def test_an_output_within_the_input_is_detected_on_s3(s3: str, output: str, *, taken: bool) -> None:
    upload(f"{s3}/in/a.parquet")
    assert source_of(f"{s3}/in").would_take(f"{s3}/{output}", OWN) is taken
    assert not source_of(f"{s3}/in").would_take("/in/out", OWN)


def test_an_older_output_in_an_input_is_named_as_one(tmp_path: Path) -> None:
    put(tmp_path / "q.parquet")
    write(tmp_path / "old" / OWN[0], shard=[1])
    assert "old/plan/0000.parquet seems to belong to an output" in refusal(source_of(tmp_path))
