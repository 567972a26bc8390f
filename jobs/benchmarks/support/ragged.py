"""The ragged workload: prompts and answers of very different lengths, the same at every run.

64 requests; prompts of 68 to 700 random tokens (mean 295), answers of exactly 8 to 128 (mean 33),
many short ones and few long ones, in no order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

REQUESTS = 64
PROMPT, ANSWER = (68, 700), (8, 128)
PROMPT_SKEW, ANSWER_SKEW = 1.795, 3.9
"""Powers that lengths rise with from the shortest to the longest; they set the means."""
FIRST_TOKEN = 3
"""Below it are special ones."""


@dataclass(frozen=True, eq=False)
class RaggedRequest:
    """A prompt, int64 (T,), and how many tokens its answer has."""

    prompt: Tensor
    new_tokens: int


def ragged_requests(vocabulary: int, count: int = REQUESTS) -> list[RaggedRequest]:
    """The workload; with another `count`, one of the same shape."""
    rng = random.Random(0)  # noqa: S311 - lengths, no secrets
    prompts = rng.sample(_lengths(*PROMPT, PROMPT_SKEW, count), count)
    answers = rng.sample(_lengths(*ANSWER, ANSWER_SKEW, count), count)
    seeded = torch.Generator().manual_seed(0)
    return [
        RaggedRequest(torch.randint(FIRST_TOKEN, vocabulary, (length,), generator=seeded), new)
        for length, new in zip(prompts, answers, strict=True)
    ]


def _lengths(shortest: int, longest: int, skew: float, count: int) -> list[int]:
    return [
        round(shortest + (longest - shortest) * (rank / (count - 1)) ** skew)
        for rank in range(count)
    ]
