"""Which token is drawn from which logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.sampler import (
    NOT_FINITE,
    Repetition,
    Sampler,
    most_likely,
    row_numbers,
    sample,
)
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.models.layers.attention_backends import attend_by_row, attend_padded
from gc2ray.models.llama import LanguageModel
from tests.support.continuous_batching import (
    BURSTS,
    PLENTY,
    ROOMS,
    Expected,
    decode,
    ragged,
    run,
    tokens,
    worded,
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


MODES: dict[str, tuple[DecodeLimits, Any]] = {
    "steps": (PLENTY, None),
    "few slots": (DecodeLimits(20_000, live_rows=5), None),
    "attention of torch": (PLENTY, attend_by_row),
    "bursts": (BURSTS, attend_padded),
    "long bursts": (DecodeLimits(20_000, graph_steps=16), attend_padded),
}


@pytest.mark.parametrize(
    ("mode", "value"),
    [*((mode, torch.nan) for mode in MODES), ("steps", torch.inf), ("bursts", -torch.inf)],
)
def test_a_row_whose_logits_are_not_finite_fails_alone(
    models: dict[str, Any], expected: Expected, mode: str, value: float
) -> None:
    """One from its prompt on, others from a token on that they wrote; nobody else notices."""
    model, full = models["llama"], expected["llama"]
    room, attend = MODES[mode]
    requests = ragged(model)
    requests[5][1].embeds[-1, 7] = value
    often = Counter(token for row in full.values() for token in {*row[:-1]})
    fatal = next(token for token, rows in often.items() if rows == 2)
    language = LanguageModel(model)
    language.embed = poisoned(language.embed, fatal, value)  # type: ignore[method-assign]
    done = run(ContinuousBatchDecoder(language, room, eos=(), attend=attend), requests)
    lost = {tag: row.index(fatal) + 1 for tag, row in full.items() if fatal in row[:-1]} | {5: 0}
    assert len(lost) == 3
    for tag, item in done.items():
        if tag in lost:
            assert (item.finish_reason, item.token_ids) == ("error", ())
            assert f"not finite (NaN or infinite) after {lost[tag]} tokens" in str(item.error)
        else:
            assert (item.error, item.token_ids) == (None, full[tag])


def poisoned(embed: Callable[[Tensor], Tensor], fatal: int, value: float) -> Any:
    """An embedding table with one row that is no vector of numbers."""
    return lambda ids: embed(ids).masked_fill((ids == fatal)[:, None], value)


REPEATED = GenerationConfig(max_new_tokens=16, temperature=1.3, repetition_penalty=1.4)


@pytest.mark.parametrize("mode", MODES)
def test_a_sampled_row_whose_logits_are_not_finite_fails_alone(
    models: dict[str, Any], mode: str
) -> None:
    """A sampled row whose logits are not finite draws nothing, within bounds."""
    model = models["llama"]
    room, attend = MODES[mode]
    requests = ragged(model, 6, temperature=1.3, top_p=0.9)
    wanted = tokens(decode(model, requests))
    requests[2] = (2, replace(requests[2][1], embeds=requests[2][1].embeds * torch.nan), REPEATED)
    done = run(ContinuousBatchDecoder(LanguageModel(model), room, eos=(), attend=attend), requests)
    assert [tag for tag, item in done.items() if item.error] == [2]
    assert {tag: done[tag].token_ids for tag in wanted if tag != 2} == {
        tag: row for tag, row in wanted.items() if tag != 2
    }


@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.parametrize("mode", MODES)
def test_penalised_tokens_are_those_of_generate(
    models: dict[str, Any], expected: Expected, mode: str, penalty: float
) -> None:
    """The prompt's tokens and the answer's; rows without a penalty share steps with the others."""
    model = models["llama"]
    room, attend = MODES[mode]
    requests = [
        (
            tag,
            prompt,
            sampling.model_copy(update={"repetition_penalty": penalty if tag % 4 else 1.0}),
        )
        for tag, prompt, sampling in worded(model, 20)
    ]
    found = tokens(
        run(ContinuousBatchDecoder(LanguageModel(model), room, eos=(), attend=attend), requests)
    )
    changed = 0
    for tag, prompt, sampling in requests:
        ids = torch.tensor([prompt.token_ids])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            repetition_penalty=sampling.repetition_penalty,
        )
        assert found[tag] == tuple(output[0, len(prompt) :].tolist())
        changed += found[tag] != expected["llama"][tag]
    assert changed > 5, "the penalty changes nothing: this test could not fail"


@pytest.mark.parametrize("mode", ["few slots", "bursts"])
def test_penalised_rows_sample_what_they_sample_alone(models: dict[str, Any], mode: str) -> None:
    model = models["llama"]
    room, attend = MODES[mode]
    requests = worded(model, 24, temperature=1.3, top_p=0.9, repetition_penalty=1.3)
    alone = tokens(decode(model, requests, ROOMS["one slot"]))
    assert alone != tokens(decode(model, worded(model, 24, temperature=1.3, top_p=0.9)))
    decoder = ContinuousBatchDecoder(LanguageModel(model), room, eos=(), attend=attend)
    assert tokens(run(decoder, requests)) == alone


def test_without_a_penalty_no_tokens_are_counted(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Repetition, "load", None)
    monkeypatch.setattr(Repetition, "applied", None)
    requests = worded(models["llama"], 5)
    assert len(tokens(decode(models["llama"], requests))) == 5
    decoder = ContinuousBatchDecoder(
        LanguageModel(models["llama"]), BURSTS, eos=(), attend=attend_padded
    )
    assert len(tokens(run(decoder, requests))) == 5
