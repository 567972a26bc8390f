"""Regions of the cache: handed out, given back, never to two rows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.engine.decoding.kv_cache import SlotRange
from tests.support.continuous_batching import free_tokens, make_pool


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), max_size=60))
def test_cache_regions_never_overlap_and_are_all_freed(asked: list[tuple[int, int]]) -> None:
    kv_cache = make_pool(100)
    held: list[SlotRange] = []
    for size, which in asked:
        slots = kv_cache.allocate(size)
        if slots is None:
            largest = max((len(free) for free in kv_cache._free), default=0)
            assert largest < size
            if held:
                kv_cache.release(held.pop(which % len(held)))
        else:
            assert len(slots) == size
            held.append(slots)
        taken = sorted(held)
        assert all(a.stop <= b.start for a, b in pairwise(taken))
        assert free_tokens(kv_cache) == 100 - sum(len(slots) for slots in held)
    for slots in held:
        kv_cache.release(slots)
    assert kv_cache.allocate(100) == SlotRange(0, 100)


def test_cache_space_is_not_freed_twice() -> None:
    kv_cache = make_pool(10)
    a, b = kv_cache.allocate(4), kv_cache.allocate(4)
    assert a is not None
    assert b is not None
    kv_cache.release(a)
    with pytest.raises(ValueError, match="free already"):
        kv_cache.release(a)
    with pytest.raises(ValueError, match="free already"):
        kv_cache.release(SlotRange(3, 6))
    kv_cache.release(b)
    assert free_tokens(kv_cache) == 10
    with pytest.raises(ValueError, match="at least one"):
        kv_cache.allocate(0)


def test_a_kv_cache_has_the_stated_size() -> None:
    kv_cache = make_pool(10)
    assert kv_cache.states.nbytes == 10 * 2 * 2 * 3 * 4 * 4
    assert kv_cache.view(SlotRange(2, 5)).shape == (2, 2, 3, 3, 4)
