"""The worker without Ray: a plain class with an engine of its own."""

from __future__ import annotations

import errno
import json
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import NoCredentialsError

from gc2ray.core.config.job import Job
from gc2ray.core.config.recipe import parse_recipe
from gc2ray.core.errors import (
    ConfigError,
    EngineDead,
    ShardError,
    Status,
    StorageRefused,
    UnwritableShard,
)
from gc2ray.core.shards import Shard, Shards, cut_shards
from gc2ray.data.source import Source
from gc2ray.data.store import Store
from gc2ray.models.shape import LLAVA_7B, ModelShape
from gc2ray.output.parts import Commit, list_parts, read_part_footer
from gc2ray.output.plan import Plan
from gc2ray.output.planner import committed_parts, outcome
from gc2ray.runner.journal import read_and_remove
from gc2ray.runner.messages import PoisonRow, ShardAssignment
from gc2ray.runner.worker import Worker
from tests.support.fakes import EchoEngine
from tests.support.methods import SOURCE, write_method
from tests.support.ray_head import until
from tests.support.rows import encoded, make_job, picture, prompts_of, question_list, write_rows

CARRIED = pa.schema([pa.field("id", pa.int64())])


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_rows(tmp_path / "in" / "a.parquet", 12, row_group=5)
    write_rows(tmp_path / "in" / "b.parquet", 8, row_group=5)
    return make_job(
        "unused",
        tmp_path / "in",
        tmp_path / "out",
        input__keep=["id"],
        input__prompt={"column": "prompt"},
    )


@pytest.fixture
def listed(job: Job) -> Job:
    """The same rows with lists of prompts."""
    recipe = job.recipe.model_dump(mode="json")
    recipe["input"]["prompt"] = {"column": "prompts"}
    return job.model_copy(update={"recipe": parse_recipe(recipe)})


def shards_of(job: Job, rows: int = 6) -> tuple[Shard, ...]:
    files, _ = Source(job.recipe.input).scan()
    return tuple(cut_shards(files, rows, job.recipe.fingerprint()))


def make_worker(job: Job, engine: object = None, **options: object) -> Worker:
    engine = engine or EchoEngine()
    worker = Worker(job, CARRIED, load=lambda job: engine, **options)
    worker.load()
    return worker


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


@pytest.mark.parametrize("buffered", [0, 4, 100])
def test_parts_hold_every_prompt_of_every_row_in_order(listed: Job, buffered: int) -> None:
    """However answers come back: within a row, between rows, and over the border of shards."""
    worker = make_worker(listed, EchoEngine(buffered=buffered))
    shards, started = shards_of(listed), datetime.now(UTC)
    with ThreadPoolExecutor(2) as callers:
        results = list(callers.map(lambda shard: worker.process(ShardAssignment(shard)), shards))
    store = Store(listed.output)
    rows = [
        row
        for name in store.names("data")
        for row in pq.read_table(Path(listed.output) / name).to_pylist()
    ]
    places = [("a.parquet", row) for row in range(12)] + [("b.parquet", row) for row in range(8)]
    expected = [
        (source, row, index, text)
        for source, row in places
        for index, text in enumerate(question_list(row) or [None])
    ]
    assert [
        (row["source"], row["row"], row["prompt_index"], row["answer"]) for row in rows
    ] == expected
    assert [row["row_key"] for row in rows] == [f"{s}#{row}#{i}" for s, row, i, _ in expected]
    assert [row["id"] for row in rows] == [row["row"] for row in rows]
    assert [row["status"] for row in rows] == [
        "bad_prompt" if text is None else "ok" for *_, text in expected
    ]
    footers = [read_part_footer(store, shard.part_name) for shard in shards]
    assert [footer.rows for footer in footers] == [shard.rows for shard in shards]
    assert [footer.answers for footer in footers] == [done.stats.rows for done in results]
    assert sum(footer.answers for footer in footers) == len(expected)
    assert all(f.written and started < f.written < datetime.now(UTC) for f in footers)
    progress = worker.progress()
    assert (progress.rows, progress.answers) == (20, len(expected))
    plan = Plan(listed.recipe.fingerprint(), Shards.from_shards(shards), CARRIED)
    state = outcome(store, plan, committed_parts(store, plan))
    assert (state.rows, state.planned_rows, state.exit_code) == (20, 20, 0)
    assert state.stats.rows == len(expected)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (lambda row, index: row == 4, r"a\.parquet#4 is planned, but was not answered"),
        (lambda row, index: (row, index) == (4, 1), r"a\.parquet#4 has 4 .* answered: 0, 2, 3"),
        (lambda row, index: (row, index) == (4, 0), r"a\.parquet#4 has 4 .* answered: 1, 2, 3"),
        (lambda row, index: (row, index) == (4, 3), r"a\.parquet#4 has 4 .* answered: 0, 1, 2"),
        (lambda row, index: row == 4 and index > 0, r"a\.parquet#4 has 4 .* answered: 0$"),
    ],
)
def test_a_prompt_that_is_not_read_fails_the_shard(
    listed: Job, lost: Callable[[int, int], bool], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Source.read

    def losing(self, span, memory):
        return (r for r in read(self, span, memory) if not lost(r.row, r.prompt_index))

    shard = shards_of(listed, rows=12)[0]
    monkeypatch.setattr(Source, "read", losing)
    with pytest.raises(ShardError, match=message):
        make_worker(listed).process(ShardAssignment(shard))
    assert list_parts(Store(listed.output)) == {}


def test_a_row_that_is_not_planned_fails_the_shard(
    listed: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Source.read
    shard = shards_of(listed, rows=12)[0]
    wider = replace(shard.spans[0], stop=12)
    short = replace(shard, spans=(replace(wider, stop=9),))
    monkeypatch.setattr(Source, "read", lambda self, _, memory: read(self, wider, memory))
    with pytest.raises(ShardError, match=r"a\.parquet#9#0 was read, but is not planned"):
        make_worker(listed).process(ShardAssignment(short))


def test_a_prompt_that_is_read_twice_fails_the_shard(
    listed: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Source.read
    monkeypatch.setattr(
        Source, "read", lambda *a: (r for r in read(*a) for _ in range(1 + (r.row == 4)))
    )
    with pytest.raises(ShardError, match=r"a\.parquet#4#0 was read twice"):
        make_worker(listed).process(ShardAssignment(shards_of(listed, rows=12)[0]))


def test_an_answer_that_the_engine_loses_commits_nothing(listed: Job) -> None:
    """Of a row whose other prompts are answered: the worker waits, the stall clock ends it."""

    class Losing(EchoEngine):
        def stream(self, requests):
            for answer in super().stream(requests):
                if answer.request.row_key != "a.parquet#4#3":
                    yield answer

    worker = make_worker(listed, Losing())
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(worker.process, ShardAssignment(shards_of(listed, rows=12)[0]))
        with pytest.raises(TimeoutError):
            call.result(timeout=1.0)
        assert list_parts(Store(listed.output)) == {}
        worker._shards.close(EngineDead("ended by the test"))
        with pytest.raises(EngineDead):
            call.result(timeout=60)


def test_a_shards_border_does_not_drain_the_engine(job: Job) -> None:
    """With rows of the next shard at hand, the engine's batch spans the border."""
    shards = shards_of(job)
    steps: list[tuple[str, str]] = []
    both_queued = threading.Event()

    class Waiting(EchoEngine):
        def stream(self, requests):
            both_queued.wait(60)
            yield from super().stream(requests)

    engine = Waiting(buffered=8)
    worker = make_worker(job, engine, on_step=lambda step, sid: steps.append((step, sid)))
    with ThreadPoolExecutor(2) as callers:
        calls = [callers.submit(worker.process, ShardAssignment(shard)) for shard in shards[:2]]
        while worker._shards._queue.qsize() < 2:
            time.sleep(0.01)
        both_queued.set()
        for call in calls:
            call.result(timeout=60)
    first, second = [sid for step, sid in steps if step == "read"]
    assert steps.index(("read", second)) < steps.index(("answered", first))


def test_a_shard_that_cannot_be_read_fails_alone(job: Job, tmp_path: Path) -> None:
    shards = shards_of(job, rows=12)
    (tmp_path / "in" / "a.parquet").unlink()
    worker = make_worker(job)
    with pytest.raises(ShardError, match=r"a\.parquet"):
        worker.process(ShardAssignment(shards[0]))
    assert worker.process(ShardAssignment(shards[1])).stats.rows == 8
    assert len(list_parts(Store(job.output))) == 1


def test_a_row_whose_storage_failed_fails_its_shard(job: Job) -> None:
    """It is tried again with its shard, not committed as failed; the other shard goes on."""

    class Outage(EchoEngine):
        def stream(self, requests):
            for answer in super().stream(requests):
                failed = answer.request.row_key == "a.parquet#3"
                fault = (
                    {"status": Status.FAILED, "error": "503", "is_retryable": True}
                    if failed
                    else {}
                )
                yield replace(answer, **fault)

    worker = make_worker(job, Outage(buffered=2))
    first, second = shards_of(job, rows=12)
    with pytest.raises(ShardError, match=r"a\.parquet#3: 503"):
        worker.process(ShardAssignment(first))
    assert worker.process(ShardAssignment(second)).commit == Commit.WON
    assert list(list_parts(Store(job.output))) == [second.sid]


def test_a_changed_input_is_an_error(job: Job, tmp_path: Path) -> None:
    shards = shards_of(job, rows=12)
    write_rows(tmp_path / "in" / "a.parquet", 12, row_group=6)
    with pytest.raises(ShardError, match="changed since the run was planned"):
        make_worker(job).process(ShardAssignment(shards[0]))


def test_a_broken_engine_fails_every_shard(job: Job) -> None:
    def on_row(request):
        raise RuntimeError("the engine breaks")

    worker = make_worker(job, EchoEngine(on_row=on_row))
    for shard in shards_of(job)[:2]:
        with pytest.raises(EngineDead, match="the engine breaks"):
            worker.process(ShardAssignment(shard))
    assert list_parts(Store(job.output)) == {}


def test_an_engine_that_loses_a_row_commits_nothing(job: Job) -> None:
    class Losing(EchoEngine):
        def stream(self, requests):
            for answer in super().stream(requests):
                if answer.request.row != 3:
                    yield answer

    worker = make_worker(job, Losing())
    shards = shards_of(job)
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(worker.process, ShardAssignment(shards[0]))
        with pytest.raises(TimeoutError):
            call.result(timeout=1.0)  # it waits for the row; the driver's stall clock ends it
        assert list_parts(Store(job.output)) == {}
        worker._shards.close(EngineDead("ended by the test"))
        with pytest.raises(EngineDead):
            call.result(timeout=60)


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
    worker = Worker(job, CARRIED)
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


def test_calibration_counts_the_prompts_of_a_row(listed: Job) -> None:
    """Answers as many prompts as there are rows, twice, and multiplies by the prompts per row."""
    worker = make_worker(listed, EchoEngine(seconds=0.05))
    shard = shards_of(listed)[0]
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


def test_a_model_that_gets_on_renews_the_load_clock(
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
    worker = Worker(job, CARRIED)
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


def test_the_record_tells_the_sizes_of_the_model(job: Job) -> None:
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
    worker = Worker(job.model_copy(update={"recipe": parse_recipe(recipe)}), CARRIED)
    path.write_text(SOURCE + "# of another node\n")
    with pytest.raises(ConfigError, match=r"recipe\.compression\.source_sha256: the source of own"):
        worker.load()


def hand(shard: Shard, **known: object) -> ShardAssignment:
    return ShardAssignment(shard, 2, **known)


class Watching(EchoEngine):
    """Notes which rows are in the engine together, and in which order they come."""

    def __init__(self) -> None:
        super().__init__(buffered=100)
        self.order: list[int] = []
        self.together: list[set[int]] = []
        self.inside: set[int] = set()

    def stream(self, requests):
        def watched():
            for request in requests:
                self.order.append(request.row)
                self.inside.add(request.row)
                self.together.append(set(self.inside))
                yield request

        for answer in super().stream(watched()):
            self.inside.discard(answer.request.row)
            yield answer


def test_suspects_go_first_and_alone(job: Job) -> None:
    engine = Watching()
    worker = make_worker(job, engine)
    (shard,) = shards_of(job, rows=12)[:1]
    worker.process(hand(shard, suspects=(3, 4, 9)))
    assert engine.order == [3, 4, 9, *(row for row in range(12) if row not in (3, 4, 9))]
    assert engine.together[:3] == [{3}, {4}, {9}]
    assert max(map(len, engine.together)) > 1, "the others do not wait for each other"
    rows = pq.read_table(Path(job.output) / shard.part_name).to_pylist()
    assert [(row["row"], row["status"], row["attempt"]) for row in rows] == [
        (row, "ok", 2) for row in range(12)
    ]


def test_the_prompts_of_a_suspect_go_together(listed: Job) -> None:
    engine = Watching()
    (shard,) = shards_of(listed, rows=12)[:1]
    make_worker(listed, engine).process(hand(shard, suspects=(2, 4)))
    assert engine.order[:6] == [2, 2, 4, 4, 4, 4]
    assert all({2, 4} - inside for inside in engine.together[:6])


def test_poison_is_written_and_never_tried(job: Job) -> None:
    tried: list[int] = []
    worker = make_worker(job, EchoEngine(on_row=lambda request: tried.append(request.row)))
    shard = shards_of(job, rows=12)[0]
    poison = {5: PoisonRow(Status.KILLED_WORKER, "why"), 6: PoisonRow(Status.TIMEOUT, "why")}
    worker.process(hand(shard, suspects=(5, 7), poison=poison))
    assert sorted(tried) == [row for row in range(12) if row not in poison]
    rows = pq.read_table(Path(job.output) / shard.part_name).to_pylist()
    assert [row["status"] for row in rows if row["row"] in poison] == ["killed_worker", "timeout"]
    message = "two worker processes died while they answered this row alone: why"
    assert rows[5]["error"] == message
    assert rows[5]["answer"] is None
    assert [row["id"] for row in rows] == list(range(12)), "kept columns are still written"


def test_the_journal_names_what_is_in_hand(job: Job, tmp_path: Path) -> None:
    """While the engine is stuck with row 4; rows that are answered are out of hand."""
    stuck, go_on = threading.Event(), threading.Event()

    def on_row(request):
        if request.row == 4:
            stuck.set()
            go_on.wait(60)

    worker = make_worker(job, EchoEngine(on_row=on_row))
    shard = shards_of(job, rows=12)[0]
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(worker.process, ShardAssignment(shard))
        assert stuck.wait(60)
        (page,) = worker.journal.parent.glob(f"{worker.journal.name}.*")
        counters = np.fromfile(page, np.uint32)
        go_on.set()
        call.result(timeout=60)
    assert page.suffix == f".{shard.sid}"
    assert counters[4] == 1
    assert not counters[:4].any()
    assert not page.exists()


def test_rows_with_a_fault_are_not_in_hand(listed: Job) -> None:
    """Nothing is tried with them, so they are not suspected."""
    seen: list[int] = []

    class Looking(EchoEngine):
        def stream(self, requests):
            for answer in super().stream(requests):
                page = next(worker.journal.parent.glob(f"{worker.journal.name}.*"))
                seen.extend(np.flatnonzero(np.fromfile(page, np.uint32)).tolist())
                yield answer

    worker = make_worker(listed, Looking(buffered=100))
    worker.process(ShardAssignment(shards_of(listed, rows=12)[0]))
    assert 4 in seen
    assert not {3, 10} & {*seen}, "their lists are null"


def test_an_engine_that_dies_with_suspects_tells_every_caller(job: Job) -> None:
    def on_row(request):
        if request.row == 4:
            raise RuntimeError("the engine breaks")

    worker = make_worker(job, EchoEngine(on_row=on_row))
    shard = shards_of(job, rows=12)[0]
    with pytest.raises(EngineDead):
        worker.process(hand(shard, suspects=(2, 4, 6)))
    assert read_and_remove(worker.journal) == {shard.sid: (4,)}


# --- parts that cannot be written --------------------------------------------------------------


def refusing(worker: Worker, error: Exception) -> None:
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
def test_a_storage_that_refuses_would_refuse_any_shard(job: Job, error: Exception) -> None:
    worker, (shard, *_) = make_worker(job), shards_of(job)
    refusing(worker, error)
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
def test_what_may_fare_better_is_the_shards_own_trouble(
    job: Job, error: Exception, kind: type[Exception]
) -> None:
    worker = make_worker(job)
    refusing(worker, error)
    with pytest.raises(ShardError) as failed:
        worker.process(ShardAssignment(shards_of(job)[0]))
    assert type(failed.value) is kind


def test_something_else_under_a_parts_name_is_not_answered_again(job: Job) -> None:
    shard = shards_of(job)[0]
    Store(job.output).create(shard.part_name, b"not a part")
    with pytest.raises(UnwritableShard, match="is not a part that gc2ray wrote; move it away"):
        make_worker(job).process(ShardAssignment(shard))


def test_answers_that_do_not_fit_into_parquet_are_not_asked_for_again(job: Job) -> None:
    worker = make_worker(job)
    worker._carried = pa.schema([pa.field("id", pa.binary())])
    with pytest.raises(UnwritableShard, match="its answers do not fit into Parquet: Arrow"):
        worker.process(ShardAssignment(shards_of(job)[0]))


def test_rows_that_cannot_be_noted_are_reported_with_the_folder(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk for temporary files: the next shard would not fare better."""
    worker = make_worker(job)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(worker._journal, "page", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(StorageRefused, match=r"its journal in /\S+: OSError: .*No space left"):
        worker.process(ShardAssignment(shards_of(job)[0]))


def test_a_shard_that_waits_is_not_begun(job: Job) -> None:
    """Behind one whose last row is not read yet."""
    reading, go_on = threading.Event(), threading.Event()

    class Slow(EchoEngine):
        def stream(self, requests):
            def held():
                for number, request in enumerate(requests):
                    if number == 3:
                        reading.set()
                        go_on.wait(60)
                    yield request

            yield from super().stream(held())

    worker, (first, second, *_) = make_worker(job, Slow(buffered=100)), shards_of(job)
    with ThreadPoolExecutor(2) as callers:
        calls = [callers.submit(worker.process, ShardAssignment(first))]
        assert reading.wait(60)
        calls.append(callers.submit(worker.process, ShardAssignment(second)))
        while worker._shards._queue.qsize() < 1:
            time.sleep(0.01)
        pages = worker.journal.parent.glob(f"{worker.journal.name}.*")
        counters = {page.suffix[1:]: np.fromfile(page, np.uint32) for page in pages}
        go_on.set()
        for call in calls:
            call.result(timeout=60)
    assert counters[first.sid][-1] == 1
    assert counters[first.sid].sum() > 1
    assert not counters[second.sid].any()


def test_a_model_that_cannot_be_noted_is_the_storages_refusal(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Store, name: str, data: bytes) -> bool:
        raise PermissionError(errno.EACCES, "ExpiredToken")

    monkeypatch.setattr(Store, "create", refuse)
    with pytest.raises(StorageRefused, match=r"refused model\.json .*ExpiredToken"):
        make_worker(job)
