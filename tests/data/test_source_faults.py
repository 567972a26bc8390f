"""Input on S3: fetched once, waited for in trouble, and looked at anew after it was planned."""

from __future__ import annotations

import io
from collections.abc import Iterator

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from huggingface_hub import HfFileSystem

from gc2ray.core.errors import ConfigError, ShardError
from gc2ray.core.records import Request
from gc2ray.core.shards import cut_shards
from gc2ray.data.retries import RetryPolicy
from gc2ray.data.source import Source
from tests.support.fake_hub import FakeHub
from tests.support.fault_proxy import EVERYTHING, LONG_RETRIES, FaultProxy, Faults
from tests.support.object_servers import a_bucket, single_try_clients
from tests.support.rows import make_recipe
from tests.support.sources import whole

FILES, ROWS, GROUP_ROWS, SHARD_ROWS = 4, 40, 20, 10
MEMORY = 1 << 20
pytestmark = pytest.mark.usefixtures("quick")
SERVERS = pytest.mark.parametrize("server", ["honours", "ignores"])


def rows_file(first: int, rows: int = ROWS, row_bytes: int = 100, **options: object) -> bytes:
    """A Parquet file of rows that are all different."""
    draw = np.random.default_rng(first)
    table = pa.table(
        {
            "id": list(range(first, first + rows)),
            "image": [draw.bytes(row_bytes) for _ in range(rows)],
            "prompt": [f"{number}?" for number in range(first, first + rows)],
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"row_group_size": GROUP_ROWS, **options})
    return sink.getvalue()


@pytest.fixture
def bucket(proxy: FaultProxy) -> Iterator[str]:
    with a_bucket(proxy.host, proxy.port) as bucket:
        for number in range(FILES):
            data = rows_file(number * ROWS)
            s3fs.S3FileSystem().pipe_file(f"{bucket}/in/{number}.parquet", data)
        proxy.met.clear()
        yield bucket


def source_of(uri: str, retry_policy: RetryPolicy = LONG_RETRIES) -> Source:
    settings = {"input__uri": uri, "input__keep": ["id"], "input__prompt": {"column": "prompt"}}
    return Source(make_recipe("model", **settings).input, retry_policy)


def rows_of(source: Source, shard_rows: int = SHARD_ROWS) -> list[Request]:
    """All of them, as a worker reads them."""
    files, _ = source.scan()
    spans = [span for shard in cut_shards(files, shard_rows, "f") for span in shard.spans]
    return [row for span in spans for row in source.read(span, MEMORY)]


@pytest.fixture
def single_try() -> Iterator[None]:
    with single_try_clients():
        yield


@SERVERS
@pytest.mark.parametrize("uri", ["in/", "in/*.parquet", "in/0.parquet"])
def test_a_bucket_is_read(bucket: str, uri: str) -> None:
    ids = [row.kept_columns["id"].as_py() for row in rows_of(source_of(f"{bucket}/{uri}"))]
    assert ids == list(range(ROWS if uri == "in/0.parquet" else FILES * ROWS))


@pytest.mark.parametrize(
    ("faults", "met"),
    [
        (Faults(busy=0.15), "busy"),
        (Faults(dropped=0.15), "dropped"),
        (Faults(busy=0.08, dropped=0.08, trickle_seconds=0.005), "forwarded"),
    ],
    ids=["busy", "dropped", "all"],
)
def test_temporary_errors_are_retried(
    proxy: FaultProxy, bucket: str, faults: Faults, met: str
) -> None:
    proxy.faults = faults
    rows = rows_of(source_of(f"{bucket}/in/"))
    assert proxy.met[met] > 0, "the fault was not met"
    assert [row.prompts for row in rows] == [(f"{n}?",) for n in range(FILES * ROWS)]


@pytest.mark.usefixtures("single_try")
def test_an_outage_in_the_middle_of_a_file_is_retried(proxy: FaultProxy, bucket: str) -> None:
    data = rows_file(0, rows=60, row_bytes=1 << 18, use_dictionary=False, write_batch_size=1)
    s3fs.S3FileSystem().pipe_file(f"{bucket}/large/a.parquet", data)
    source = source_of(f"{bucket}/large/")
    (file,), _ = source.scan()
    rows = source.read(whole(file), MEMORY)
    assert next(rows).row == 0
    proxy.faults = Faults(outage_requests=20)
    assert [row.row for row in rows] == list(range(1, 60))
    assert proxy.met["outage"] == 20


@pytest.mark.usefixtures("single_try")
def test_lasting_errors_fail_the_shard(proxy: FaultProxy, bucket: str) -> None:
    """It says what was tried, and for how long."""
    short_retries = RetryPolicy(total_seconds=0.5, first_seconds=0.1, longest_seconds=0.2)
    source = source_of(f"{bucket}/in/", short_retries)
    (file, *_), _ = source.scan()
    proxy.faults = Faults(busy=1.0)
    with pytest.raises(ShardError, match=r"0\.parquet: .*tried for \d+ s, last: OSError"):
        list(source.read(whole(file), MEMORY))
    with pytest.raises(ConfigError, match=r"recipe\.input\.uri: .*tried for \d+ s, last: OSError"):
        source_of(f"{bucket}/in/", short_retries).scan()


@pytest.mark.parametrize("status", [403, 400], ids=["denied", "expired"])
def test_forbidden_requests_are_reported_at_once(
    proxy: FaultProxy, bucket: str, status: int
) -> None:
    source = source_of(f"{bucket}/in/")
    (file, *_), _ = source.scan()
    proxy.faults = Faults(status=status, refused=EVERYTHING)
    with pytest.raises(ShardError, match=r"0\.parquet: ") as refused:
        list(source.read(whole(file), MEMORY))
    assert "tried for" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"recipe\.input\.uri: ") as unusable:
        source_of(f"{bucket}/in/").scan()
    assert "tried for" not in str(unusable.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = {f"default/train/{n:04d}.parquet": rows_file(n * ROWS) for n in range(FILES)}
    files["default/test/0000.parquet"] = rows_file(1000)
    with FakeHub("owner/name", files).running() as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.address})
        HfFileSystem.clear_instance_cache()
        yield hub
    HfFileSystem.clear_instance_cache()


def test_a_split_of_a_dataset_of_the_hub_is_read(hub: FakeHub) -> None:
    rows = rows_of(source_of("hf:owner/name?split=train"))
    assert [row.row_key for row in rows[:2]] == ["0000.parquet#0", "0000.parquet#1"]
    assert [row.prompts for row in rows] == [(f"{n}?",) for n in range(FILES * ROWS)]
    assert len(rows_of(source_of("hf:owner/name?split=test"))) == ROWS
    with pytest.raises(ConfigError, match="no Parquet files at hf:owner/name"):
        source_of("hf:owner/name?split=none").scan()


def test_errors_of_the_hub_are_retried(hub: FakeHub) -> None:
    source = source_of("hf:owner/name?split=train")
    (file, *_), _ = source.scan()
    hub.down_for = 2
    assert len(list(source.read(whole(file), MEMORY))) == ROWS
    assert hub.down_for == 0


@SERVERS
def test_a_file_that_changed_since_it_was_planned(bucket: str) -> None:
    """Whatever this process has listed before."""
    source = source_of(f"{bucket}/in/")
    (file, second, *_), _ = source.scan()
    s3fs.S3FileSystem(use_listings_cache=False).pipe_file(f"{bucket}/in/0.parquet", rows_file(1000))
    with pytest.raises(ShardError, match=r"0\.parquet changed since the run was planned"):
        list(source.read(whole(file), MEMORY))
    assert len(list(source.read(whole(second), MEMORY))) == ROWS


def test_a_new_file_is_found_despite_cached_listings(bucket: str) -> None:
    """By a process that has listed before, too."""
    assert len(source_of(f"{bucket}/in/").scan()[0]) == FILES
    s3fs.S3FileSystem(use_listings_cache=False).pipe_file(f"{bucket}/in/9.parquet", rows_file(999))
    assert len(source_of(f"{bucket}/in/").scan()[0]) == FILES + 1


@pytest.mark.parametrize("shard_rows", [1000, 100, 16])
def test_every_byte_is_fetched_about_once(proxy: FaultProxy, bucket: str, shard_rows: int) -> None:
    """Columns lie apart, and shards begin within row groups: nothing is fetched for each anew."""
    options = {"use_dictionary": False, "write_batch_size": 4, "row_group_size": 100}
    data = rows_file(0, rows=600, row_bytes=40_000, **options)
    s3fs.S3FileSystem().pipe_file(f"{bucket}/large/a.parquet", data)
    source = source_of(f"{bucket}/large/")
    source.scan()
    proxy.sent_bytes = 0
    source.scan()
    assert proxy.sent_bytes < 200_000, "planning reads footers only"
    assert len(rows_of(source, shard_rows)) == 600
    assert proxy.sent_bytes < 1.3 * len(data) + 200_000
