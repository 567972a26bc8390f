"""The worker without Ray: it loads, calibrates, and commits parts."""

from __future__ import annotations

import errno
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import NoCredentialsError

from gc2ray.core.config.job import Job
from gc2ray.core.config.recipe import parse_recipe
from gc2ray.core.errors import (
    ConfigError,
    ShardError,
    StorageRefused,
    UnwritableShard,
)
from gc2ray.data.store import Store
from gc2ray.models.shape import LLAVA_7B, ModelShape
from gc2ray.output.parts import Commit, list_parts, read_part_footer
from gc2ray.runner.messages import ShardAssignment
from gc2ray.runner.worker import Worker
from tests.support.fakes import EchoEngine
from tests.support.methods import SOURCE, write_method
from tests.support.ray_head import until
from tests.support.rows import encoded, make_job, picture, prompts_of, write_rows
from tests.support.workers import KEPT_COLUMNS, make_worker, shards_of


def test_parts_hold_every_row_in_input_order(job: Job) -> None:
    worker = make_worker(job, EchoEngine(buffered=4))  # answers come back out of order
    shards = shards_of(job)
    with ThreadPoolExecutor(2) as callers:
        results = list(callers.map(lambda shard: worker.process(ShardAssignment(shard)), shards))
    assert [result.commit for result in results] == [Commit.WON] * len(shards)
    store = Store(job.output)
    tables = [pq.read_table(Path(job.output) / name) for name in store.names("data")]
    rows = [row for table in tables for row in table.to_pylist()]
    expected = [("a.parquet", row) for row in range(12)] + [("b.parquet", r) for r in range(8)]
    assert [(row["source"], row["row"]) for row in rows] == expected
    assert [row["id"] for row in rows] == [row["row"] for row in rows]
    assert [row["answer"] for row in rows] == [f"Question {row['row']}?" for row in rows]
    assert {row["worker"] for row in rows} == {worker.uuid}
    footer = read_part_footer(store, shards[0].part_name)
    assert (footer.sid, footer.rows, footer.stats.rows) == (shards[0].sid, 5, 5)
    assert footer.stats.peak_host_bytes > 0


def test_pages_of_a_part_have_checksums(job: Job) -> None:
    shard = shards_of(job)[0]
    make_worker(job).process(ShardAssignment(shard))
    part = (Path(job.output) / shard.part_name).read_bytes()
    column = pq.read_metadata(pa.BufferReader(part)).row_group(0).column(0)
    place = column.data_page_offset + column.total_compressed_size // 2
    damaged = part[:place] + bytes([part[place] ^ 1]) + part[place + 1 :]
    whole, broken = (
        pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        for data in (part, damaged)
    )
    assert len(whole.read()) == shard.rows
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        broken.read(use_threads=False)


def test_a_shard_that_cannot_be_read_fails_alone(job: Job, tmp_path: Path) -> None:
    shards = shards_of(job, rows=12)
    (tmp_path / "in" / "a.parquet").unlink()
    worker = make_worker(job)
    with pytest.raises(ShardError, match=r"a\.parquet"):
        worker.process(ShardAssignment(shards[0]))
    assert worker.process(ShardAssignment(shards[1])).stats.rows == 8
    assert len(list_parts(Store(job.output))) == 1


def test_a_changed_input_is_an_error(job: Job, tmp_path: Path) -> None:
    shards = shards_of(job, rows=12)
    write_rows(tmp_path / "in" / "a.parquet", 12, row_group=6)
    with pytest.raises(ShardError, match="changed since the run was planned"):
        make_worker(job).process(ShardAssignment(shards[0]))


def test_the_second_try_of_a_committed_shard_loses_the_race(job: Job) -> None:
    shard = shards_of(job)[0]
    assert make_worker(job).process(ShardAssignment(shard)).commit == Commit.WON
    before = (Path(job.output) / shard.part_name).read_bytes()
    assert make_worker(job).process(ShardAssignment(shard, 2)).commit == Commit.LOST_RACE
    assert (Path(job.output) / shard.part_name).read_bytes() == before


def test_calibration_times_rows_and_commits_nothing(job: Job) -> None:
    """As a whole: all five answers come in one burst at the end, after 5 x 5 ms."""
    worker = make_worker(job, EchoEngine(seconds=0.005, buffered=100))
    assert worker.calibrate(shards_of(job)[0].spans) >= 0.005
    assert worker.progress().rows == 0
    assert list_parts(Store(job.output)) == {}


def test_a_broken_image_is_a_bad_answer_to_every_prompt(
    tiny_paths: dict[str, Path], tmp_path: Path
) -> None:
    """With the real engine; rows before and behind are answered."""
    images = [{"bytes": encoded(picture((60, 80)))}, {"bytes": b"no image"}, {"bytes": None}]
    prompts = [["one", "two"], ["one", None, "three"], None]
    (tmp_path / "in").mkdir()
    table = {"id": [0, 1, 2], "image": images, "prompts": prompts}
    pq.write_table(pa.table(table), tmp_path / "in" / "a.parquet")
    recipe = {"input__keep": ["id"], "input__prompt": {"column": "prompts"}}
    job = make_job(tiny_paths["vicuna"], tmp_path / "in", tmp_path / "out", **recipe)
    worker = Worker(job, KEPT_COLUMNS)
    worker.load()
    (shard,) = shards_of(job)
    worker.process(ShardAssignment(shard))
    rows = pq.read_table(Path(job.output) / shard.part_name).to_pylist()
    assert [(row["row"], row["prompt_index"], row["status"], row["id"]) for row in rows] == [
        (0, 0, "ok", 0),
        (0, 1, "ok", 0),
        (1, 0, "bad_image", 1),
        (1, 1, "bad_prompt", 1),
        (1, 2, "bad_image", 1),
        (2, 0, "bad_prompt", 2),
    ]
    assert read_part_footer(Store(job.output), shard.part_name).rows == 3


def test_calibration_counts_the_prompts_of_a_row(multi_prompt_job: Job) -> None:
    """Answers as many prompts as there are rows, twice, and multiplies by the prompts per row."""
    worker = make_worker(multi_prompt_job, EchoEngine(seconds=0.05))
    shard = shards_of(multi_prompt_job)[0]
    share = sum(map(prompts_of, range(shard.rows))) / shard.rows
    assert share > 1.5
    assert worker.calibrate(shard.spans) >= 0.05 * share
    assert worker._ticks == 2 * shard.rows


def test_progress_counts_rows_and_first_errors(job: Job, tmp_path: Path) -> None:
    table = pq.read_table(tmp_path / "in" / "a.parquet").to_pydict()
    table["prompt"] = [None if row % 2 else "fine" for row in range(12)]
    schema = pq.read_schema(tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table(table, schema=schema), tmp_path / "in" / "a.parquet")
    worker = make_worker(job)
    worker.process(ShardAssignment(shards_of(job, rows=12)[0]))
    progress = worker.progress()
    assert (progress.rows, progress.answers, progress.bad_answers) == (12, 12, 6)
    assert len(progress.errors) == 3
    assert progress.errors[0] == "a.parquet#1: bad_prompt: prompt column 'prompt' is null"


def test_progress_in_fetching_renews_the_load_clock(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where no byte of this process moves: it waits for another that fetches the model."""
    monkeypatch.setattr("gc2ray.runner.worker.peak_host_bytes", lambda: 0)
    monkeypatch.setattr("gc2ray.runner.worker._bytes_moved", lambda: 0)
    seen: list[int] = []

    def slow_fetch(model, *, tick):
        for _ in range(3):
            seen.append(worker.progress().ticks)
            tick()
        raise OSError("the network failed")

    monkeypatch.setattr("gc2ray.engine.engine.fetch_model", slow_fetch)
    worker = Worker(job, KEPT_COLUMNS)
    with pytest.raises(OSError, match="the network failed"):
        worker.load()
    assert seen == [0, 1, 2]
    assert worker.progress().ticks == 3


def test_the_worker_leaves_a_record_of_itself(job: Job) -> None:
    worker = make_worker(job)
    data = until(lambda: Store(job.output).read(f"workers/{worker.uuid}.json")) or b""
    record = json.loads(data)
    assert (record["device"], record["model_digest"]) == ("fake", "no model")
    assert record["started"] <= record["loaded"] <= record["last_seen"]
    assert record["model_shape"] is None


def test_the_record_has_the_sizes_of_the_model(job: Job) -> None:
    engine = EchoEngine()
    engine.model_shape = LLAVA_7B
    worker = make_worker(job, engine)
    data = until(lambda: Store(job.output).read(f"workers/{worker.uuid}.json")) or b""
    assert ModelShape.from_dict(json.loads(data)["model_shape"]) == LLAVA_7B


def test_a_worker_with_another_model_is_refused(job: Job) -> None:
    """The first one says which model the run has; another run says so for itself."""
    make_worker(job)
    make_worker(job)
    other = EchoEngine()
    other.model_digest = "another"
    with pytest.raises(ConfigError, match=r"differs from the model .* \(another here"):
        make_worker(job, other)
    make_worker(job.model_copy(update={"output": f"{job.output}-2"}), other)
    assert json.loads(Store(job.output).read("model.json") or b"")["digest"] == "no model"


def test_a_worker_with_another_source_of_the_method_is_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it fetches the model: there is none here."""
    monkeypatch.syspath_prepend(tmp_path)
    path = write_method(tmp_path, "own_method")
    recipe = job.recipe.model_dump(mode="json")
    recipe["compression"] = {"method": "own_method:Own", "allow_code": True}
    worker = Worker(job.model_copy(update={"recipe": parse_recipe(recipe)}), KEPT_COLUMNS)
    path.write_text(SOURCE + "# of another node\n")
    with pytest.raises(ConfigError, match=r"recipe\.compression\.source_sha256: the source of own"):
        worker.load()


def refuse_writes(worker: Worker, error: Exception) -> None:
    def create(name: str, data: bytes) -> bool:
        raise error

    worker._store.create = create


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "ExpiredToken"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        NoCredentialsError(),
    ],
    ids=lambda error: str(error),
)
def test_a_storage_refusal_is_not_the_shards_error(job: Job, error: Exception) -> None:
    worker, (shard, *_) = make_worker(job), shards_of(job)
    refuse_writes(worker, error)
    with pytest.raises(StorageRefused) as refused:
        worker.process(ShardAssignment(shard))
    assert str(error) in str(refused.value)
    assert f"{job.output} refused {shard.part_name}" in str(refused.value)
    assert pickle.loads(pickle.dumps(refused.value)).args == refused.value.args, "it travels"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TimeoutError(errno.ETIMEDOUT, "tried for 120 s"), ShardError),
        (OSError(errno.EMSGSIZE, "EntityTooLarge"), UnwritableShard),
        (OSError(errno.EFBIG, "File too large"), UnwritableShard),
    ],
)
def test_other_write_errors_fail_only_the_shard(
    job: Job, error: Exception, kind: type[Exception]
) -> None:
    worker = make_worker(job)
    refuse_writes(worker, error)
    with pytest.raises(ShardError) as failed:
        worker.process(ShardAssignment(shards_of(job)[0]))
    assert type(failed.value) is kind


def test_a_foreign_file_with_a_parts_name_fails_the_shard_for_good(job: Job) -> None:
    shard = shards_of(job)[0]
    Store(job.output).create(shard.part_name, b"not a part")
    with pytest.raises(UnwritableShard, match="is not a part that gc2ray wrote; move it away"):
        make_worker(job).process(ShardAssignment(shard))


def test_answers_that_do_not_fit_into_parquet_are_not_retried(job: Job) -> None:
    worker = make_worker(job)
    worker._kept_columns = pa.schema([pa.field("id", pa.binary())])
    with pytest.raises(UnwritableShard, match="its answers do not fit into Parquet: Arrow"):
        worker.process(ShardAssignment(shards_of(job)[0]))


def test_a_model_record_that_cannot_be_written_is_a_storage_refusal(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Store, name: str, data: bytes) -> bool:
        raise PermissionError(errno.EACCES, "ExpiredToken")

    monkeypatch.setattr(Store, "create", refuse)
    with pytest.raises(StorageRefused, match=r"refused model\.json .*ExpiredToken"):
        make_worker(job)
