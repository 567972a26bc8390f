"""Decoding by `generate`: batches change nothing, and rows end on their own."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.hf_generate import GenerateDecoder
from gc2ray.models.base import Prompt
from tests.support.hf_generate import (
    LENGTHS,
    NEW,
    ROOM,
    Watched,
    by_generate,
    decode,
    prompts_for,
    tokens_alone,
)


@contextmanager
def ending_at(model: Any, *eos: int) -> Iterator[GenerateDecoder]:
    """A decoder whose model ends at other tokens."""
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    model.generation_config.eos_token_id = eos[0] if len(eos) == 1 else list(eos)
    try:
        yield by_generate(model, max_tokens=ROOM)
    finally:
        model.generation_config = before


class Counting:
    """A model that answers 7, 7, … at once."""

    generation_config = SimpleNamespace(eos_token_id=None, pad_token_id=None)

    def generate(self, **inputs: Any) -> torch.Tensor:
        rows = len(inputs["inputs_embeds"])
        inputs["logits_processor"][0](torch.zeros(rows, 0), torch.zeros(rows, 9))
        return torch.full((rows, inputs["generation_config"].max_new_tokens), 7)


def test_a_greedy_batch_equals_one_by_one(model: Any) -> None:
    prompts, sampling = prompts_for(model), GenerationConfig(max_new_tokens=NEW)
    watched = Watched(model)
    done = decode(by_generate(watched, max_tokens=ROOM), prompts, [sampling] * 5)
    assert [rows for rows, _ in watched.shapes] == [5]
    alone = tokens_alone(model, prompts, sampling)
    assert [item.token_ids for item in done] == alone
    assert len(set(alone)) == 5, "all answers alike: this test could not fail"


def test_every_row_has_its_own_limit(model: Any) -> None:
    prompts = prompts_for(model)
    limits = [3, 1, NEW, 7, 12]
    watched = Watched(model)
    decoder = by_generate(watched, max_tokens=ROOM)
    done = decode(decoder, prompts, [GenerationConfig(max_new_tokens=limit) for limit in limits])
    assert len(watched.shapes) == 1
    full = tokens_alone(model, prompts, GenerationConfig(max_new_tokens=NEW))
    assert [item.token_ids for item in done] == [
        tokens[:limit] for tokens, limit in zip(full, limits, strict=True)
    ]
    assert {item.finish_reason for item in done} == {"length"}


@pytest.mark.parametrize("ends", [1, 2])
def test_a_row_stops_after_its_first_end_token(model: Any, ends: int) -> None:
    prompts, sampling = prompts_for(model), GenerationConfig(max_new_tokens=NEW)
    free = tokens_alone(model, prompts, sampling)
    eos = [free[0][4], free[1][2]][:ends]
    with ending_at(model, *eos) as decoder:
        done = decode(decoder, prompts, [sampling] * 5)
    for item, tokens in zip(done, free, strict=True):
        stops = [place for place, token in enumerate(tokens) if token in eos]
        assert item.token_ids == (tokens[: stops[0] + 1] if stops else tokens)
        assert item.finish_reason == ("stop" if stops else "length")
    assert {item.finish_reason for item in done} == {"stop", "length"}


def test_an_end_at_the_limit_is_a_stop(model: Any) -> None:
    prompt = prompts_for(model, [9])[0]
    tokens = tokens_alone(model, [prompt], GenerationConfig(max_new_tokens=NEW))[0]
    first = tokens.index(tokens[-1])
    with ending_at(model, tokens[-1]) as decoder:
        (done,) = decode(decoder, [prompt], [GenerationConfig(max_new_tokens=first + 1)])
    assert (done.token_ids, done.finish_reason) == (tokens[: first + 1], "stop")


def test_an_end_token_after_the_limit_is_not_reached(model: Any) -> None:
    prompts = prompts_for(model, [9, 9])
    tokens = tokens_alone(model, prompts[:1], GenerationConfig(max_new_tokens=NEW))[0]
    late = next(token for token in tokens if tokens.index(token) > 3)
    with ending_at(model, late) as decoder:
        done = decode(
            decoder,
            prompts,
            [GenerationConfig(max_new_tokens=2), GenerationConfig(max_new_tokens=NEW)],
        )
    assert (done[0].token_ids, done[0].finish_reason) == (tokens[:2], "length")


def test_a_batch_ends_with_its_last_row(model: Any) -> None:
    prompt = prompts_for(model, [9])[0]
    tokens = tokens_alone(model, [prompt], GenerationConfig(max_new_tokens=NEW))[0]
    with ending_at(model, tokens[2]):
        watched = Watched(model)
        decode(
            by_generate(watched, max_tokens=ROOM), [prompt], [GenerationConfig(max_new_tokens=NEW)]
        )
    assert watched.widths == [tokens.index(tokens[2]) + 1]


def test_sampling_does_not_depend_on_neighbours(model: Any) -> None:
    prompts = prompts_for(model)
    samplings = [
        GenerationConfig(max_new_tokens=NEW, temperature=1.5, seed=seed) for seed in range(5)
    ]
    together = decode(by_generate(model, max_tokens=ROOM), prompts, samplings)
    reversed_ = decode(by_generate(model, max_tokens=60), prompts[::-1], samplings[::-1])
    assert [item.token_ids for item in together] == [item.token_ids for item in reversed_[::-1]]


def test_seeds_change_samples(model: Any) -> None:
    prompt = prompts_for(model, [9])[0]
    samplings = [
        GenerationConfig(max_new_tokens=NEW, temperature=1.5, seed=seed) for seed in (1, 2, 1)
    ]
    done = decode(by_generate(model, max_tokens=ROOM), [prompt] * 3, samplings)
    assert done[0].token_ids == done[2].token_ids
    assert done[0].token_ids != done[1].token_ids
    assert (
        done[0].token_ids != tokens_alone(model, [prompt], GenerationConfig(max_new_tokens=NEW))[0]
    )


def test_a_tiny_nucleus_is_greedy(model: Any) -> None:
    prompts = prompts_for(model)
    sampling = GenerationConfig(max_new_tokens=NEW, temperature=1.5, top_p=1e-9, seed=4)
    done = decode(by_generate(model, max_tokens=ROOM), prompts, [sampling] * 5)
    assert [item.token_ids for item in done] == tokens_alone(
        model, prompts, GenerationConfig(max_new_tokens=NEW)
    )


def test_greedy_and_sampled_rows_share_a_batch(model: Any) -> None:
    prompts = prompts_for(model, [9, 9])
    sampled = GenerationConfig(max_new_tokens=NEW, temperature=1.5, seed=4)
    done = decode(
        by_generate(model, max_tokens=ROOM),
        prompts,
        [GenerationConfig(max_new_tokens=NEW), sampled],
    )
    assert (
        done[0].token_ids
        == tokens_alone(model, prompts[:1], GenerationConfig(max_new_tokens=NEW))[0]
    )
    assert done[1].token_ids == tokens_alone(model, prompts[1:], sampled)[0]


def test_back_pressure_counts_tokens(model: Any) -> None:
    """Two batches' worth may wait, in whatever number of rows; one prompt always may."""
    decoder = by_generate(model, max_tokens=100)
    long, short = prompts_for(model, [40, 1])
    taken = [decoder.submit(tag, long, GenerationConfig(max_new_tokens=10)) for tag in range(6)]
    assert taken == [True, True, True, True, False, False]
    assert len(decoder) == 4
    decoder = by_generate(model, max_tokens=100)
    taken = [decoder.submit(tag, short, GenerationConfig(max_new_tokens=1)) for tag in range(110)]
    assert taken == [True] * 100 + [False] * 10
    decoder = by_generate(model, max_tokens=10)
    assert decoder.submit(0, long, GenerationConfig(max_new_tokens=10))
    assert not decoder.submit(1, short, GenerationConfig(max_new_tokens=1))
    assert [item.tag for item in decoder.step()] == [0]
    assert decoder.submit(1, short, GenerationConfig(max_new_tokens=1))


def test_an_idle_decoder_has_nothing_to_finish(model: Any) -> None:
    decoder = by_generate(model, max_tokens=100)
    assert (len(decoder), decoder.step()) == (0, [])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 200))
def test_a_batch_holds_at_most_its_tokens(lengths: list[int], room: int) -> None:
    watched = Watched(Counting())
    prompts = [Prompt(torch.zeros(length, 2)) for length in lengths]
    done = decode(
        by_generate(watched, max_tokens=room),
        prompts,
        [GenerationConfig(max_new_tokens=4) for _ in prompts],
    )
    assert all(item.token_ids == (7, 7, 7, 7) for item in done)
    assert sum(rows for rows, _ in watched.shapes) == len(lengths)
    assert all(rows * width <= room for rows, width in watched.shapes if rows > 1)


def test_explicit_positions_are_refused(model: Any) -> None:
    decoder = by_generate(model, max_tokens=100)
    prompt = Prompt(prompts_for(model, [5])[0].embeds, positions=torch.arange(5))
    with pytest.raises(ValueError, match="positions of their own"):
        decoder.submit(0, prompt, GenerationConfig(max_new_tokens=4))
    assert len(decoder) == 0


def test_time_is_divided_among_rows_completely(model: Any) -> None:
    """The shares add up to at least the time in `generate`, and to no more than passed."""
    watched = Watched(model)
    decoder = by_generate(watched, max_tokens=ROOM)
    started = time.perf_counter_ns()
    done = decode(decoder, prompts_for(model), [GenerationConfig(max_new_tokens=NEW)] * 5)
    passed = time.perf_counter_ns() - started
    assert all(item.prefill_ns > 0 and item.generate_ns > 0 for item in done)
    assert watched.ns <= sum(item.prefill_ns + item.generate_ns for item in done) <= passed
    shares = [item.prefill_ns / length for item, length in zip(done, LENGTHS, strict=True)]
    assert shares == pytest.approx([shares[0]] * 5, rel=1e-3)


def test_mixed_limits_keep_to_the_budget(model: Any) -> None:
    """A long prompt with a small limit and a short one with a large limit: 2 x 200 is too much."""
    watched = Watched(model)
    prompts = prompts_for(model, [30, 3])
    samplings = [GenerationConfig(max_new_tokens=1), GenerationConfig(max_new_tokens=20)]
    done = decode(by_generate(watched, max_tokens=60), prompts, samplings)
    assert [rows for rows, _ in watched.shapes] == [1, 1]
    assert [len(item.token_ids) for item in done] == [1, 20]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_generate_penalises_prompt_and_answer(model: Any, temperature: float) -> None:
    prompts = [
        replace(prompt, token_ids=tuple(range(20 * at, 20 * at + 40)))
        for at, prompt in enumerate(prompts_for(model))
    ]
    penalties = [1.3, 1.0, 1.3, 0.8, 1.3]
    samplings = [
        GenerationConfig(
            max_new_tokens=NEW, temperature=temperature, seed=4, repetition_penalty=penalty
        )
        for penalty in penalties
    ]
    together = decode(by_generate(model, max_tokens=ROOM), prompts, samplings)
    plain = samplings[0].model_copy(update={"repetition_penalty": 1.0})
    changed = 0
    for item, prompt, sampling in zip(together, prompts, samplings, strict=True):
        assert (item.token_ids,) == tuple(tokens_alone(model, [prompt], sampling))
        changed += item.token_ids != tokens_alone(model, [prompt], plain)[0]
    assert changed > 1


@pytest.mark.parametrize(
    "rules",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(4, 200))},
        {"sequence_bias": [[[10], 50.0]]},
        {"exponential_decay_length_penalty": [2, 3.0]},
        {"num_beams": 3},
        {"num_return_sequences": 2},
        {"max_time": 1e-9},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_the_models_generation_config_is_ignored(model: Any, rules: dict[str, Any]) -> None:
    """What a recipe has taken over must not come back through `generate`."""
    prompts, sampling = prompts_for(model), GenerationConfig(max_new_tokens=NEW)
    wanted = decode(by_generate(model, max_tokens=ROOM), prompts, [sampling] * 5)
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    for name, value in rules.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    try:
        found = decode(by_generate(model, max_tokens=ROOM), prompts, [sampling] * 5)
        assert model.generation_config is own, "it is put back"
    finally:
        model.generation_config = before
    assert [item.token_ids for item in found] == [item.token_ids for item in wanted]
