"""Shards become one stream of requests, and answers return to the shards they are of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gc2ray.core.config.job import Job
from gc2ray.core.errors import (
    EngineDead,
    ShardError,
    Status,
)
from gc2ray.core.records import Request
from gc2ray.core.shards import Shard, Shards, Span
from gc2ray.data.source import Source
from gc2ray.data.store import Store
from gc2ray.output.parts import Commit, list_parts, read_part_footer
from gc2ray.output.plan import Plan
from gc2ray.output.planner import committed_parts, outcome
from gc2ray.runner.journal import Journal
from gc2ray.runner.messages import PoisonRow, ShardAssignment
from gc2ray.runner.shard_work import ShardStream
from tests.support.fakes import EchoEngine, echo
from tests.support.rows import question_list
from tests.support.workers import KEPT_COLUMNS, make_worker, second_try, shards_of

FIRST, SECOND = (Shard(n, f"{n:016x}", (Span("a", "f", 2 * n, 2 * n + 2),)) for n in range(2))


def read(span: Span) -> Iterator[Request]:
    for row in range(span.first, span.stop):
        yield Request(f"a#{row}#0", "a", row, images=(), prompts=("?",))


def test_answers_return_to_their_shards_in_any_order(tmp_path: Path) -> None:
    steps: list[tuple[str, str]] = []
    stream, journal = ShardStream(read, lambda *step: steps.append(step)), Journal(tmp_path)
    with journal.page(FIRST.sid, 2) as one, journal.page(SECOND.sid, 2) as two:
        works = [stream.submit(ShardAssignment(FIRST), one)]
        works.append(stream.submit(ShardAssignment(SECOND), two))
        requests = stream.requests()
        taken = [next(requests) for _ in range(4)]
        for request in reversed(taken[1:]):
            stream.accept(echo(request))
        assert [work.done.done() for work in works] == [False, False], "the last is not all read"
        stream.accept(echo(taken[0]))
        assert [sorted(work.answers) for work in works] == [["a#0#0", "a#1#0"], ["a#2#0", "a#3#0"]]
        assert [work.done.done() for work in works] == [True, False]
        assert steps == [("read", FIRST.sid), ("answered", FIRST.sid)]


def test_no_shard_waits_for_an_engine_that_is_dead(tmp_path: Path) -> None:
    """Neither one that is begun, nor one that is queued, nor one that comes later."""
    stream, journal = ShardStream(read, lambda *_: None), Journal(tmp_path)
    pages = [journal.page(f"{number:016x}", 2) for number in range(3)]
    with pages[0] as begun, pages[1] as queued, pages[2] as late:
        works = [stream.submit(ShardAssignment(FIRST), begun)]
        requests = stream.requests()
        next(requests)
        works.append(stream.submit(ShardAssignment(SECOND), queued))
        stream.close(EngineDead("the engine breaks"))
        works.append(stream.submit(ShardAssignment(SECOND), late))
        for work in works:
            with pytest.raises(EngineDead, match="the engine breaks"):
                work.done.result(timeout=0)


@pytest.mark.parametrize("buffered", [0, 4, 100])
def test_parts_hold_every_prompt_of_every_row_in_order(
    multi_prompt_job: Job, buffered: int
) -> None:
    """However answers come back: within a row, between rows, and over the border of shards."""
    worker = make_worker(multi_prompt_job, EchoEngine(buffered=buffered))
    shards, started = shards_of(multi_prompt_job), datetime.now(UTC)
    with ThreadPoolExecutor(2) as callers:
        results = list(callers.map(lambda shard: worker.process(ShardAssignment(shard)), shards))
    store = Store(multi_prompt_job.output)
    rows = [
        row
        for name in store.names("data")
        for row in pq.read_table(Path(multi_prompt_job.output) / name).to_pylist()
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
    plan = Plan(multi_prompt_job.recipe.fingerprint(), Shards.from_shards(shards), KEPT_COLUMNS)
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
    multi_prompt_job: Job,
    lost: Callable[[int, int], bool],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = Source.read

    def losing(self, span, memory):
        return (r for r in read(self, span, memory) if not lost(r.row, r.prompt_index))

    shard = shards_of(multi_prompt_job, rows=12)[0]
    monkeypatch.setattr(Source, "read", losing)
    with pytest.raises(ShardError, match=message):
        make_worker(multi_prompt_job).process(ShardAssignment(shard))
    assert list_parts(Store(multi_prompt_job.output)) == {}


def test_a_row_that_is_not_planned_fails_the_shard(
    multi_prompt_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Source.read
    shard = shards_of(multi_prompt_job, rows=12)[0]
    wider = replace(shard.spans[0], stop=12)
    short = replace(shard, spans=(replace(wider, stop=9),))
    monkeypatch.setattr(Source, "read", lambda self, _, memory: read(self, wider, memory))
    with pytest.raises(ShardError, match=r"a\.parquet#9#0 was read, but is not planned"):
        make_worker(multi_prompt_job).process(ShardAssignment(short))


def test_a_prompt_that_is_read_twice_fails_the_shard(
    multi_prompt_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Source.read
    monkeypatch.setattr(
        Source, "read", lambda *a: (r for r in read(*a) for _ in range(1 + (r.row == 4)))
    )
    with pytest.raises(ShardError, match=r"a\.parquet#4#0 was read twice"):
        make_worker(multi_prompt_job).process(
            ShardAssignment(shards_of(multi_prompt_job, rows=12)[0])
        )


def test_an_answer_that_the_engine_loses_commits_nothing(multi_prompt_job: Job) -> None:
    """Of a row whose other prompts are answered: the worker waits, the stall clock ends it."""

    class Losing(EchoEngine):
        def stream(self, requests):
            for answer in super().stream(requests):
                if answer.request.row_key != "a.parquet#4#3":
                    yield answer

    worker = make_worker(multi_prompt_job, Losing())
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(
            worker.process, ShardAssignment(shards_of(multi_prompt_job, rows=12)[0])
        )
        with pytest.raises(TimeoutError):
            call.result(timeout=1.0)
        assert list_parts(Store(multi_prompt_job.output)) == {}
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


class WatchingEngine(EchoEngine):
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
    engine = WatchingEngine()
    worker = make_worker(job, engine)
    (shard,) = shards_of(job, rows=12)[:1]
    worker.process(second_try(shard, suspects=(3, 4, 9)))
    assert engine.order == [3, 4, 9, *(row for row in range(12) if row not in (3, 4, 9))]
    assert engine.together[:3] == [{3}, {4}, {9}]
    assert max(map(len, engine.together)) > 1, "the others do not wait for each other"
    rows = pq.read_table(Path(job.output) / shard.part_name).to_pylist()
    assert [(row["row"], row["status"], row["attempt"]) for row in rows] == [
        (row, "ok", 2) for row in range(12)
    ]


def test_the_prompts_of_a_suspect_go_together(multi_prompt_job: Job) -> None:
    engine = WatchingEngine()
    (shard,) = shards_of(multi_prompt_job, rows=12)[:1]
    make_worker(multi_prompt_job, engine).process(second_try(shard, suspects=(2, 4)))
    assert engine.order[:6] == [2, 2, 4, 4, 4, 4]
    assert all({2, 4} - inside for inside in engine.together[:6])


def test_poison_is_written_and_never_tried(job: Job) -> None:
    tried: list[int] = []
    worker = make_worker(job, EchoEngine(on_row=lambda request: tried.append(request.row)))
    shard = shards_of(job, rows=12)[0]
    poison = {5: PoisonRow(Status.KILLED_WORKER, "why"), 6: PoisonRow(Status.TIMEOUT, "why")}
    worker.process(second_try(shard, suspects=(5, 7), poison=poison))
    assert sorted(tried) == [row for row in range(12) if row not in poison]
    rows = pq.read_table(Path(job.output) / shard.part_name).to_pylist()
    assert [row["status"] for row in rows if row["row"] in poison] == ["killed_worker", "timeout"]
    message = "two worker processes died while they answered this row alone: why"
    assert rows[5]["error"] == message
    assert rows[5]["answer"] is None
    assert [row["id"] for row in rows] == list(range(12)), "kept columns are still written"
