"""How many rows a shard has."""

from __future__ import annotations

from gc2ray.core.config.job import Cluster
from gc2ray.output.planner import shard_rows


def test_shards_are_sized_by_time_and_number_of_workers() -> None:
    cluster = Cluster(shard_seconds=45.0)
    assert shard_rows(cluster, 10**6, workers=2, seconds_per_row=0.1) == 450
    assert shard_rows(cluster, 100, workers=2, seconds_per_row=0.1) == 13
    assert shard_rows(cluster, 10**6, workers=2, seconds_per_row=100.0) == 1
    assert shard_rows(Cluster(shard_rows=7), 100, workers=2, seconds_per_row=0.1) == 7
