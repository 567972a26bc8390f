"""The stream of shards without an engine; with one it is met in `test_worker`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gc2ray.core.errors import EngineDead
from gc2ray.core.records import Request
from gc2ray.core.shards import Shard, Span
from gc2ray.runner.journal import Journal
from gc2ray.runner.messages import ShardAssignment
from gc2ray.runner.shard_work import ShardStream
from tests.support.fakes import echo

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
