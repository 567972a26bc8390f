"""Drawing tokens: one number per token from the row's own generator, the same on every device.

The numbers of a row are drawn ahead, on the host, in float64, from the row's seed. Which token a
number means follows from its logits alone, so a row's answer depends neither on its place in a
batch nor on its neighbours. All rows of a batch are drawn at once, without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gc2ray.records import Sampling


def row_numbers(sampling: Sampling) -> Tensor:
    """A row's numbers in [0, 1), float64 (max_new_tokens,): one for each token it may write."""
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Drawing:
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
    def of(
        samplings: Sequence[Sampling], numbers: Sequence[float], device: torch.device
    ) -> Drawing:
        """The next token of each row; `numbers` of greedy rows are not read."""
        rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
        values = [[samplings[r].temperature, samplings[r].top_p, numbers[r]] for r in rows]
        table = torch.tensor(values, dtype=torch.float64).view(len(rows), 3).to(device)
        columns = table.split(1, dim=1)  # type: ignore[no-untyped-call]  # torch's split is
        return Drawing(torch.tensor(rows, dtype=torch.int64).to(device), *columns)

    def tokens(self, logits: Tensor) -> Tensor:
        """The next tokens, int64 (B,), of logits (B, vocabulary)."""
        best = logits.argmax(dim=-1)
        if len(self.rows) == 0:
            return best
        sampled = drawn(logits[self.rows], self.temperature, self.top_p, self.numbers)
        return best.index_copy(0, self.rows, sampled)


def drawn(logits: Tensor, temperature: Tensor, top_p: Tensor, numbers: Tensor) -> Tensor:
    """One token a row from the smallest set of tokens whose probability reaches `top_p`.

    Args:
        logits: (S, vocabulary).
        temperature: Above 0, float64 (S, 1).
        top_p: In (0, 1], float64 (S, 1).
        numbers: In [0, 1), float64 (S, 1).
    """
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    inside = before < top_p
    inside[:, 0] = True
    nucleus = ordered * inside
    at = numbers * nucleus.sum(dim=-1, keepdim=True)
    index = torch.searchsorted(nucleus.cumsum(dim=-1), at, right=True)
    last = (nucleus > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(index, last)).squeeze(1)
