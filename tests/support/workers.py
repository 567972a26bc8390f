"""Workers without Ray, with an engine of their own."""

from __future__ import annotations

import pyarrow as pa

from gc2ray.core.config.job import Job
from gc2ray.core.shards import Shard, cut_shards
from gc2ray.data.source import Source
from gc2ray.runner.messages import ShardAssignment
from gc2ray.runner.worker import Worker
from tests.support.fakes import EchoEngine

KEPT_COLUMNS = pa.schema([pa.field("id", pa.int64())])


def shards_of(job: Job, rows: int = 6) -> tuple[Shard, ...]:
    """The shards of a job's input, of so many rows each."""
    files, _ = Source(job.recipe.input).scan()
    return tuple(cut_shards(files, rows, job.recipe.fingerprint()))


def make_worker(job: Job, engine: object = None, **options: object) -> Worker:
    """A worker that is loaded; its engine echoes prompts, unless another is given."""
    engine = engine or EchoEngine()
    worker = Worker(job, KEPT_COLUMNS, load=lambda job: engine, **options)
    worker.load()
    return worker


def second_try(shard: Shard, **known: object) -> ShardAssignment:
    """The assignment of a shard that was lost once."""
    return ShardAssignment(shard, 2, **known)
