"""A feed runs ahead, in order, bounded; and says how long its owner starved."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.engine.prefetch import Prefetcher


def drained(feed: Prefetcher[int, int]) -> list[int]:
    found: list[int] = []
    while not feed.ended:
        result = feed.take()
        if result is None:
            feed.wait()
        else:
            found.append(result)
    return found


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), max_size=20), st.integers(1, 3), st.integers(1, 5))
def test_results_come_in_the_order_of_the_items(naps: list[int], threads: int, ahead: int) -> None:
    def work(item: tuple[int, int]) -> int:
        time.sleep(item[1] / 2000)
        return item[0] + 1

    with Prefetcher(enumerate(naps), work, threads=threads, ahead=ahead) as feed:
        assert drained(feed) == list(range(1, len(naps) + 1))


def test_it_runs_ahead_up_to_the_limit() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    with Prefetcher(items(), lambda item: item, threads=2, ahead=5) as feed:
        while len(read) < 6:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 6, "five with room, and one in the reader's hand"
        assert [feed.take(), feed.take()] == [0, 1]
        while len(read) < 8:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == 8


def test_take_returns_none_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        go.wait(60)
        yield 2

    with Prefetcher(items(), lambda item: item, threads=1, ahead=9) as feed:
        feed.wait()
        assert feed.take() == 1
        before = feed.waited_ns
        assert [feed.take(), feed.take(), feed.ended] == [None, None, False]
        assert feed.waited_ns == before, "taking does not wait"
        threading.Timer(0.1, go.set).start()
        readings = iter([1_000, 251_000])
        clock = SimpleNamespace(perf_counter_ns=lambda: next(readings))
        with monkeypatch.context() as patched:
            patched.setattr("gc2ray.engine.prefetch.time", clock)
            feed.wait()
        assert feed.waited_ns - before == 250_000, "waiting does"
        assert feed.take() == 2
        feed.wait()
        assert (feed.take(), feed.ended) == (None, True)


def test_errors_are_raised_where_their_result_is_taken() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with Prefetcher(items(), lambda item: item, threads=1, ahead=9) as feed:
        feed.wait()
        assert feed.take() == 1
        feed.wait()
        with pytest.raises(OSError, match="the disk is gone"):
            feed.take()

    def work(item: int) -> int:
        raise ValueError(f"item {item}")

    with Prefetcher([1, 2], work, threads=1, ahead=9) as feed:
        feed.wait()
        with pytest.raises(ValueError, match="item 1"):
            feed.take()


def test_leaving_early_stops_the_reader() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            read.append(item)
            yield item

    others = set(threading.enumerate())
    with Prefetcher(items(), lambda item: item, threads=1, ahead=2) as feed:
        (reader,) = [t for t in {*threading.enumerate()} - others if t.name == "gc2ray-read"]
        feed.wait()
    reader.join(60)
    assert not reader.is_alive()
    assert len(read) <= 5


def test_added_items_come_before_unread_ones() -> None:
    go = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        go.wait(60)
        yield 2

    with Prefetcher(items(), lambda item: item * 10, threads=1, ahead=5) as feed:
        feed.wait()
        assert feed.take() == 10
        feed.add(7)  # while the reader blocks
        feed.wait()
        assert (feed.take(), feed.take()) == (70, None)
        go.set()
        assert drained(feed) == [20]


def test_an_item_added_after_the_last_one_is_not_lost() -> None:
    with Prefetcher(range(2), lambda item: item * 10, threads=2, ahead=5) as feed:
        assert drained(feed) == [0, 10]
        assert feed.ended
        for item in (3, 4):
            feed.add(item)
        assert not feed.ended
        assert drained(feed) == [30, 40]


def test_an_error_of_an_added_item_is_raised_by_take() -> None:
    with Prefetcher(range(1, 2), lambda item: 1 // item, threads=1, ahead=5) as feed:
        feed.add(0)
        feed.wait()
        with pytest.raises(ZeroDivisionError):
            feed.take()
        assert drained(feed) == [1]
