"""Which rows are admitted, in which order, and which slots they get; no model is needed."""

from __future__ import annotations

import pytest
import torch

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.errors import BadRow, Status
from gc2ray.engine.decoding.kv_cache import KvCache, SlotRange
from gc2ray.engine.decoding.scheduler import DecodeLimits, DecodeRow, Scheduler
from gc2ray.models.base import Prompt
from gc2ray.models.layers.attention import Chunk, KvShape, Step

NEW = 4


def make_scheduler(limits: DecodeLimits) -> Scheduler:
    shape, cpu = KvShape(layers=1, heads=1, head_size=2), torch.device("cpu")
    return Scheduler(KvCache(shape, limits.kv_tokens, dtype=torch.float32, device=cpu), limits)


def make_row(tag: int, length: int, key: str | None = None) -> DecodeRow:
    visual = ((0, length - 1),) if key else ()
    prompt = Prompt(torch.zeros(length, 2), visual, prefix_key=key, prefix_images=len(visual))
    return DecodeRow(tag, prompt, GenerationConfig(max_new_tokens=NEW), [], length)


def admitted(scheduler: Scheduler) -> list[int]:
    rows = scheduler.admit()
    scheduler.live += rows
    return [row.tag for row in rows]


def test_the_oldest_row_comes_first_then_rows_of_its_length() -> None:
    scheduler = make_scheduler(DecodeLimits(100, prefill_tokens=24))
    for tag, length in enumerate((10, 2, 20, 12)):
        scheduler.add(make_row(tag, length))
    assert admitted(scheduler) == [0, 3, 1], "row 2 has too many tokens for this step"
    assert admitted(scheduler) == [2]
    assert not scheduler.is_waiting
    assert len(scheduler) == 4


def test_a_row_waits_for_slots_and_gets_those_of_a_row_that_ended() -> None:
    scheduler = make_scheduler(DecodeLimits(30))
    for tag in range(3):
        scheduler.add(make_row(tag, 10))
    assert admitted(scheduler) == [0, 1]
    assert admitted(scheduler) == []
    ended = scheduler.live.pop(0)
    assert ended.slots == SlotRange(0, 14)
    scheduler.release(ended)
    assert admitted(scheduler) == [2]
    assert scheduler.live[-1].start == 0
    with pytest.raises(ValueError, match="row 0 is not live"):
        _ = ended.start


def test_a_queue_takes_two_steps_of_prompts_and_none_that_can_never_fit() -> None:
    scheduler = make_scheduler(DecodeLimits(30, prefill_tokens=10, graph_steps=3))
    prompt = make_row(0, 12).prompt
    assert scheduler.accepts(prompt, GenerationConfig(max_new_tokens=NEW))
    scheduler.add(make_row(0, 12))
    assert not scheduler.accepts(prompt, GenerationConfig(max_new_tokens=NEW))
    assert scheduler.accepts(make_row(1, 8).prompt, GenerationConfig(max_new_tokens=NEW))
    assert scheduler.accepts(make_row(1, 8).prompt, GenerationConfig(max_new_tokens=20))
    with pytest.raises(BadRow) as caught:  # 29 tokens, and a burst writes 2 more
        scheduler.accepts(make_row(1, 8).prompt, GenerationConfig(max_new_tokens=21))
    assert caught.value.status is Status.TOO_LONG


def test_rows_that_failed_start_over_alone_before_all_others() -> None:
    scheduler = make_scheduler(DecodeLimits(100))
    for tag in range(3):
        scheduler.add(make_row(tag, 10))
    assert admitted(scheduler) == [0, 1, 2]
    scheduler.add(make_row(3, 10))
    first, *others = scheduler.live
    first.tokens, others[0].tokens = [7], [8]
    scheduler.requeue(others, alone=True)
    assert (scheduler.live, others[0].tokens, others[0].slots) == ([first], [], None)
    assert admitted(scheduler) == [], "row 1 runs alone, and row 0 is live"
    scheduler.release(scheduler.live.pop())
    assert admitted(scheduler) == [1]
    assert admitted(scheduler) == []


def test_fewer_rows_are_live_after_memory_ran_out() -> None:
    scheduler = make_scheduler(DecodeLimits(1000))
    for tag in range(6):
        scheduler.add(make_row(tag, 10))
    scheduler.lower_limits(rows=5)
    assert admitted(scheduler) == [0, 1]
    scheduler.reset_limits()
    assert admitted(scheduler) == [2, 3, 4, 5]


def test_a_prefix_is_computed_once_and_outlives_its_row() -> None:
    scheduler = make_scheduler(DecodeLimits(60))
    for tag in range(2):
        scheduler.add(make_row(tag, 10, "image"))
    assert admitted(scheduler) == [0], "row 1 waits for the prefix that row 0 computes"
    owner = scheduler.live[0]
    scheduler.keep_prefix(owner)
    assert admitted(scheduler) == [1]
    assert (scheduler.live[1].shared, scheduler.live[1].cached) == (9, 9)
    for row in scheduler.live:
        scheduler.release(row)
    scheduler.live = []
    scheduler.add(make_row(2, 10, "image"))
    assert admitted(scheduler) == [2]
    assert scheduler.live[0].shared == 9, "the prefix is still there"
    scheduler.add(make_row(3, 40))
    assert admitted(scheduler) == []
    scheduler.release(scheduler.live.pop())
    assert admitted(scheduler) == [3], "a row gets the slots of a prefix that no live row owns"


def test_a_step_on_the_device_hides_its_sequences_from_the_host() -> None:
    kv_states = torch.zeros(1, 2, 1, 20, 2)
    step = Step.from_sizes(3, 8, kv_states)
    assert step.only_last is step
    assert (step.most_new, step.most_used, len(step.starts)) == (1, 8, 4)
    with pytest.raises(TypeError, match="only the device knows"):
        _ = step.host_chunks
    same = Step.from_chunks([Chunk(0, 1, 1)] * 3, kv_states)
    assert same.only_last is same
    assert [t.dtype for t in (step.slots, step.last, step.starts, step.used, step.query_ends)] == [
        t.dtype for t in (same.slots, same.last, same.starts, same.used, same.query_ends)
    ]


def test_cache_space_is_more_than_zero() -> None:
    for settings_ in ({"kv_tokens": 0}, {"kv_tokens": 9, "prefill_tokens": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            DecodeLimits(**settings_)
