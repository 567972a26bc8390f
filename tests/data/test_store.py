"""The output directory: one winner per name, whole objects or none, on a disk and on S3."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.records import Answer
from gc2ray.core.schema import Provenance, answer_schema, answer_table, stats_of
from gc2ray.core.shards import Shard, Shards, SourceFile, Span, cut_shards
from gc2ray.core.stats import RunStats
from gc2ray.data.dataset import Source
from gc2ray.data.remote_file import RetryingFile
from gc2ray.data.retries import RetryPolicy
from gc2ray.data.store import Commit, PartFooter, Store
from gc2ray.output.parts import part_bytes
from gc2ray.output.plan import Plan
from gc2ray.output.planner import committed_parts, outcome
from tests.support.object_servers import SECRET, hasty_clients
from tests.support.rows import make_recipe, request

RECIPE = make_recipe("model")
THREADS = 8


@pytest.fixture
def new_s3_instances() -> Iterator[None]:
    """fsspec keeps filesystems; what it made within the test is not for others."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


@pytest.fixture(params=["local", "memory", "s3", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param in ("s3", "rclone"):
        yield Store(f"{request.getfixturevalue(request.param)}/run")
    elif request.param == "memory":
        yield Store(f"memory://run-{uuid.uuid4().hex}")
        fsspec.filesystem("memory").store.clear()
    else:
        yield Store(str(tmp_path / "run"))


@pytest.fixture(params=["local", "s3"])
def racy(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store on which several writers may meet."""
    if request.param == "s3":
        return Store(f"{request.getfixturevalue('s3')}/run")
    return Store(str(tmp_path / "run"))


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
    footer = PartFooter(shard.sid, RECIPE.fingerprint(), token, "w1", len(answers), stats)
    return part_bytes(answers, pa.schema([]), Provenance(1, 0, "w1"), footer)


def with_metadata(part: bytes, changes: dict[bytes, bytes | None]) -> bytes:
    """The same part with other footer entries; None removes one."""
    table = pq.read_table(pa.BufferReader(part))
    metadata = {**table.schema.metadata, **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(kept), sink)
    return sink.getvalue().to_pybytes()


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def race(work: Callable[[int], object]) -> list[object]:
    """The same work by several threads at the same moment."""
    barrier = threading.Barrier(THREADS)

    def start(number: int) -> object:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(start, range(THREADS)))


def test_the_first_to_create_wins(store: Store) -> None:
    assert store.create("data/a", b"first") is True
    assert store.create("data/a", b"second") is False
    assert store.read("data/a") == b"first"
    assert store.names("data") == ["data/a"]


def test_a_file_becomes_an_object_once(store: Store, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"first" * 1000)
    second.write_bytes(b"second")
    assert store.create_from("part-0", first) is True
    assert store.create_from("part-0", second) is False
    assert store.read("part-0") == first.read_bytes() == b"first" * 1000
    assert store.names("_tmp") == []


def test_a_large_file_is_whole_on_s3(s3: str, tmp_path: Path) -> None:
    """In several parts, of which none is seen before the last one is there."""
    store, data = Store(f"{s3}/run"), os.urandom(1 << 20) * 120
    (tmp_path / "large").write_bytes(data)
    assert store.create_from("a", tmp_path / "large") is True
    assert store.create_from("a", tmp_path / "large") is False
    assert store.read("a") == data


def test_a_place_within_another(tmp_path: Path) -> None:
    out = Store(str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for inside in ("out", "out/", "out/data", "link/data", "x/../out/y"):
        assert out.holds(Store(f"{tmp_path}/{inside}")), inside
    for outside in ("", "out2", "other/out"):
        assert not out.holds(Store(f"{tmp_path}/{outside}")), outside
    bucket = Store("s3://bucket/out")
    assert bucket.holds(Store("s3://bucket/out/data"))
    assert not bucket.holds(Store("s3://bucket/out-2"))
    assert not bucket.holds(Store("memory://bucket/out/data"))


def test_an_object_may_be_replaced(store: Store) -> None:
    store.replace("workers/w.json", b"one")
    store.replace("workers/w.json", b"two")
    assert store.read("workers/w.json") == b"two"
    assert store.create("workers/w.json", b"three") is False
    assert store.names("workers") == ["workers/w.json"]


def test_what_is_not_there(store: Store) -> None:
    assert store.read("run.json") is None
    assert store.names("data") == []
    assert store.committed() == {}
    store.check_usable(writing=False)
    assert store.names("_tmp") == []


def test_names_are_sorted_and_of_one_folder(store: Store) -> None:
    for name in ("data/b", "data/a", "dead/c", "run.json"):
        store.create(name, b"x")
    assert store.names("data") == ["data/a", "data/b"]
    assert store.names("dead") == ["dead/c"]


def test_a_listing_is_never_stale(store: Store) -> None:
    """Whoever else writes there; fsspec would remember listings."""
    store.create("data/a", b"x")
    assert store.names("data") == ["data/a"]
    other, root = fsspec.core.url_to_fs(store.uri, skip_instance_cache=True)
    other.pipe_file(f"{root}/data/b", b"x")
    assert store.names("data") == ["data/a", "data/b"]


def test_a_large_object_is_whole_on_s3(s3: str) -> None:
    """Above s3fs's limit for one put, where a conditional create is a multipart upload."""
    store, data = Store(f"{s3}/run"), os.urandom(1 << 20) * 60
    assert store.create("data/a", data) is True
    assert store.create("data/a", data[::-1]) is False
    assert store.read("data/a") == data


def test_only_old_leftovers_are_swept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_tmp/a", "_tmp/b", "data/c"):
        store.replace(name, b"x")
    store.sweep()
    assert len(store.names("_tmp")) == 2
    time.sleep(2.0)
    store.replace("_tmp/young", b"x")
    young = store._fs.modified(store._path("_tmp/young"))  # S3 tells whole seconds

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return young + timedelta(seconds=0.5)

    monkeypatch.setattr("gc2ray.data.store.datetime", Clock)
    store.sweep(1.0)
    assert store.names("_tmp") == ["_tmp/young"]
    assert store.names("data") == ["data/c"]


def test_leftovers_that_cannot_be_removed_stay(
    local: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    local.replace("_tmp/a", b"x")
    monkeypatch.setattr(local._fs, "rm_file", refuse)
    local.sweep(-1.0)
    assert "leftovers in _tmp stay: not yours" in caplog.text


def test_a_race_has_one_winner(racy: Store) -> None:
    for attempt in range(20 if racy.uri.startswith("/") else 4):
        name = f"data/{attempt}"
        won = race(lambda number, name=name: racy.create(name, b"%d" % number * 10_000))
        assert won.count(True) == 1
        assert won.count(False) == THREADS - 1
        assert racy.read(name) == b"%d" % won.index(True) * 10_000


def test_a_local_race_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for attempt in range(10):
        race(lambda number, attempt=attempt: store.create(f"data/{attempt}", b"%d" % number))
        store.replace("run.json", b"{}")
    assert files_in(tmp_path) == sorted([*(f"data/{attempt}" for attempt in range(10)), "run.json"])


def failing_fsync(_handle: int) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def test_a_failing_write_leaves_no_object(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_fsync)
        with pytest.raises(OSError, match="no space"):
            local.create("data/a", b"x" * 1000)
    assert files_in(tmp_path / "run" / "data") == []
    assert local.create("data/a", b"y") is True
    assert local.read("data/a") == b"y"


def test_a_failing_write_leaves_no_temporary_file(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing_fsync)
    for write in (local.create, local.replace):
        with pytest.raises(OSError, match="no space"):
            write("data/a", b"x")
    assert files_in(tmp_path) == []


def test_a_failing_write_keeps_what_was_to_be_replaced(
    local: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.replace("workers/w.json", b"one")
    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OSError, match="no space"):
        local.replace("workers/w.json", b"two")
    assert local.read("workers/w.json") == b"one"


def test_a_link_that_fails_for_another_reason_is_an_error(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(_self: Path, _target: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(Path, "hardlink_to", no_link)
    with pytest.raises(OSError, match="input/output error"):
        local.create("data/a", b"x")
    assert files_in(tmp_path) == []


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def linkless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without hard links."""

    def no_link(_self: Path, _target: Path) -> None:
        raise OSError(request.param, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", no_link)


@pytest.mark.usefixtures("linkless")
def test_without_links_the_first_still_wins(local: Store, tmp_path: Path) -> None:
    assert local.create("data/a", b"first") is True
    assert local.create("data/a", b"second") is False
    assert local.read("data/a") == b"first"
    assert files_in(tmp_path / "run") == ["data/a"]


@pytest.mark.usefixtures("linkless")
def test_without_links_a_race_has_one_winner(local: Store) -> None:
    for attempt in range(5):
        name = f"data/{attempt}"
        won = race(lambda number, name=name: local.create(name, b"%d" % number * 10_000))
        assert won.count(True) == 1
        assert local.read(name) == b"%d" % won.index(True) * 10_000


@pytest.mark.usefixtures("linkless")
def test_without_links_a_failing_write_leaves_no_object(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def second_fails(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:  # the first is of the temporary file
            failing_fsync(handle)
        real(handle)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(OSError, match="no space"):
        local.create("data/a", b"x" * 1000)
    assert files_in(tmp_path) == []


def test_a_commit_is_won_once(store: Store) -> None:
    shard = a_shard()
    mine, theirs = a_part(shard, "mine"), a_part(shard, "theirs")
    assert store.commit(shard, mine, "mine") is Commit.WON
    assert store.commit(shard, theirs, "theirs") is Commit.LOST_RACE
    assert store.read(shard.part_name) == mine
    assert store.committed() == {shard.sid: shard.part_name}


def test_a_lost_acknowledgement_is_a_success(store: Store) -> None:
    """The first put went through, its answer did not: the second finds its own token."""
    shard = a_shard()
    part = a_part(shard, "mine")
    assert store.create(shard.part_name, part) is True
    assert store.commit(shard, part, "mine") is Commit.WON


def test_racing_commits_agree_on_the_winner(racy: Store) -> None:
    shard = a_shard()
    parts = [a_part(shard, f"token-{number}") for number in range(THREADS)]
    ends = race(lambda number: racy.commit(shard, parts[number], f"token-{number}"))
    assert sorted(map(str, ends)) == ["lost_race"] * (THREADS - 1) + ["won"]
    winner = ends.index(Commit.WON)
    assert racy.read(shard.part_name) == parts[winner]
    assert racy.footer(shard.part_name).token == f"token-{winner}"


def test_a_footer_survives_its_part(store: Store) -> None:
    shard = a_shard()
    store.commit(shard, a_part(shard, "mine"), "mine")
    footer = store.footer(shard.part_name)
    assert footer.sid == shard.sid
    assert footer.run == RECIPE.fingerprint()
    assert (footer.token, footer.worker, footer.rows) == ("mine", "w1", 3)
    assert footer.stats.by_status == {"ok": 1, "bad_image": 2}
    assert (footer.stats.kv_bytes, footer.stats.peak_host_bytes) == (7, 5)
    assert store.footers([shard.part_name] * 3) == [footer] * 3
    assert store.footers([]) == []


def test_a_footer_tells_input_rows_from_answers(local: Store) -> None:
    shard = a_shard()
    local.create(shard.part_name, with_metadata(a_part(shard, "mine"), {b"gc2ray.rows": b"2"}))
    footer = local.footer(shard.part_name)
    assert (footer.rows, footer.answers) == (2, 3)


def test_a_footer_from_before_lists_of_prompts_has_a_row_per_answer(local: Store) -> None:
    shard = a_shard()
    local.create(shard.part_name, with_metadata(a_part(shard, "mine"), {b"gc2ray.rows": None}))
    footer = local.footer(shard.part_name)
    assert (footer.rows, footer.answers) == (3, 3)
    plan = Plan(RECIPE.fingerprint(), Shards.from_shards([shard]), pa.schema([]))
    assert outcome(local, plan, committed_parts(local, plan)).exit_code == 0


@pytest.mark.parametrize("rows", [b"2", b"4"])
def test_a_part_of_fewer_or_more_rows_than_planned_is_not_of_this_run(
    local: Store, rows: bytes
) -> None:
    shard = a_shard()
    local.create(shard.part_name, with_metadata(a_part(shard, "mine"), {b"gc2ray.rows": rows}))
    plan = Plan(RECIPE.fingerprint(), Shards.from_shards([shard]), pa.schema([]))
    with pytest.raises(ConfigError, match="is not a part of this run"):
        committed_parts(local, plan)


@pytest.mark.parametrize(
    "changes", [{b"gc2ray.rows": b"x"}, {b"gc2ray.stats": None}, {b"gc2ray.written": b"x"}]
)
def test_a_footer_that_makes_no_sense_is_no_part(
    local: Store, changes: dict[bytes, bytes | None]
) -> None:
    shard = a_shard()
    stats = RunStats(rows=2).to_json().encode()  # of three answers
    for change in (changes, {b"gc2ray.stats": stats}):
        local.replace(shard.part_name, with_metadata(a_part(shard, "mine"), change))
        with pytest.raises(ConfigError, match="is not a part that gc2ray wrote"):
            local.footer(shard.part_name)


def test_a_part_is_a_table_with_the_answer_schema(tmp_path: Path) -> None:
    shard = a_shard()
    (tmp_path / "p.parquet").write_bytes(a_part(shard, "t"))
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.schema.names == answer_schema(pa.schema([])).names
    assert table["row"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize("read", [lambda s, n: s.table(n), lambda s, _: s.answers(["answer"])])
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
        store.footer(shard.part_name)
    with pytest.raises(ConfigError):
        store.commit(shard, a_part(shard, "mine"), "mine")
    assert store.read(shard.part_name) == content


def test_a_truncated_part_is_a_configuration_error(store: Store) -> None:
    shard = a_shard()
    store.create(shard.part_name, a_part(shard, "mine")[:-20])
    with pytest.raises(ConfigError, match="is not a part"):
        store.footers([shard.part_name])


@pytest.mark.parametrize("stats", [b"{}", b"no json", b'{"slowest": [], "largest": [], "new": 1}'])
def test_statistics_of_another_version_are_a_configuration_error(
    local: Store, stats: bytes
) -> None:
    shard = a_shard()
    part = with_metadata(a_part(shard, "mine"), {b"gc2ray.stats": stats})
    local.create(shard.part_name, part)
    with pytest.raises(ConfigError, match="is not a part"):
        local.footer(shard.part_name)


def test_only_parts_are_committed(store: Store) -> None:
    shards = [replace(a_shard(), index=index, sid=f"{index:016x}") for index in (12, 3)]
    for shard in shards:
        store.create(shard.part_name, b"x")
    for name in ("data/part-12-abc.parquet", "data/notes.txt", f"data/{shards[0].sid}.parquet"):
        store.create(name, b"x")
    assert store.committed() == {shard.sid: shard.part_name for shard in shards}
    assert list(store.committed()) == [shards[1].sid, shards[0].sid]


def test_an_unknown_filesystem_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="output: Protocol not known: nosuch"):
        Store("nosuch://bucket/run")


def test_a_store_out_of_reach_is_told_before_anything_starts(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    with hasty_clients(), pytest.raises(ConfigError, match=r"output: s3://.* cannot be used"):
        Store(f"{s3}/run").check_usable(writing=False)


def test_an_output_that_takes_no_objects_is_told_before_anything_starts(
    s3: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for uri in (f"{tmp_path}/file/out", "s3://no-such-bucket/run"):
        with pytest.raises(ConfigError, match=r"output: .* cannot be used"):
            Store(uri).check_usable(writing=True)


def test_a_usable_output_is_left_as_it_was(store: Store) -> None:
    store.create("data/a", b"x")
    store.check_usable(writing=True)
    assert store.names("_tmp") == []
    assert store.names("data") == ["data/a"]


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
        local.footer(shard.part_name)


def test_a_part_is_read_whatever_fails_for_a_moment(
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
    assert len(store.table(shard.part_name)) == shard.rows
    assert len(store.answers(["row_key"])) == shard.rows
    assert len(failed) > 3


def test_a_long_footer_is_read_whole(local: Store) -> None:
    shard = a_shard()
    local.create(shard.part_name, with_metadata(a_part(shard, "mine"), {b"filler": bytes(200_000)}))
    assert local.footer(shard.part_name).token == "mine"


@pytest.mark.usefixtures("new_s3_instances")
def test_a_pickle_carries_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not those that fsspec puts into every filesystem it makes."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"key": "test", "secret": SECRET})
    store = Store(f"{s3}/run")
    store.create("data/a", b"x")
    assert SECRET.encode() in pickle.dumps(fsspec.filesystem("s3")), "nothing to hide here"
    data = pickle.dumps(store)
    assert SECRET.encode() not in data
    again = pickle.loads(data)
    assert (again.uri, again.read("data/a")) == (store.uri, b"x")


def test_an_input_on_s3_is_known_by_its_etag(s3: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(f"{s3}/in")
    for name, ids in (("a.parquet", [1, 2]), ("sub/b.parquet", [3])):
        with filesystem.open(f"{root}/{name}", "wb") as handle:
            pq.write_table(pa.table({"image": [b"x"] * len(ids), "id": ids}), handle)
    source = Source(make_recipe("model", input__uri=f"{s3}/in", input__keep=["id"]).input)
    files, _ = source.scan()
    assert [file.source for file in files] == ["a.parquet", "sub/b.parquet"]
    assert all(file.fingerprint.startswith("etag:") for file in files)
    spans = [Span(file.source, file.fingerprint, 0, file.rows) for file in files]
    rows = [row for span in spans for row in source.read(span, 1 << 20)]
    assert [row.carried["id"].as_py() for row in rows] == [1, 2, 3]
