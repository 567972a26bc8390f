"""The output directory: one winner per name, whole objects or none, on a disk and on S3."""

from __future__ import annotations

import errno
import os
import pickle
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from gc2ray.core.errors import ConfigError
from gc2ray.core.shards import Span
from gc2ray.data.source import Source
from gc2ray.data.store import Store
from gc2ray.output.parts import (
    list_parts,
)
from tests.support.object_servers import SECRET, single_try_clients
from tests.support.rows import make_recipe
from tests.support.stores import THREADS, race

RECIPE = make_recipe("model")


@pytest.fixture
def new_s3_instances() -> Iterator[None]:
    """fsspec keeps filesystems; what it made within the test is not for others."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


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


def test_a_store_within_another_is_recognised(tmp_path: Path) -> None:
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


def test_an_empty_store_holds_nothing(store: Store) -> None:
    assert store.read("run.json") is None
    assert store.names("data") == []
    assert list_parts(store) == {}
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


def test_an_unknown_filesystem_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="output: Protocol not known: nosuch"):
        Store("nosuch://bucket/run")


def test_a_store_out_of_reach_is_reported_before_anything_starts(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    with single_try_clients(), pytest.raises(ConfigError, match=r"output: s3://.* cannot be used"):
        Store(f"{s3}/run").check_usable(writing=False)


def test_an_unwritable_output_is_reported_before_anything_starts(s3: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for uri in (f"{tmp_path}/file/out", "s3://no-such-bucket/run"):
        with pytest.raises(ConfigError, match=r"output: .* cannot be used"):
            Store(uri).check_usable(writing=True)


def test_a_usable_output_is_left_as_it_was(store: Store) -> None:
    store.create("data/a", b"x")
    store.check_usable(writing=True)
    assert store.names("_tmp") == []
    assert store.names("data") == ["data/a"]


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
    assert [row.kept_columns["id"].as_py() for row in rows] == [1, 2, 3]
