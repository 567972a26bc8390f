"""What attention over a KV cache works on: packed tokens of several sequences, one step at a time.

A step runs some sequences, each with `new` tokens that are its last ones. Their queries lie packed
one after the other, without padding; their keys are in the arena already. A query sees the tokens
of its own sequence up to itself. How it is computed is in `attention_backends`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from gc2ray.models.layers.cpu_attention import SequenceTable


@dataclass(frozen=True)
class Chunk:
    """One sequence of a step.

    Attributes:
        start: Its first place in the arena.
        length: Its tokens, those of this step included.
        new: Tokens of this step; they are its last.
    """

    start: int
    length: int
    new: int


class Sequences(Protocol):
    """What attention needs to know of a step: of packed queries, and of keys in an arena.

    Attributes:
        arena: (layers, keys and values, heads, tokens, head size).
        places: Where the new tokens lie in the arena, int64 (T,).
        last: Index of each sequence's last token among the packed ones, int64 (S,).
        starts: First place of each sequence, and one number more, int32 (S + 1,).
        used: Tokens of each sequence, int32 (S,).
        query_ends: 0, and where each sequence's queries end, int32 (S + 1,).
        most_new: Most new tokens of a sequence.
        most_used: Most tokens of a sequence; where it is not known, a bound.
    """

    @property
    def arena(self) -> Tensor: ...
    @property
    def places(self) -> Tensor: ...
    @property
    def last(self) -> Tensor: ...
    @property
    def starts(self) -> Tensor: ...
    @property
    def used(self) -> Tensor: ...
    @property
    def query_ends(self) -> Tensor: ...
    @property
    def most_new(self) -> int: ...
    @property
    def most_used(self) -> int: ...
    @property
    def only_last(self) -> Sequences:
        """The same with each sequence's last token alone."""


class Attend(Protocol):
    """Attention of a step.

    Args:
        step: What is run; keys and values are written.
        layer: Whose.
        queries: (T, query heads, head size).
        scale: Of the scores.
        window: Tokens that a query sees, itself included; None for all before it.

    Returns:
        (T, query heads, head size).
    """

    def __call__(
        self, step: Sequences, layer: int, queries: Tensor, scale: float, window: int | None
    ) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Step:
    """The sequences of a step, in the order of their queries, and the arena they are in.

    Attributes:
        chunks: The sequences.
        arena: (layers, keys and values, heads, tokens, head size).
    """

    chunks: tuple[Chunk, ...]
    arena: Tensor

    @cached_property
    def places(self) -> Tensor:
        """Where the new tokens lie in the arena, int64 (T,)."""
        places = [
            place
            for chunk in self.chunks
            for place in range(chunk.start + chunk.length - chunk.new, chunk.start + chunk.length)
        ]
        return torch.tensor(places, device=self.arena.device)

    @cached_property
    def last(self) -> Tensor:
        """Index of each sequence's last token among the packed ones, int64 (S,)."""
        ends = torch.tensor([chunk.new for chunk in self.chunks]).cumsum(0) - 1
        return ends.to(self.arena.device)

    @cached_property
    def starts(self) -> Tensor:
        """First place of each sequence, and one number more, int32 (S + 1,)."""
        return self._int32([*(chunk.start for chunk in self.chunks), self.arena.shape[3]])

    @cached_property
    def used(self) -> Tensor:
        """Tokens of each sequence, int32 (S,)."""
        return self._int32([chunk.length for chunk in self.chunks])

    @cached_property
    def query_ends(self) -> Tensor:
        """0, and where each sequence's queries end, int32 (S + 1,)."""
        ends = [0]
        for chunk in self.chunks:
            ends.append(ends[-1] + chunk.new)
        return self._int32(ends)

    @property
    def most_new(self) -> int:
        """Most new tokens of a sequence."""
        return max(chunk.new for chunk in self.chunks)

    @property
    def most_used(self) -> int:
        """Most tokens of a sequence."""
        return max(chunk.length for chunk in self.chunks)

    @cached_property
    def table(self) -> SequenceTable:
        """The sequences as compiled attention takes them."""
        return SequenceTable.from_sequences(
            [(chunk.start, chunk.length, chunk.new) for chunk in self.chunks]
        )

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.arena.device)

    @cached_property
    def only_last(self) -> Step:
        """The same with each sequence's last token alone."""
        if all(chunk.new == 1 for chunk in self.chunks):
            return self
        return Step(tuple(replace(chunk, new=1) for chunk in self.chunks), self.arena)

    @cached_property
    def caches(self) -> list[tuple[Tensor, ...]]:
        """Per sequence keys and values of every layer, (1, heads, length, head size) views.

        Made for all layers at once, in the shape that attention takes: with 16 rows of 320 tokens
        and 8 layers attention itself takes five sixths of decoding's attention, views the rest.
        """
        flat = self.arena.flatten(0, 1).unsqueeze(1)
        ends = [(chunk.start, chunk.start + chunk.length) for chunk in self.chunks]
        return [flat[:, :, :, start:stop].unbind() for start, stop in ends]


def write(step: Sequences, layer: int, keys: Tensor, values: Tensor) -> None:
    """Put keys and values of a step's new tokens into the arena, (T, heads, head size) each."""
    for cache, states in zip(step.arena[layer], (keys, values), strict=True):
        cache.index_copy_(1, step.places, states.transpose(0, 1))


@dataclass(frozen=True)
class KvShape:
    """What the KV cache of one token is made of: layers, key-value heads, features of a head."""

    layers: int
    heads: int
    head_size: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.layers * self.heads * self.head_size * dtype.itemsize
