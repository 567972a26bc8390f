"""A store in trouble: nothing is lost, nothing doubled, and lasting errors are reported."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gc2ray.core.errors import ConfigError
from gc2ray.core.shards import Shard, SourceFile, cut_shards
from gc2ray.data.retries import RetryPolicy
from gc2ray.data.store import Store
from gc2ray.output.compact import compact
from gc2ray.output.parts import Commit, commit_part, list_parts, read_part_footer
from tests.output.test_parts import RECIPE, a_part
from tests.support.fault_proxy import LONG_RETRIES, FaultProxy, Faults
from tests.support.object_servers import SECRET, a_bucket
from tests.support.outputs import first_plan, write_round

pytestmark = pytest.mark.usefixtures("quick")

SHARDS, DRIVERS = 12, 2


@pytest.fixture
def output(proxy: FaultProxy) -> Iterator[str]:
    with a_bucket(proxy.host, proxy.port) as bucket:
        proxy.met.clear()
        yield f"{bucket}/run"


def shards() -> list[Shard]:
    return list(
        cut_shards([SourceFile("rows.parquet", "f", (3,) * SHARDS)], 3, RECIPE.fingerprint())
    )


def part(shard: Shard, token: str) -> bytes:
    return a_part(shard, token)


def committed_by_two(output: str, *, at_once: bool = True) -> dict[tuple[int, str], Commit]:
    """Every shard is committed by two drivers, at the same time or one after the other."""
    stores = [Store(output, LONG_RETRIES) for _ in range(DRIVERS)]

    def commit(work: tuple[int, Shard]) -> tuple[tuple[int, str], Commit]:
        driver, shard = work
        token = f"{driver}-{shard.index}"
        return (driver, shard.sid), commit_part(stores[driver], shard, part(shard, token), token)

    turns = [[(driver, shard) for shard in shards()] for driver in range(DRIVERS)]
    if at_once:
        turns = [[work for pair in zip(*turns, strict=True) for work in pair]]
    with ThreadPoolExecutor(8) as pool:
        return dict(verdict for turn in turns for verdict in pool.map(commit, turn))


@pytest.mark.parametrize("server", ["honours", "ignores"])
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
def test_parts_are_neither_lost_nor_duplicated(
    proxy: FaultProxy, output: str, server: str, faults: Faults, met: str
) -> None:
    """Where conditions are ignored, two drivers must not run in the same moment."""
    proxy.faults = faults
    verdicts = committed_by_two(output, at_once=server == "honours")
    count = proxy.met[met]
    proxy.faults = Faults()
    assert count > 0, "the fault was not met"
    store = Store(output)
    names = list_parts(store)
    assert sorted(names) == sorted(shard.sid for shard in shards())
    assert len(store.names("data")) == SHARDS
    for shard in shards():
        winner = int(read_part_footer(store, names[shard.sid]).token.split("-")[0])
        reported = {driver: verdicts[driver, shard.sid] for driver in range(DRIVERS)}
        assert reported == {winner: Commit.WON, 1 - winner: Commit.LOST_RACE}


def test_a_dataset_is_written_though_acknowledgements_get_lost(
    proxy: FaultProxy, output: str, tmp_path: Path
) -> None:
    write_round(tmp_path, 0, first_plan())
    proxy.faults = Faults(lost=0.5)
    dataset = compact(str(tmp_path), f"{output}/dataset", file_bytes=1000)
    proxy.faults = Faults()
    assert proxy.met["lost"] > 0
    store = Store(f"{output}/dataset")
    for file in dataset.files:
        assert store.sha256(file.name) == file.sha256
    assert json.loads(store.read("_SUCCESS") or b"")["answers"] == dataset.answers


@pytest.mark.parametrize("requests", [30, 300], ids=["short", "beyond the client's own tries"])
def test_an_outage_is_retried(proxy: FaultProxy, output: str, requests: int) -> None:
    proxy.faults = Faults(outage_requests=requests)
    verdicts = committed_by_two(output)
    assert proxy.met["outage"] == requests
    assert Counter(verdicts.values()) == {Commit.WON: SHARDS, Commit.LOST_RACE: SHARDS}
    assert len(list_parts(Store(output))) == SHARDS


@pytest.mark.parametrize("status", [403, 400], ids=["denied", "expired"])
def test_forbidden_writes_are_not_retried(proxy: FaultProxy, output: str, status: int) -> None:
    proxy.faults = Faults(status=status)
    with pytest.raises(PermissionError) as refused:
        Store(output, LONG_RETRIES).create("data/a", b"x")
    assert refused.value.__notes__ == ["writing data/a"]
    assert proxy.met["status"] == 1
    with pytest.raises(ConfigError, match=r"cannot be used: PermissionError: .*own chain"):
        Store(output, LONG_RETRIES).check_usable(writing=True)


def test_a_full_disk_is_reported_and_leaves_nothing(proxy: FaultProxy, output: str) -> None:
    shard, store = shards()[0], Store(output, LONG_RETRIES)
    proxy.faults = Faults(status=507)
    with pytest.raises(OSError, match="on purpose") as refused:
        commit_part(store, shard, part(shard, "t"), "t")
    assert "tried for" not in str(refused.value)
    proxy.faults = Faults()
    assert list_parts(store) == {}
    assert commit_part(store, shard, part(shard, "t"), "t") == Commit.WON


def test_retries_end(proxy: FaultProxy, output: str) -> None:
    """The message says how long it lasted, and what came last."""
    proxy.faults = Faults(busy=1.0)
    store = Store(output, RetryPolicy(total_seconds=0.5, first_seconds=0.1, longest_seconds=0.2))
    with pytest.raises(TimeoutError, match=r"writing data/a: tried for \d+ s, last: OSError: "):
        store.create("data/a", b"x")
    assert proxy.met["busy"] > 1


def test_a_store_that_honours_conditions_is_not_warned_of(
    output: str, caplog: pytest.LogCaptureFixture
) -> None:
    Store(output).check_usable(writing=True)
    assert [record for record in caplog.records if record.name.startswith("gc2ray")] == []
    assert Store(output).names("_tmp") == []


@pytest.mark.parametrize("server", ["ignores"])
def test_a_store_that_ignores_conditions_is_reported(
    output: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Even there a second writer that is late overwrites nothing."""
    store = Store(output)
    store.check_usable(writing=True)
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("gc2ray")]
    assert "ignores conditional writes" in message
    assert store.create("data/a", b"one") is True
    assert store.create("data/a", b"two") is False
    assert store.read("data/a") == b"one"
    assert store.names("_tmp") == []


def test_no_secret_is_logged(
    proxy: FaultProxy, output: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults = Faults(busy=0.6)
    Store(output, LONG_RETRIES).replace("workers/w.json", b"x")
    assert SECRET not in caplog.text
