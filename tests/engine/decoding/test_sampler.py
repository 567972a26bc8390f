"""Which token is drawn from which logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.sampler import NOT_FINITE, Sampler, most_likely, row_numbers, sample

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
