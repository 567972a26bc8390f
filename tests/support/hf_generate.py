"""Prompts for a decoder that calls `generate`, and a model that is watched while it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.decoder import Completion, end_tokens
from gc2ray.engine.decoding.hf_generate import GenerateDecoder
from gc2ray.models.base import Prompt

NEW = 12
LENGTHS = (5, 17, 9, 30, 9)
ROOM = 10_000


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
