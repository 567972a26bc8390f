"""Prompts that begin alike: their beginning is computed once, and answers stay."""

from __future__ import annotations

from typing import Any

import pytest

from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.kv_cache import SlotRange
from gc2ray.engine.decoding.prefix_cache import PrefixCache
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.models.llama import LanguageModel
from tests.support.continuous_batching import (
    PLENTY,
    ROOMS,
    Scarce,
    alone,
    decode,
    families_of,
    free_tokens,
    make_pool,
    run,
    tokens,
)


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen2", "qwen3-window", "granite"])
def test_prompts_that_begin_alike_share_it_and_answer_the_same(
    models: dict[str, Any], kind: str, room: DecodeLimits
) -> None:
    requests = families_of(models[kind], [6, 1, 9, 2])
    done = decode(models[kind], requests, room)
    assert tokens(done) == tokens(decode(models[kind], alone(requests), room))
    shared = [item.shared for item in done.values()]
    assert sum(shared) >= 5 * 20, "nothing was shared"
    assert all(item.shared in (0, requests[tag][1].prefix) for tag, item in done.items())


def test_a_prefix_is_computed_once(models: dict[str, Any]) -> None:
    """Also where its rows come one after the other, with other rows between them."""
    requests = families_of(models["llama"], [5, 5])
    mixed = [request for pair in zip(requests[:5], requests[5:], strict=True) for request in pair]
    for room in (PLENTY, DecodeLimits(20_000, live_rows=1)):
        done = decode(models["llama"], mixed, room)
        assert sorted(item.shared > 0 for item in done.values()) == [False] * 2 + [True] * 8


def test_prefixes_are_dropped_for_rows(models: dict[str, Any]) -> None:
    """Prefixes nobody reads are dropped when their room is wanted; even a row's own."""
    model = models["llama"]
    requests = families_of(model, [2] * 6)
    done = decode(model, requests, DecodeLimits(80))
    assert tokens(done) == tokens(decode(model, alone(requests)))
    two = families_of(model, [2])
    tight = DecodeLimits(max(len(prompt) + sampling.max_new_tokens for _, prompt, sampling in two))
    assert tokens(decode(model, two, tight)) == tokens(decode(model, alone(two)))


def test_sharing_survives_too_little_memory(models: dict[str, Any]) -> None:
    model = models["llama"]
    requests = families_of(model, [6, 6])
    decoder = ContinuousBatchDecoder(LanguageModel(model), PLENTY, eos=(), attend=Scarce(2))
    assert tokens(run(decoder, requests)) == tokens(decode(model, alone(requests)))
    assert decoder.oom_splits > 0


def test_prefixes_stay_until_their_space_is_needed() -> None:
    kv_cache = make_pool(10)
    prefixes = PrefixCache(kv_cache)
    for key in ("a", "b"):
        slots = kv_cache.allocate(4)
        assert slots is not None
        prefixes.add(key, slots)
    with pytest.raises(ValueError, match="in the cache already"):
        prefixes.add("a", SlotRange(0, 1))
    assert not prefixes.drop_oldest(), "their rows are live"
    prefixes.disown("a")
    prefixes.disown("b")
    assert prefixes.find("a") == SlotRange(0, 4)  # and so used after b
    assert prefixes.find(None) is None
    assert prefixes.drop_oldest()
    assert ("a" in prefixes, "b" in prefixes) == (True, False)
    assert not prefixes.drop_oldest(but="a")
    assert prefixes.drop_oldest()
    assert free_tokens(kv_cache) == 10
