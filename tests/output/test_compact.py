"""Compact: the latest answers, all of them, once, in input order, in few whole files."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.records import Answer
from gc2ray.core.schema import answer_schema
from gc2ray.core.shards import SourceFile
from gc2ray.data.store import Store
from gc2ray.output import compact as compact_module
from gc2ray.output.compact import Dataset, compact
from gc2ray.output.retry import next_retry
from gc2ray.output.verify import verify
from tests.support.outputs import (
    FILES,
    KEPT_COLUMNS,
    RECIPE,
    all_ok,
    first_plan,
    flip_a_bit,
    latest_answers,
    parts,
    random_outcome,
    write_round,
)

PAGE = (Path(__file__).parents[2] / "docs" / "output.md").read_text(encoding="utf-8")


def documented_query(output: Path) -> str:
    """The one line of SQL in docs/output.md, as it stands there."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith("SELECT * FROM read_parquet")]
    return line.replace("OUTPUT", str(output))


def retried(output: Path, seed: int, retries: int, *, listed: bool, shard_rows: int = 4) -> None:
    """A run and some retries, each with failures and dead shards."""
    plan = first_plan(shard_rows=shard_rows)
    write_round(output, 0, plan, random_outcome(seed, 0, listed=listed), listed=listed)
    for _ in range(retries):
        retry = next_retry(str(output))
        if retry is not None:
            outcome = random_outcome(seed, retry.number, listed=listed)
            write_round(output, retry.number, retry.freeze(), outcome, listed=listed)


def keyed(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["row_key"]: row for row in rows}


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 10**6),
    listed=st.booleans(),
    retries=st.integers(0, 3),
    shard_rows=st.integers(1, 9),
    file_bytes=st.sampled_from([3_000, 1 << 20]),
)
def test_compact_duckdb_and_plain_loops_agree(
    *, seed: int, listed: bool, retries: int, shard_rows: int, file_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output, dest = Path(folder) / "out", Path(folder) / "dest"
        retried(output, seed, retries, listed=listed, shard_rows=shard_rows)
        latest = latest_answers(output)
        order = [
            answer["row_key"]
            for file, row in itertools.product(FILES, range(10))
            for answer in sorted(latest.values(), key=lambda answer: answer["prompt_index"])
            if (answer["source"], answer["row"]) == (file.source, row)
        ]
        dataset = compact(str(output), str(dest), file_bytes=file_bytes, incomplete=True)
        found = read(dest).to_pylist()
        assert [row["row_key"] for row in found] == order
        assert len(order) == dataset.answers
        assert keyed(found) == latest
        if order:
            queried = duckdb.sql(documented_query(output)).to_arrow_table().to_pylist()
            assert len(queried) == len(order)
            assert keyed(queried) == latest
        assert dataset.failed == sum(answer["status"] != "ok" for answer in latest.values())
        assert dataset.rows == len(
            {(answer["source"], answer["row"]) for answer in latest.values()}
        )


def write_large_run(output: Path, rows: int = 400, shard_rows: int = 10) -> None:
    write_round(output, 0, first_plan([SourceFile("a.parquet", "f", (rows,))], shard_rows))


def test_files_have_the_requested_size(tmp_path: Path) -> None:
    write_large_run(tmp_path / "out", rows=3000, shard_rows=30)
    dest = tmp_path / "dest"
    whole = compact(str(tmp_path / "out"), str(tmp_path / "whole"))
    assert [file.name for file in whole.files] == ["part-00000.parquet"]
    dataset = compact(str(tmp_path / "out"), str(dest), file_bytes=30_000)
    names = sorted(path.name for path in dest.iterdir())
    assert names == [
        "_SUCCESS",
        *(f"part-{number:05d}.parquet" for number in range(len(names) - 1)),
    ]
    assert len(dataset.files) > 3
    # One row group more at most, and the footer, which at this size is half of a file.
    assert all(30_000 <= file.bytes < 65_000 for file in dataset.files[:-1])
    assert read(dest).equals(read(tmp_path / "whole"))


def test_a_large_part_is_cut_into_row_groups_and_files(tmp_path: Path) -> None:
    """What is in memory is a row group, not a part."""
    write_large_run(tmp_path / "out", rows=5000, shard_rows=5000)
    compact(str(tmp_path / "out"), str(tmp_path / "dest"), file_bytes=60_000)
    files = [pq.read_metadata(path) for path in sorted((tmp_path / "dest").glob("*.parquet"))]
    assert len(files) > 2
    groups = [file.row_group(i) for file in files for i in range(file.num_row_groups)]
    assert sum(group.num_rows for group in groups) == 5000
    assert max(group.num_rows for group in groups) < 1000


def test_the_success_file_lists_all_files(tmp_path: Path) -> None:
    output, dest = tmp_path / "out", tmp_path / "dest"
    retried(output, 5, 1, listed=True)
    dataset = compact(str(output), str(dest), file_bytes=2_000, incomplete=True)
    success_file = json.loads((dest / "_SUCCESS").read_text())
    assert success_file["rows"] == dataset.rows
    assert (success_file["run"], success_file["rounds"]) == (RECIPE.fingerprint(), [0, 1])
    assert len(success_file["files"]) > 1
    for file in success_file["files"]:
        data = (dest / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        table = pq.read_table(dest / file["name"])
        assert file["answers"] == len(table)
        assert file["failed"] == sum(status != "ok" for status in table["status"].to_pylist())


def test_the_schema_is_that_of_answers_and_names_the_run(tmp_path: Path) -> None:
    retried(tmp_path / "out", 3, 1, listed=False)
    compact(str(tmp_path / "out"), str(tmp_path / "dest"), incomplete=True)
    schema = pq.read_schema(tmp_path / "dest/part-00000.parquet")
    assert schema.equals(answer_schema(KEPT_COLUMNS))
    names = {"gc2ray.schema_version", "gc2ray.run", "gc2ray.recipe"}
    assert {name.decode() for name in schema.metadata} - {"ARROW:schema"} == names
    assert json.loads(schema.metadata[b"gc2ray.recipe"]) == RECIPE.model_dump(mode="json")


def test_other_libraries_read_the_dataset(tmp_path: Path) -> None:
    retried(tmp_path / "out", 3, 2, listed=True)
    dest = tmp_path / "dest"
    dataset = compact(str(tmp_path / "out"), str(dest), file_bytes=2_000, incomplete=True)
    assert len(dataset.files) > 1
    found = read(dest)
    assert pyarrow.dataset.dataset(dest).to_table().equals(found)
    loaded = load_dataset(
        "parquet", data_files=f"{dest}/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == len(found)
    assert loaded["row_key"][:] == found["row_key"].to_pylist()
    counted = duckdb.sql(f"SELECT count(*) FROM '{dest}/*.parquet'").fetchall()
    assert counted == [(len(found),)]


def test_any_kept_columns(tmp_path: Path) -> None:
    """Also such whose values are kept apart from their rows."""
    names = pa.dictionary(pa.int32(), pa.string())
    kept_columns = pa.schema(
        [("id", names), ("tag", pa.list_(pa.struct([("a", pa.large_string())])))]
    )

    def changed(answer: Answer) -> Answer:
        request = answer.request
        values = {"id": f"row {request.row}", "tag": [{"a": request.source}]}
        return replace(answer, request=replace(request, kept_columns=values))

    output, dest = tmp_path / "out", tmp_path / "dest"
    outcome = random_outcome(4, 0, listed=False)
    write_round(
        output, 0, replace(first_plan(), kept_columns=kept_columns), outcome, changed=changed
    )
    retry = next_retry(str(output))
    assert retry is not None
    write_round(output, 1, retry.freeze(), changed=changed)
    assert verify(str(output), deep=True).problems == ()
    compact(str(output), str(dest))
    table = read(dest)
    assert table.schema.field("id").type == names
    assert table["id"].to_pylist() == [f"row {row}" for row in table["row"].to_pylist()]
    assert table["tag"].to_pylist() == [[{"a": source}] for source in table["source"].to_pylist()]
    assert set(table["retry_round"].to_pylist()) == {0, 1}


def test_no_rows_are_a_file_with_the_schema(tmp_path: Path) -> None:
    write_round(tmp_path / "out", 0, first_plan(files=[]))
    dataset = compact(str(tmp_path / "out"), str(tmp_path / "dest"))
    assert (dataset.rows, dataset.answers, len(dataset.files)) == (0, 0, 1)
    assert read(tmp_path / "dest").schema.equals(answer_schema(KEPT_COLUMNS))


def test_an_incomplete_run_is_compacted_only_on_request(tmp_path: Path) -> None:
    output, dest = tmp_path / "out", tmp_path / "dest"
    write_large_run(output, rows=40)
    parts(output)[2].unlink()
    with pytest.raises(
        ConfigError, match=r"shard 2 \(10 rows\): not answered yet; run again; pass --inc"
    ):
        compact(str(output), str(dest))
    assert not dest.exists()
    dataset = compact(str(output), str(dest), incomplete=True)
    assert dataset.rows == 30
    assert read(dest)["row"].to_pylist() == [*range(20), *range(30, 40)]


def test_a_damaged_output_is_refused(tmp_path: Path) -> None:
    write_large_run(tmp_path / "out", rows=40)
    (tmp_path / "out/data/notes").touch()
    with pytest.raises(ConfigError, match=r"data/notes: is no planned shard's part.*gc2ray verify"):
        compact(str(tmp_path / "out"), str(tmp_path / "dest"), incomplete=True)
    assert not (tmp_path / "dest").exists()


def test_a_part_whose_rows_are_damaged_is_named(tmp_path: Path) -> None:
    """A look at the footers does not see it."""
    write_large_run(tmp_path / "out", rows=40)
    part = parts(tmp_path / "out")[1]
    flip_a_bit(part)
    with pytest.raises(OSError, match=f"{part.name} cannot be read: .*verify --deep"):
        compact(str(tmp_path / "out"), str(tmp_path / "dest"))
    assert not (tmp_path / "dest/_SUCCESS").exists()


@pytest.mark.parametrize("dest", ["out", "out/data", "out/new", "out/retry_rounds/1"])
def test_a_destination_in_the_output_is_refused(tmp_path: Path, dest: str) -> None:
    write_large_run(tmp_path / "out", rows=40)
    with pytest.raises(ConfigError, match="choose a destination outside it"):
        compact(str(tmp_path / "out"), str(tmp_path / dest))


def test_a_destination_that_is_in_use_is_refused(tmp_path: Path) -> None:
    write_large_run(tmp_path / "out", rows=40)
    dest = tmp_path / "dest"
    dest.mkdir()
    first = compact(str(tmp_path / "out"), str(dest))
    with pytest.raises(ConfigError, match="holds a finished dataset; choose another destination"):
        compact(str(tmp_path / "out"), str(dest))
    (dest / "_SUCCESS").unlink()
    with pytest.raises(ConfigError, match="is not empty, and has no _SUCCESS; choose another"):
        compact(str(tmp_path / "out"), str(dest))
    assert hashlib.sha256((dest / first.files[0].name).read_bytes()).hexdigest() == (
        first.files[0].sha256
    )


@pytest.mark.parametrize("failing", range(4))
def test_an_interrupted_compact_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    write_large_run(tmp_path / "out", rows=400)
    create_from, made = Store.create_from, []

    def create(store: Store, name: str, path: Path) -> bool:
        made.append(name)
        if len(made) > failing:
            raise OSError("no space left on device")
        return create_from(store, name, path)

    monkeypatch.setattr(Store, "create_from", create)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(OSError, match="no space"):
        compact(str(tmp_path / "out"), str(tmp_path / "dest"), file_bytes=10_000)
    left = sorted((tmp_path / "dest").glob("*"))
    assert [path.name for path in left if path.is_file()] == made[:failing]
    assert all(pq.read_table(path).num_rows for path in left if path.is_file())
    assert list(temporary.iterdir()) == []


def test_another_writer_in_the_destination_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_large_run(tmp_path / "out", rows=40)
    answers = compact_module._answers

    def meanwhile(verdict: Any) -> Any:
        (tmp_path / "dest/part-00000.parquet").write_bytes(b"theirs")
        return answers(verdict)

    monkeypatch.setattr(compact_module, "_answers", meanwhile)
    with pytest.raises(ConfigError, match=r"part-00000\.parquet exists with other content"):
        compact(str(tmp_path / "out"), str(tmp_path / "dest"))
    assert (tmp_path / "dest/part-00000.parquet").read_bytes() == b"theirs"


def test_from_and_to_remote_storage(tmp_path: Path) -> None:
    """As URLs: nothing is a path."""
    output = "memory://compacted/out"
    store = write_round(output, 0, first_plan(), random_outcome(1, 0, listed=False))
    retry = next_retry(output)
    assert retry is not None
    write_round(output, 1, retry.freeze(), all_ok)
    dataset: Dataset = compact(output, "memory://compacted/dest", file_bytes=2_000)
    target = Store("memory://compacted/dest")
    assert target.names("")[0] == "/_SUCCESS"
    tables = [pq.read_table(pa.BufferReader(target.read(file.name))) for file in dataset.files]
    assert len(tables) > 1
    rows = pa.concat_tables(tables).to_pylist()
    assert [(row["source"], row["row"]) for row in rows] == [
        (file.source, row) for file in FILES for row in range(file.rows)
    ]
    assert {row["status"] for row in rows} == {str(Status.OK)}
    store._fs.store.clear()
