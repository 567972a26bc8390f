"""What goes wrong in `generate` costs only the rows that it concerns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.decoder import Completion
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
