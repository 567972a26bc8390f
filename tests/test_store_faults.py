"""A store in trouble: nothing is lost, nothing doubled, and trouble that stays is told."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import s3fs

from gc2ray.errors import ConfigError
from gc2ray.patience import Patience
from gc2ray.shards import Shard, SourceFile, cut_shards
from gc2ray.store import Commit, Store
from tests.fault_proxy import FaultProxy, Faults
from tests.test_store import RECIPE, SECRET, a_part

SHARDS, DRIVERS = 12, 2
PATIENT = Patience(total_seconds=60.0, first_seconds=0.05, longest_seconds=1.0)


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultProxy]:
    """An S3 server that honours conditional writes, behind the proxy."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    made = FaultProxy(*server.get_host_and_port())
    with made.running(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", made.address)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield made
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def output(proxy: FaultProxy) -> str:
    proxy.faults = Faults()
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(bucket)
    proxy.met.clear()
    return f"s3://{bucket}/run"


def shards() -> list[Shard]:
    return list(
        cut_shards([SourceFile("rows.parquet", "f", (3,) * SHARDS)], 3, RECIPE.fingerprint())
    )


def part(shard: Shard, token: str) -> bytes:
    return a_part(shard, token)


def committed_by_two(output: str) -> dict[tuple[int, str], Commit]:
    """Every shard is committed by two drivers at the same time."""
    stores = [Store(output, PATIENT) for _ in range(DRIVERS)]

    def commit(work: tuple[int, Shard]) -> tuple[tuple[int, str], Commit]:
        driver, shard = work
        token = f"{driver}-{shard.index}"
        return (driver, shard.sid), stores[driver].commit(shard, part(shard, token), token)

    work = [(driver, shard) for shard in shards() for driver in range(DRIVERS)]
    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(commit, work))


@pytest.mark.parametrize(
    ("faults", "met"),
    [
        (Faults(busy=0.15), "busy"),
        (Faults(dropped=0.15), "dropped"),
        (Faults(lost=0.5), "lost"),
        (Faults(busy=0.1, dropped=0.1, lost=0.2), "lost"),
        (Faults(trickle_seconds=0.02), "forwarded"),
    ],
    ids=["busy", "dropped", "lost-acknowledgements", "all", "slow"],
)
def test_nothing_is_lost_or_doubled(
    proxy: FaultProxy, output: str, faults: Faults, met: str
) -> None:
    proxy.faults = faults
    verdicts = committed_by_two(output)
    count = proxy.met[met]
    proxy.faults = Faults()
    assert count > 0, "the fault was not met"
    store = Store(output)
    names = store.committed()
    assert sorted(names) == sorted(shard.sid for shard in shards())
    assert len(store.names("data")) == SHARDS
    for shard in shards():
        winner = int(store.footer(names[shard.sid]).token.split("-")[0])
        told = {driver: verdicts[driver, shard.sid] for driver in range(DRIVERS)}
        assert told == {winner: Commit.WON, 1 - winner: Commit.LOST_RACE}


@pytest.mark.parametrize("seconds", [2.0, pytest.param(10.0, marks=pytest.mark.slow)])
def test_an_outage_is_waited_out(proxy: FaultProxy, output: str, seconds: float) -> None:
    proxy.faults = Faults(outage_until=time.monotonic() + seconds)
    verdicts = committed_by_two(output)
    assert proxy.met["outage"] > 0
    assert Counter(verdicts.values()) == {Commit.WON: SHARDS, Commit.LOST_RACE: SHARDS}
    assert len(Store(output).committed()) == SHARDS


def test_what_is_forbidden_is_not_tried_again(proxy: FaultProxy, output: str) -> None:
    proxy.faults = Faults(status=403)
    with pytest.raises(PermissionError):
        Store(output, PATIENT).create("data/a", b"x")
    assert proxy.met["status"] == 1
    with pytest.raises(ConfigError, match=r"cannot be used: PermissionError: .*own chain"):
        Store(output, PATIENT).check_usable(writing=True)


def test_a_full_disk_is_told_and_leaves_nothing(proxy: FaultProxy, output: str) -> None:
    shard, store = shards()[0], Store(output, PATIENT)
    proxy.faults = Faults(status=507)
    started = time.monotonic()
    with pytest.raises(OSError, match="on purpose"):
        store.commit(shard, part(shard, "t"), "t")
    assert time.monotonic() - started < PATIENT.total_seconds / 2
    proxy.faults = Faults()
    assert store.committed() == {}
    assert store.commit(shard, part(shard, "t"), "t") == Commit.WON


def test_patience_ends(proxy: FaultProxy, output: str) -> None:
    """The message says how long it lasted, and what came last."""
    proxy.faults = Faults(outage_until=time.monotonic() + 60)
    store = Store(output, Patience(total_seconds=0.5, first_seconds=0.1, longest_seconds=0.2))
    with pytest.raises(TimeoutError, match=r"writing data/a: tried for \d s, last: OSError: "):
        store.create("data/a", b"x")
    assert proxy.met["outage"] > 1


def test_a_store_that_honours_conditions_is_not_warned_of(
    output: str, caplog: pytest.LogCaptureFixture
) -> None:
    Store(output).check_usable(writing=True)
    assert [record for record in caplog.records if record.name.startswith("gc2ray")] == []
    assert Store(output).names("_tmp") == []


def test_a_store_that_ignores_conditions_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Even there a second writer that is late overwrites nothing."""

    class Ignoring:
        def __init__(self, filesystem: object) -> None:
            self._fs = filesystem

        def __getattr__(self, name: str) -> object:
            return getattr(self._fs, name)

        def pipe_file(self, path: str, value: bytes, **_: object) -> None:
            self._fs.pipe_file(path, value)

    store = Store(f"memory://run-{uuid.uuid4().hex}")
    store._fs = Ignoring(store._fs)
    store.check_usable(writing=True)
    (message,) = caplog.messages
    assert "ignores conditional writes" in message
    assert store.create("data/a", b"one") is True
    assert store.create("data/a", b"two") is False
    assert store.read("data/a") == b"one"


def test_no_secret_is_logged(
    proxy: FaultProxy, output: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults = Faults(busy=0.6)
    Store(output, PATIENT).replace("workers/w.json", b"x")
    assert SECRET not in caplog.text
