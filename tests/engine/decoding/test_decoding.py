"""Decoding: batches change nothing, rows end on their own, memory trouble stays with its row."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.decoder import Completion, end_reason, end_tokens, loops
from gc2ray.engine.decoding.hf_generate import GenerateDecoder
from gc2ray.engine.decoding.sampler import NOT_FINITE, Sampler, most_likely, row_numbers, sample
from gc2ray.models.base import LoadedModel, Prompt

NEW = 12
LENGTHS = (5, 17, 9, 30, 9)
ROOM = 10_000


@pytest.fixture
def model(loaded_models: dict[str, LoadedModel]) -> Any:
    return loaded_models["mistral"].model


def by_generate(model: Any, *, max_tokens: int) -> GenerateDecoder:
    """A decoder that ends where its model does."""
    return GenerateDecoder(model, max_tokens=max_tokens, eos=end_tokens(model))


def prompts_for(model: Any, lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(3)
    table = model.get_input_embeddings()
    with torch.no_grad():
        return [
            Prompt(table(torch.randint(10, table.num_embeddings, (length,), generator=generator)))
            for length in lengths
        ]


def decode(
    decoder: GenerateDecoder, prompts: Sequence[Prompt], samplings: Sequence[GenerationConfig]
) -> list[Completion]:
    """Run everything; completions in order of the prompts."""
    done: list[Completion] = []
    for tag, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        while not decoder.submit(tag, prompt, sampling):
            done += decoder.step()
    while len(decoder):
        done += decoder.step()
    assert sorted(item.tag for item in done) == list(range(len(prompts)))
    return sorted(done, key=lambda item: item.tag)


def tokens_alone(model: Any, prompts: Sequence[Prompt], sampling: GenerationConfig) -> list[tuple]:
    return [
        decode(by_generate(model, max_tokens=1), [prompt], [sampling])[0].token_ids
        for prompt in prompts
    ]


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


class Watched:
    """A model whose `generate` is watched, or fails."""

    def __init__(self, model: Any, before: Callable[[int], None] = lambda _: None) -> None:
        self._model = model
        self.before = before
        self.generation_config = model.generation_config
        self.shapes: list[tuple[int, int]] = []
        self.widths: list[int] = []
        self.ns = 0

    def generate(self, **inputs: Any) -> torch.Tensor:
        rows, length = inputs["inputs_embeds"].shape[:2]
        self.shapes.append((rows, length + inputs["generation_config"].max_new_tokens))
        self.before(rows)
        started = time.perf_counter_ns()
        output = self._model.generate(**inputs)
        self.widths.append(output.shape[1])
        self.ns += time.perf_counter_ns() - started
        return output


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


def out_of_memory_above(rows: int) -> Callable[[int], None]:
    def check(asked: int) -> None:
        if asked > rows:
            raise torch.OutOfMemoryError("no room")

    return check


@pytest.mark.parametrize("fits", [1, 2])
def test_a_batch_that_does_not_fit_is_halved(model: Any, fits: int) -> None:
    prompts = prompts_for(model)
    watched = Watched(model, out_of_memory_above(fits))
    done = decode(
        by_generate(watched, max_tokens=ROOM), prompts, [GenerationConfig(max_new_tokens=NEW)] * 5
    )
    assert [item.token_ids for item in done] == tokens_alone(
        model, prompts, GenerationConfig(max_new_tokens=NEW)
    )
    assert watched.shapes[0][0] == 5
    assert {rows for rows, _ in watched.shapes} > {1, 5}


def test_only_what_does_not_fit_alone_is_out_of_memory(model: Any) -> None:
    watched = Watched(model)

    def check(_rows: int) -> None:
        if watched.shapes[-1][1] == 30 + NEW:  # the longest prompt is in the batch
            raise torch.OutOfMemoryError("no room")

    watched.before = check
    prompts = prompts_for(model)
    done = decode(
        by_generate(watched, max_tokens=ROOM), prompts, [GenerationConfig(max_new_tokens=NEW)] * 5
    )
    assert [item.finish_reason for item in done] == [
        "error" if length == 30 else "length" for length in LENGTHS
    ]
    assert replace(done[3], error=None) == Completion(3, (), "error", 0, 0, oom_splits=3)
    assert [item.oom_splits for item in done] == [1, 3, 1, 3, 2]
    assert isinstance(done[3].error, torch.OutOfMemoryError)
    expected = tokens_alone(model, prompts, GenerationConfig(max_new_tokens=NEW))
    assert [item.token_ids for item in done[:3]] == expected[:3]


def test_an_error_in_a_batch_fails_one_prompt_only(model: Any) -> None:
    watched = Watched(model)

    def check(_rows: int) -> None:
        if watched.shapes[-1][1] == 30 + NEW:
            raise RuntimeError("this prompt breaks the model")

    watched.before = check
    done = decode(
        by_generate(watched, max_tokens=ROOM),
        prompts_for(model),
        [GenerationConfig(max_new_tokens=NEW)] * 5,
    )
    assert [str(item.error) for item in done if item.error] == ["this prompt breaks the model"]
    assert done[3].finish_reason == "error"


def test_a_lost_device_is_not_an_error_of_a_prompt(model: Any) -> None:
    def lost(_rows: int) -> None:
        raise torch.AcceleratorError("CUDA error")

    decoder = by_generate(Watched(model, lost), max_tokens=ROOM)
    with pytest.raises(torch.AcceleratorError):
        decode(decoder, prompts_for(model), [GenerationConfig(max_new_tokens=NEW)] * 5)


def test_mixed_limits_keep_to_the_budget(model: Any) -> None:
    """A long prompt with a small limit and a short one with a large limit: 2 x 200 is too much."""
    watched = Watched(model)
    prompts = prompts_for(model, [30, 3])
    samplings = [GenerationConfig(max_new_tokens=1), GenerationConfig(max_new_tokens=20)]
    done = decode(by_generate(watched, max_tokens=60), prompts, samplings)
    assert [rows for rows, _ in watched.shapes] == [1, 1]
    assert [len(item.token_ids) for item in done] == [1, 20]


def test_a_decoder_continues_after_out_of_memory(model: Any) -> None:
    prompts = prompts_for(model, [9, 9])
    watched = Watched(model, out_of_memory_above(0))
    decoder = by_generate(watched, max_tokens=ROOM)
    done = decode(decoder, prompts, [GenerationConfig(max_new_tokens=NEW)] * 2)
    assert {type(item.error) for item in done} == {torch.OutOfMemoryError}
    watched.before = out_of_memory_above(9)
    done = decode(decoder, prompts, [GenerationConfig(max_new_tokens=NEW)] * 2)
    assert [item.token_ids for item in done] == tokens_alone(
        model, prompts, GenerationConfig(max_new_tokens=NEW)
    )


LOGITS = torch.tensor([1.0, 0.0, 3.0, 2.0, -1.0])


def draws(logits: torch.Tensor, sampling: GenerationConfig) -> torch.Tensor:
    """One token for each number of a row."""
    numbers = row_numbers(sampling)[:, None]
    many = logits.expand(len(numbers), -1)
    temperature, top_p = sampling.temperature, sampling.top_p
    return sample(
        many, torch.full_like(numbers, temperature), torch.full_like(numbers, top_p), numbers
    )


def frequencies(sampling: GenerationConfig) -> torch.Tensor:
    return torch.bincount(draws(LOGITS, sampling), minlength=5) / sampling.max_new_tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    seen = frequencies(GenerationConfig(max_new_tokens=4000, temperature=temperature, seed=5))
    expected = (LOGITS / temperature).softmax(0)
    assert (seen - expected).abs().max() < 0.03
    others = (LOGITS / (2 * temperature)).softmax(0)
    assert (seen - others).abs().max() > 0.05, "the tolerance would let anything through"


@pytest.mark.parametrize(("top_p", "nucleus"), [(0.6, {2}), (0.65, {2, 3}), (0.9, {0, 2, 3})])
def test_draws_stay_in_the_nucleus(top_p: float, nucleus: set[int]) -> None:
    """Softmax of the logits is about .09, .03, .64, .23, .01."""
    seen = frequencies(GenerationConfig(max_new_tokens=2000, temperature=1.0, top_p=top_p, seed=6))
    assert set(seen.nonzero().flatten().tolist()) == nucleus
    kept = sorted(nucleus)
    inside = LOGITS.softmax(0)[kept] / LOGITS.softmax(0)[kept].sum()
    assert (seen[kept] - inside).abs().max() < 0.04


@given(st.integers(0, 2**63 - 1), st.integers(1, 9), st.integers(1, 9))
def test_numbers_depend_on_the_seed_and_not_on_the_limit(seed: int, short: int, more: int) -> None:
    """So that a longer limit, or the nucleus before, changes no token that was drawn."""
    numbers = row_numbers(GenerationConfig(max_new_tokens=short, seed=seed))
    longer = row_numbers(GenerationConfig(max_new_tokens=short + more, seed=seed))
    assert numbers.equal(longer[:short])
    assert ((longer >= 0) & (longer < 1)).all()
    assert len(set(longer.tolist())) == short + more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_masked_logits_are_sampled(dtype: torch.dtype) -> None:
    logits = torch.tensor([-torch.inf, 2.0, -torch.inf, 1.0], dtype=dtype)
    assert set(draws(logits, GenerationConfig(max_new_tokens=100, temperature=2.0)).tolist()) == {
        1,
        3,
    }


def test_greedy_rows_are_not_sampled() -> None:
    greedy, hot = (
        GenerationConfig(max_new_tokens=1),
        GenerationConfig(max_new_tokens=1, temperature=9.0),
    )
    drawing = Sampler.from_samplings([greedy, hot, greedy], [0.99, 0.99, 0.99], torch.device("cpu"))
    tokens = drawing.tokens(LOGITS.expand(3, -1))
    assert (tokens[0], tokens[2]) == (2, 2)
    assert tokens[1] == 4


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


# Numbers that are no numbers, and repetitions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_most_likely_token_is_that_of_argmax(dtype: torch.dtype) -> None:
    """Of equal ones the first, also where half of the logits are the best ones."""
    for levels in (2, 5, 1000):
        logits = torch.randint(-levels, levels, (40, 5000)).to(dtype)
        tokens, finite = most_likely(logits)
        assert tokens.equal(logits.argmax(dim=-1))
        assert finite.all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_row_is_finite_or_draws_nothing(value: float, place: int) -> None:
    logits = torch.randn(3, 7)
    logits[1, place] = value
    samplings = [
        GenerationConfig(max_new_tokens=4),
        GenerationConfig(max_new_tokens=4, temperature=1.2, top_p=0.7),
        GenerationConfig(max_new_tokens=4, temperature=1.2, top_p=0.7),
    ]
    drawing = Sampler.from_samplings(samplings, [0.1, 0.9999, 0.5], logits.device)
    found = drawing.tokens(logits).tolist()
    assert [token == NOT_FINITE for token in found] == [False, True, False]
    whole = torch.full((1, 7), value)
    heat = torch.ones(1, 1, dtype=torch.float64)
    assert 0 <= int(sample(whole, heat, heat, 0.99 * heat)) < 7


def test_the_largest_numbers_are_finite() -> None:
    """The sum of the largest and the least logit would not be."""
    most = torch.finfo(torch.float16).max
    assert most_likely(torch.full((1, 4), most, dtype=torch.float16))[1].all()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_generate_fails_the_row_whose_logits_are_not_finite(model: Any, temperature: float) -> None:
    prompts = prompts_for(model)
    prompts[1].embeds[-1, 0] = torch.nan
    samplings = [
        GenerationConfig(max_new_tokens=NEW, temperature=temperature, seed=seed)
        for seed in range(5)
    ]
    watched = Watched(model)
    done = decode(by_generate(watched, max_tokens=ROOM), prompts, samplings)
    assert len(watched.shapes) == 1, "one batch has to do"
    assert "not finite (NaN or infinite) after 0 tokens" in str(done[1].error)
    assert (done[1].token_ids, done[1].finish_reason) == ((), "error")
    for at in (0, 2, 3, 4):
        assert done[at].token_ids == tokens_alone(model, [prompts[at]], samplings[at])[0]


def test_generate_fails_a_row_once_its_logits_are_not_finite(model: Any) -> None:
    """After two tokens: the third is drawn from the second, whose embedding is no number."""
    prompt = prompts_for(model, [9])[0]
    written = tokens_alone(model, [prompt], GenerationConfig(max_new_tokens=NEW))[0]
    broken = copy.deepcopy(model)
    broken.get_input_embeddings().weight.data[written[1]] = torch.inf
    done = decode(
        by_generate(broken, max_tokens=ROOM), [prompt], [GenerationConfig(max_new_tokens=NEW)]
    )
    assert written[0] != written[1]
    assert "not finite (NaN or infinite) after 2 tokens" in str(done[0].error)


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
