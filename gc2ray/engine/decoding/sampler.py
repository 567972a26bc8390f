"""Drawing tokens: one number per token from the row's own generator, the same on every device.

The numbers of a row are drawn ahead, on the host, in float64, from the row's seed. Which token a
number means follows from its logits alone, so a row's answer depends neither on its place in a
batch nor on its neighbours. All rows of a batch are drawn at once, without waiting for the device.

A row whose logits are not finite draws `NOT_FINITE`, which is no token: whatever it drew instead
would look like an answer. `Repetition` is transformers' repetition penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gc2ray.core.config.generation import GenerationConfig

NOT_FINITE = -1
"""In a token's place: the row's logits were not finite, and nothing can be drawn from them."""


def row_numbers(sampling: GenerationConfig) -> Tensor:
    """A row's numbers in [0, 1), float64 (max_new_tokens,): one for each token it may write."""
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Sampler:
    """How the rows of a batch draw their next token.

    Attributes:
        rows: Rows that are sampled, int64 (S,); the others are greedy.
        temperature: Theirs, float64 (S, 1).
        top_p: Theirs, float64 (S, 1).
        numbers: What each of them draws next, float64 (S, 1).
    """

    rows: Tensor
    temperature: Tensor
    top_p: Tensor
    numbers: Tensor

    @staticmethod
    def from_samplings(
        samplings: Sequence[GenerationConfig], numbers: Sequence[float], device: torch.device
    ) -> Sampler:
        """The next token of each row; `numbers` of greedy rows are not read."""
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
    """Which tokens rows have read or written, and what that costs these: transformers' penalty.

    Attributes:
        had: Bool (B, vocabulary).
        penalty: What their logits are divided by, or multiplied with where they are negative; 1 in
            rows that have none. float32 (B, 1).
    """

    had: Tensor
    penalty: Tensor

    @staticmethod
    def none(rows: int, vocabulary: int, device: torch.device) -> Repetition:
        """Rows that have had nothing yet, and no penalty."""
        had = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        return Repetition(had, torch.ones(rows, 1, device=device))

    def load(self, samplings: Sequence[GenerationConfig], had: Sequence[Sequence[int]]) -> None:
        """Make these the first rows, with the tokens that each has had; the others are as new."""
        counts = torch.tensor([len(row) for row in had])
        owner = torch.arange(len(had)).repeat_interleave(counts)
        tokens = torch.tensor([token for row in had for token in row], dtype=torch.int64)
        places = torch.stack([owner, tokens]).to(self.had.device)
        self.had.zero_()
        self.had[places[0], places[1]] = True
        penalties = torch.tensor([[sampling.penalty] for sampling in samplings])
        self.penalty.fill_(1)
        self.penalty[: len(samplings)] = penalties.to(self.penalty.device)

    def add(self, tokens: Tensor) -> None:
        """Every row has had one token more, int64 (B,)."""
        self.had.scatter_(1, tokens[:, None], True)  # noqa: FBT003 - the operator takes it by place

    def applied(self, logits: Tensor) -> Tensor:
        """Logits (B, vocabulary) in float32, those of tokens that a row has had made less likely.

        In float32, as `generate` does it.
        """
        logits = logits.float()
        less = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self.had, less, logits)


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (B, vocabulary): the first of the best tokens of each row, and which are finite.

    `max` tells the token that `argmax` tells, in half the time, and the value, which is a NaN where
    any is; with the least one that says whether all are finite.
    """
    most, tokens = logits.max(dim=-1)
    return tokens, most.isfinite() & logits.amin(dim=-1).isfinite()


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, numbers: Tensor) -> Tensor:
    """One token a row from the smallest set of tokens whose probability reaches `top_p`.

    Args:
        logits: (S, vocabulary).
        temperature: Above 0, float64 (S, 1).
        top_p: In (0, 1], float64 (S, 1).
        numbers: In [0, 1), float64 (S, 1).

    Where logits are not finite it is any token: one that exists.
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
