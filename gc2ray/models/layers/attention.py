"""`Step`: the packed tokens of several sequences, as attention over a KV cache takes them.

A step runs some sequences; the last `new` tokens of each are new. Their queries lie packed one
after the other, without padding; their keys are in the KV cache already. A query sees the tokens of
its own sequence up to itself. `attention_backends` computes the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from gc2ray.models.layers.cpu_attention import SequenceTable


@dataclass(frozen=True)
class Chunk:
    """One sequence of a step.

    Attributes:
        start: Its first slot in the KV cache.
        length: Its tokens, the new ones included.
        new: New tokens; they are its last ones.
    """

    start: int
    length: int
    new: int


@dataclass(frozen=True, eq=False)
class Step:
    """The sequences of one forward pass: packed queries, and keys and values in a KV cache.

    Attributes:
        kv_states: Keys and values, (layers, keys and values, heads, slots, head size).
        slots: The new tokens' slots, int64 (T,).
        last: Index of each sequence's last token among the packed ones, int64 (S,).
        starts: First slot of each sequence, and one number more, int32 (S + 1,).
        used: Tokens of each sequence, int32 (S,).
        query_ends: 0, and where each sequence's queries end, int32 (S + 1,).
        most_new: Most new tokens of a sequence.
        most_used: Most tokens of a sequence, or an upper bound.
        chunks: The sequences; None where only the device knows them.
    """

    kv_states: Tensor
    slots: Tensor
    last: Tensor
    starts: Tensor
    used: Tensor
    query_ends: Tensor
    most_new: int
    most_used: int
    chunks: tuple[Chunk, ...] | None = None

    @staticmethod
    def from_chunks(chunks: Sequence[Chunk], kv_states: Tensor) -> Step:
        """A step of sequences in the order of their queries."""
        slots = [
            slot
            for chunk in chunks
            for slot in range(chunk.start + chunk.length - chunk.new, chunk.start + chunk.length)
        ]
        ends = list(accumulate((chunk.new for chunk in chunks), initial=0))

        def tensor(values: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(kv_states.device)

        return Step(
            kv_states=kv_states,
            slots=tensor(slots, torch.int64),
            last=tensor([end - 1 for end in ends[1:]], torch.int64),
            starts=tensor([*(chunk.start for chunk in chunks), kv_states.shape[3]], torch.int32),
            used=tensor([chunk.length for chunk in chunks], torch.int32),
            query_ends=tensor(ends, torch.int32),
            most_new=max(chunk.new for chunk in chunks),
            most_used=max(chunk.length for chunk in chunks),
            chunks=tuple(chunks),
        )

    @staticmethod
    def from_sizes(rows: int, longest: int, kv_states: Tensor) -> Step:
        """A step of `rows` sequences with one new token each, to be filled in on the device."""
        device = kv_states.device
        return Step(
            kv_states=kv_states,
            slots=torch.zeros(rows, dtype=torch.int64, device=device),
            last=torch.arange(rows, device=device),
            starts=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            used=torch.ones(rows, dtype=torch.int32, device=device),
            query_ends=torch.arange(rows + 1, dtype=torch.int32, device=device),
            most_new=1,
            most_used=longest,
        )

    @property
    def host_chunks(self) -> tuple[Chunk, ...]:
        """The sequences.

        Raises:
            TypeError: Only the device knows them.
        """
        if self.chunks is None:
            raise TypeError("only the device knows these sequences")
        return self.chunks

    @cached_property
    def table(self) -> SequenceTable:
        """The sequences in the form that compiled attention takes."""
        return SequenceTable.from_sequences(
            [(chunk.start, chunk.length, chunk.new) for chunk in self.host_chunks]
        )

    @cached_property
    def only_last(self) -> Step:
        """The step with only the last token of each sequence."""
        if self.most_new == 1:
            return self
        chunks = [replace(chunk, new=1) for chunk in self.host_chunks]
        return Step.from_chunks(chunks, self.kv_states)

    @cached_property
    def caches(self) -> list[tuple[Tensor, ...]]:
        """Per sequence keys and values of every layer, (1, heads, length, head size) views.

        Made for all layers at once, in the shape that attention takes: with 16 rows of 320 tokens
        and 8 layers attention itself takes five sixths of decoding's attention, views the rest.
        """
        flat = self.kv_states.flatten(0, 1).unsqueeze(1)
        ends = [(chunk.start, chunk.start + chunk.length) for chunk in self.host_chunks]
        return [flat[:, :, :, start:stop].unbind() for start, stop in ends]


class Attend(Protocol):
    """Attention of a step.

    Args:
        step: The sequences; their keys and values are in the KV cache.
        layer: Index of the layer.
        queries: (T, query heads, head size).
        scale: Factor of the scores.
        window: Tokens that a query sees, itself included; None for all before it.

    Returns:
        (T, query heads, head size).
    """

    def __call__(
        self, step: Step, layer: int, queries: Tensor, scale: float, window: int | None
    ) -> Tensor: ...


def write(step: Step, layer: int, keys: Tensor, values: Tensor) -> None:
    """Write keys and values of a step's new tokens, (T, heads, head size) each, to their slots."""
    for cache, states in zip(step.kv_states[layer], (keys, values), strict=True):
        cache.index_copy_(1, step.slots, states.transpose(0, 1))


@dataclass(frozen=True)
class KvShape:
    """Sizes of one token's keys and values: layers, key-value heads, features of a head."""

    layers: int
    heads: int
    head_size: int
