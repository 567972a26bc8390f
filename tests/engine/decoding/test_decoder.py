"""Where an answer ends, and why."""

from __future__ import annotations

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.decoder import end_reason, loops

LOOPS = [
    ([7] * 16, 3, True),
    ([7] * 15, 3, False),
    ([1, 2] * 8, 3, True),
    ([9, *[1, 2] * 8], 3, True),
    ([1, 2] * 8, 8, False),
    (list(range(64)) * 2, 1, True),
    (list(range(65)) * 2, 1, False),
    ([*[7] * 16, 8], 3, False),
    (list(range(40)), 1, False),
]


def test_a_loop_is_a_repeated_run_of_tokens() -> None:
    for tokens, max_repeats, loop in LOOPS:
        assert loops(tokens, max_repeats) is loop, (tokens, max_repeats)


def test_every_end_has_a_reason() -> None:
    sampling = GenerationConfig(max_new_tokens=20, stop_token_ids=(5,), max_repeats=3)
    assert end_reason([1, 2], sampling, {2}) == "stop"
    assert end_reason([1, 5], sampling, {2}) == "stop"
    assert end_reason([1, 3], sampling, {2}) is None
    assert end_reason([7] * 16, sampling, {2}) == "repetition"
    assert end_reason([7] * 16, sampling.model_copy(update={"max_repeats": None}), {2}) is None
    assert end_reason(list(range(20)), sampling, {99}) == "length"
