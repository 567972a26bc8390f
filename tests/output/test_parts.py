"""Parts: one winner for each shard, and a footer that is read back, on a disk and on S3."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.records import Answer
from gc2ray.core.schema import Provenance, answer_schema, answer_table, stats_of
from gc2ray.core.shards import Shard, Shards, SourceFile, cut_shards
from gc2ray.core.stats import RunStats
from gc2ray.data.remote_file import RetryingFile
from gc2ray.data.retries import RetryPolicy
from gc2ray.data.store import Store
from gc2ray.output.parts import (
    Commit,
    PartFooter,
    commit_part,
    list_parts,
    part_bytes,
    read_part,
    read_part_footer,
    read_part_footers,
)
from gc2ray.output.plan import Plan
from gc2ray.output.planner import committed_parts, outcome
from tests.support.rows import make_recipe, request
from tests.support.stores import THREADS, race

RECIPE = make_recipe("model")
WRITTEN = datetime(2026, 11, 30, 8, tzinfo=UTC)


def a_shard(rows: int = 3) -> Shard:
    (shard,) = cut_shards([SourceFile("rows.parquet", "f", (rows,))], rows, RECIPE.fingerprint())
    return shard


def a_part(shard: Shard, token: str) -> bytes:
    """A real part, one row answered and the others failed."""
    good = Answer(request(seed=0), Status.OK, "globalcom2", 0.25, answer="yes", kv_bytes=7)
    bad = [
        Answer(request(seed=row), Status.BAD_IMAGE, "globalcom2", 0.25, error="no image")
        for row in range(1, shard.rows)
    ]
    answers = [good, *bad]
    stats = stats_of(answers) + RunStats(peak_host_bytes=5)
    footer = PartFooter(shard.sid, RECIPE.fingerprint(), token, "w1", len(answers), stats, WRITTEN)
    return part_bytes(answers, pa.schema([]), Provenance(1, 0, "w1"), footer)


def with_metadata(part: bytes, changes: dict[bytes, bytes | None]) -> bytes:
    """The same part with other footer entries; None removes one."""
    table = pq.read_table(pa.BufferReader(part))
    metadata = {**table.schema.metadata, **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(kept), sink)
    return sink.getvalue().to_pybytes()


def test_a_commit_is_won_once(store: Store) -> None:
    shard = a_shard()
    mine, theirs = a_part(shard, "mine"), a_part(shard, "theirs")
    assert commit_part(store, shard, mine, "mine") is Commit.WON
    assert commit_part(store, shard, theirs, "theirs") is Commit.LOST_RACE
    assert store.read(shard.part_name) == mine
    assert list_parts(store) == {shard.sid: shard.part_name}


def test_a_lost_acknowledgement_is_a_success(store: Store) -> None:
    """The first put went through, its answer did not: the second finds its own token."""
    shard = a_shard()
    part = a_part(shard, "mine")
    assert store.create(shard.part_name, part) is True
    assert commit_part(store, shard, part, "mine") is Commit.WON


def test_racing_commits_agree_on_the_winner(racy: Store) -> None:
    shard = a_shard()
    parts = [a_part(shard, f"token-{number}") for number in range(THREADS)]
    ends = race(lambda number: commit_part(racy, shard, parts[number], f"token-{number}"))
    assert sorted(map(str, ends)) == ["lost_race"] * (THREADS - 1) + ["won"]
    winner = ends.index(Commit.WON)
    assert racy.read(shard.part_name) == parts[winner]
    assert read_part_footer(racy, shard.part_name).token == f"token-{winner}"


def test_a_footer_survives_its_part(store: Store) -> None:
    shard = a_shard()
    commit_part(store, shard, a_part(shard, "mine"), "mine")
    footer = read_part_footer(store, shard.part_name)
    assert footer.sid == shard.sid
    assert footer.run == RECIPE.fingerprint()
    assert (footer.token, footer.worker, footer.rows) == ("mine", "w1", 3)
    assert footer.stats.by_status == {"ok": 1, "bad_image": 2}
    assert (footer.stats.kv_bytes, footer.stats.peak_host_bytes) == (7, 5)
    assert read_part_footers(store, [shard.part_name] * 3) == [footer] * 3
    assert read_part_footers(store, []) == []


def test_a_footer_counts_input_rows_and_answers(local: Store) -> None:
    shard = a_shard()
    local.create(shard.part_name, with_metadata(a_part(shard, "mine"), {b"gc2ray.rows": b"2"}))
    footer = read_part_footer(local, shard.part_name)
    assert (footer.rows, footer.answers) == (2, 3)


def test_a_footer_from_before_lists_of_prompts_has_a_row_per_answer(local: Store) -> None:
    shard = a_shard()
    local.create(shard.part_name, with_metadata(a_part(shard, "mine"), {b"gc2ray.rows": None}))
    footer = read_part_footer(local, shard.part_name)
    assert (footer.rows, footer.answers) == (3, 3)
    plan = Plan(RECIPE.fingerprint(), Shards.from_shards([shard]), pa.schema([]))
    assert outcome(local, plan, committed_parts(local, plan)).exit_code == 0


@pytest.mark.parametrize("rows", [b"2", b"4"])
def test_a_part_with_another_number_of_rows_is_not_of_this_run(local: Store, rows: bytes) -> None:
    shard = a_shard()
    local.create(shard.part_name, with_metadata(a_part(shard, "mine"), {b"gc2ray.rows": rows}))
    plan = Plan(RECIPE.fingerprint(), Shards.from_shards([shard]), pa.schema([]))
    with pytest.raises(ConfigError, match="is not a part of this run"):
        committed_parts(local, plan)


@pytest.mark.parametrize(
    "changes", [{b"gc2ray.rows": b"x"}, {b"gc2ray.stats": None}, {b"gc2ray.written": b"x"}]
)
def test_a_part_with_an_invalid_footer_is_refused(
    local: Store, changes: dict[bytes, bytes | None]
) -> None:
    shard = a_shard()
    stats = RunStats(rows=2).to_json().encode()  # of three answers
    for change in (changes, {b"gc2ray.stats": stats}):
        local.replace(shard.part_name, with_metadata(a_part(shard, "mine"), change))
        with pytest.raises(ConfigError, match="is not a part that gc2ray wrote"):
            read_part_footer(local, shard.part_name)


def test_a_part_is_a_table_with_the_answer_schema(tmp_path: Path) -> None:
    shard = a_shard()
    (tmp_path / "p.parquet").write_bytes(a_part(shard, "t"))
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.schema.names == answer_schema(pa.schema([])).names
    assert table["row"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize(
    "read", [lambda s, n: read_part(s, n), lambda s, n: read_part(s, n, ["answer"])]
)
def test_a_part_is_read_by_the_thread_that_asks(
    local: Store, monkeypatch: pytest.MonkeyPatch, read: Callable[[Store, str], pa.Table]
) -> None:
    """A thread of pyarrow that lets a buffer of Python go while the interpreter ends aborts it."""
    shard = a_shard()
    local.create(shard.part_name, a_part(shard, "mine"))
    readers: set[int] = set()
    original = RetryingFile.read

    def noting(file: RetryingFile, size: int = -1) -> bytes:
        readers.add(threading.get_ident())
        return original(file, size)

    monkeypatch.setattr(RetryingFile, "read", noting)
    assert read(local, shard.part_name).num_rows == 3
    assert readers == {threading.get_ident()}


def plain_parquet() -> bytes:
    """An answer table that nobody committed: no footer of ours."""
    sink = pa.BufferOutputStream()
    answer = Answer(request(), Status.FAILED, "m", 1.0)
    pq.write_table(answer_table([answer], pa.schema([]), Provenance(1, 0, "w")), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("content", [b"", b"garbage" * 10, b"PAR1" * 20, plain_parquet()])
def test_garbage_is_a_configuration_error_that_names_it(store: Store, content: bytes) -> None:
    shard = a_shard()
    store.create(shard.part_name, content)
    with pytest.raises(ConfigError, match=f"{shard.sid}.*is not a part that gc2ray wrote"):
        read_part_footer(store, shard.part_name)
    with pytest.raises(ConfigError):
        commit_part(store, shard, a_part(shard, "mine"), "mine")
    assert store.read(shard.part_name) == content


def test_a_truncated_part_is_a_configuration_error(store: Store) -> None:
    shard = a_shard()
    store.create(shard.part_name, a_part(shard, "mine")[:-20])
    with pytest.raises(ConfigError, match="is not a part"):
        read_part_footers(store, [shard.part_name])


@pytest.mark.parametrize("stats", [b"{}", b"no json", b'{"slowest": [], "largest": [], "new": 1}'])
def test_statistics_of_another_version_are_a_configuration_error(
    local: Store, stats: bytes
) -> None:
    shard = a_shard()
    part = with_metadata(a_part(shard, "mine"), {b"gc2ray.stats": stats})
    local.create(shard.part_name, part)
    with pytest.raises(ConfigError, match="is not a part"):
        read_part_footer(local, shard.part_name)


def test_only_parts_are_committed(store: Store) -> None:
    shards = [replace(a_shard(), index=index, sid=f"{index:016x}") for index in (12, 3)]
    for shard in shards:
        store.create(shard.part_name, b"x")
    for name in ("data/part-12-abc.parquet", "data/notes.txt", f"data/{shards[0].sid}.parquet"):
        store.create(name, b"x")
    assert list_parts(store) == {shard.sid: shard.part_name for shard in shards}
    assert list(list_parts(store)) == [shards[1].sid, shards[0].sid]


def test_a_storage_that_does_not_answer_is_not_taken_for_a_bad_part(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is to be told to move a good part away."""
    shard = a_shard()
    local.create(shard.part_name, a_part(shard, "mine"))

    def no_answer(*_: object, **__: object) -> None:
        raise OSError("503")

    monkeypatch.setattr(local._fs, "open", no_answer)
    with pytest.raises(OSError, match="503"):
        read_part_footer(local, shard.part_name)


def test_a_part_is_read_despite_temporary_errors(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening it and every read fail, the first time."""
    shard = a_shard()
    local.create(shard.part_name, a_part(shard, "mine"))
    store = Store(local.uri, RetryPolicy(total_seconds=20.0, first_seconds=0.001))
    failed: set[object] = set()

    def once(what: object) -> None:
        if what not in failed:
            failed.add(what)
            raise ConnectionResetError("reset by peer")

    class Unsteady:
        def __init__(self, opened: Any) -> None:
            self._opened = opened

        def read(self, size: int = -1) -> bytes:
            place = self._opened.tell()
            content: bytes = self._opened.read(size)
            once((place, size))
            return content

        def __getattr__(self, name: str) -> Any:
            return getattr(self._opened, name)

    whole = store._fs.open

    def unsteady(path: str, *rest: object, **named: object) -> Unsteady:
        once(path)
        return Unsteady(whole(path, *rest, **named))

    monkeypatch.setattr(store._fs, "open", unsteady)
    assert len(read_part(store, shard.part_name)) == shard.rows
    assert len(read_part(store, shard.part_name, ["row_key"])) == shard.rows
    assert len(failed) > 3


def test_a_long_footer_is_read_whole(local: Store) -> None:
    shard = a_shard()
    local.create(shard.part_name, with_metadata(a_part(shard, "mine"), {b"filler": bytes(200_000)}))
    assert read_part_footer(local, shard.part_name).token == "mine"


def test_the_keys_of_a_footer_are_those_on_disk(tmp_path: Path) -> None:
    """Written out here: a part of today is to be read by every later version."""
    shard, path = a_shard(), tmp_path / "part.parquet"
    path.write_bytes(a_part(shard, "mine"))
    metadata = pq.read_metadata(path).metadata
    assert {key: metadata[key] for key in metadata if key.startswith(b"gc2ray.")} == {
        b"gc2ray.schema_version": b"4",
        b"gc2ray.sid": shard.sid.encode(),
        b"gc2ray.run": RECIPE.fingerprint().encode(),
        b"gc2ray.token": b"mine",
        b"gc2ray.worker": b"w1",
        b"gc2ray.rows": b"3",
        b"gc2ray.stats": metadata[b"gc2ray.stats"],
        b"gc2ray.written": b"2026-11-30T08:00:00+00:00",
    }
    assert json.loads(metadata[b"gc2ray.stats"])["rows"] == 3
