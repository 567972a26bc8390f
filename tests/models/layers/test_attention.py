"""A step of several sequences: where its tokens lie in the cache."""

from __future__ import annotations

import torch

from gc2ray.models.layers.attention import Chunk, Step, write


def test_a_step_knows_its_cache_positions() -> None:
    kv_states = torch.zeros(1, 2, 1, 40, 2)
    step = Step.from_chunks((Chunk(3, 5, 5), Chunk(20, 7, 1)), kv_states)
    assert step.slots.tolist() == [3, 4, 5, 6, 7, 26]
    assert step.last.tolist() == [4, 5]
    assert step.only_last.chunks == (Chunk(3, 5, 1), Chunk(20, 7, 1))
    states = torch.arange(24.0).view(6, 2, 1, 2)
    write(step, 0, *states.unbind(1))
    assert kv_states[0, 1, 0, 26].tolist() == states[5, 1, 0].tolist()
    assert kv_states[0, 0, 0, 3:8].equal(states[:5, 0, 0])
    assert kv_states.count_nonzero() == 23
