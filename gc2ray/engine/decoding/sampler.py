"""`Sampler`: the next tokens of a batch, from logits and each row's own random numbers.

A row's numbers, one per token, are made ahead on the host, in float64, from the row's seed. Which
token a number selects follows from the row's logits alone, so an answer depends neither on the
row's index in a batch nor on its neighbours, and is the same on every device. All rows of a batch
are sampled at once, without waiting for the device.

A row whose logits are not finite gets `NOT_FINITE`, which is no token: any token would look like an
answer. `Repetition` is transformers' repetition penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gc2ray.core.config.generation import GenerationConfig

NOT_FINITE = -1
"""Stands for a token of a row whose logits are not finite."""


def row_numbers(sampling: GenerationConfig) -> Tensor:
    """A row's random numbers in [0, 1), float64 (max_new_tokens,), one for each token."""
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Sampler:
    """Settings for the next token of each row of a batch.

    Attributes:
        rows: Indices of the sampled rows, int64 (S,); the others are greedy.
        temperature: Temperature of the sampled rows, float64 (S, 1).
        top_p: Nucleus of the sampled rows, float64 (S, 1).
        numbers: Next random number of the sampled rows, float64 (S, 1).
    """

    rows: Tensor
    temperature: Tensor
    top_p: Tensor
    numbers: Tensor

    @staticmethod
    def from_samplings(
        samplings: Sequence[GenerationConfig], numbers: Sequence[float], device: torch.device
    ) -> Sampler:
        """From each row's settings and its next random number, which greedy rows ignore."""
        rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
        values = [[samplings[r].temperature, samplings[r].top_p, numbers[r]] for r in rows]
        table = torch.tensor(values, dtype=torch.float64).view(len(rows), 3).to(device)
        columns = table.split(1, dim=1)  # type: ignore[no-untyped-call]  # torch's split is
        return Sampler(torch.tensor(rows, dtype=torch.int64).to(device), *columns)

    def tokens(self, logits: Tensor) -> Tensor:
        """The next tokens or `NOT_FINITE`, int64 (B,), of logits (B, vocabulary)."""
        best, finite = most_likely(logits)
        if len(self.rows) > 0:
            sampled = sample(logits[self.rows], self.temperature, self.top_p, self.numbers)
            best = best.index_copy(0, self.rows, sampled)
        return best.where(finite, NOT_FINITE)


@dataclass(frozen=True, eq=False)
class Repetition:
    """Transformers' repetition penalty, for the tokens that each row has read or written.

    Attributes:
        had: Whether the row has read or written the token, bool (B, vocabulary).
        penalty: Divisor of the logits of these tokens, or factor where they are negative; 1 in rows
            without a penalty. float32 (B, 1).
    """

    had: Tensor
    penalty: Tensor

    @staticmethod
    def none(rows: int, vocabulary: int, device: torch.device) -> Repetition:
        """Rows without tokens and without a penalty."""
        had = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        return Repetition(had, torch.ones(rows, 1, device=device))

    def load(self, samplings: Sequence[GenerationConfig], had: Sequence[Sequence[int]]) -> None:
        """Set the first rows to these settings and tokens, and reset the others."""
        counts = torch.tensor([len(row) for row in had])
        owner = torch.arange(len(had)).repeat_interleave(counts)
        tokens = torch.tensor([token for row in had for token in row], dtype=torch.int64)
        index = torch.stack([owner, tokens]).to(self.had.device)
        self.had.zero_()
        self.had[index[0], index[1]] = True
        penalties = torch.tensor([[sampling.penalty] for sampling in samplings])
        self.penalty.fill_(1)
        self.penalty[: len(samplings)] = penalties.to(self.penalty.device)

    def add(self, tokens: Tensor) -> None:
        """Add each row's newest token, int64 (B,)."""
        self.had.scatter_(1, tokens[:, None], True)  # noqa: FBT003 - the operator takes it by place

    def applied(self, logits: Tensor) -> Tensor:
        """Penalised logits (B, vocabulary), in float32 as `generate` computes them."""
        logits = logits.float()
        less = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self.had, less, logits)


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the best tokens of each row, and whether all of its logits are finite.

    `max` gives the token that `argmax` gives in half the time, and its value, which is NaN where
    any logit is; together with the minimum it shows whether all are finite.

    Args:
        logits: (B, vocabulary).
    """
    most, tokens = logits.max(dim=-1)
    return tokens, most.isfinite() & logits.amin(dim=-1).isfinite()


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, numbers: Tensor) -> Tensor:
    """One token a row from the smallest set of tokens whose probability reaches `top_p`.

    Args:
        logits: (S, vocabulary).
        temperature: Above 0, float64 (S, 1).
        top_p: Share of the probability, in (0, 1], float64 (S, 1).
        numbers: Random numbers in [0, 1), float64 (S, 1).

    Rows whose logits are not finite get any valid token.
    """
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    inside = before < top_p
    inside[:, 0] = True
    nucleus = ordered * inside
    at = numbers * nucleus.sum(dim=-1, keepdim=True)
    index = torch.searchsorted(nucleus.cumsum(dim=-1), at, right=True)
    last = (nucleus > 0).sum(dim=-1, keepdim=True).clamp_min(1) - 1  # NaN is above nothing
    return tokens.gather(1, torch.minimum(index, last)).squeeze(1)
