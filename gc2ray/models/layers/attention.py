"""Attention of packed tokens over a `KvPool`: prefill, decode, and both in one step.

A step runs some sequences, each with `new` tokens that are its last ones. Their queries lie packed
one after the other, without padding; their keys are in the arena already. A query sees the tokens
of its own sequence up to itself. Four ways to compute that, chosen by what the machine can do:

* `Compiled` is one call of our own code for CPUs (`gc2ray.models.layers.cpu_attention`): half the
  time of the next one.
* `attend_by_row` calls torch's fused attention once per sequence, on slices of the arena. It works
  everywhere and is what other CPUs use: there it beats one padded call with a mask (16 rows of 70
  to 700 tokens, one layer: 1.3 ms against 2.2 ms), as decoding is bound by the keys that it reads.
* `attend_varlen` is one call of torch's variable-length flash attention on the arena as it is:
  each sequence's first place and length say all. For GPUs in half precision.
* `attend_padded` gathers keys up to the longest sequence for rows with one new token, and goes row
  by row for the others: for GPUs without the kernel.

Not covered: a GPU was not at hand when this was written. `chosen` compares `attend_varlen` with
`attend_by_row` on the device itself before it trusts it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.engine.decoding.kv_cache import KvShape
from gc2ray.models.layers.cpu_attention import CompiledAttention, Pattern, SequenceTable, found_for

log = logging.getLogger(__name__)


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
        return SequenceTable.of([(chunk.start, chunk.length, chunk.new) for chunk in self.chunks])

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


def chosen(shape: KvShape, heads: int, dtype: torch.dtype, device: torch.device) -> Attend:
    """The fastest way that is right on this device.

    Args:
        shape: Of the KV cache.
        heads: Query heads.
        dtype: Of queries, keys and values.
        device: Where they are.
    """
    compiled = found_for(shape.head_size, dtype, device)
    if compiled is not None:
        return Compiled(compiled)
    if device.type == "cpu":
        return attend_by_row
    for attend in (attend_varlen, attend_flash) if dtype != torch.float32 else ():
        if _agrees(attend, shape, heads, dtype, device):
            return attend
    log.warning("no variable-length attention on %s in %s: decoding is padded", device, dtype)
    return attend_padded


def _agrees(
    attend: Attend, shape: KvShape, heads: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a way works here, and gives what attention row by row gives."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device=device).to(dtype)

    arena = drawn(1, 2, shape.heads, 256, shape.head_size)
    step = Step((Chunk(100, 40, 40), Chunk(7, 61, 1), Chunk(200, 50, 9)), arena)
    queries = drawn(50, heads, shape.head_size)
    try:
        pairs = [
            (attend(step, 0, queries, 0.1, window), attend_by_row(step, 0, queries, 0.1, window))
            for window in (None, 16)
        ]
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        log.info("%s does not work here: %s", getattr(attend, "__name__", attend), error)
        return False
    return all(bool((found - right).abs().max() < 0.05) for found, right in pairs)


@dataclass(frozen=True, eq=False)
class Compiled:
    """All sequences in one call of our own code for CPUs; see `Attend`."""

    attend: CompiledAttention

    def __call__(
        self, step: Sequences, layer: int, queries: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See `Attend`.

        Raises:
            TypeError: The host does not know the step's sequences.
        """
        keys, values = step.arena[layer].unbind()
        return self.attend(queries, keys, values, _known(step).table, Pattern(scale, window=window))


def attend_varlen(
    step: Sequences, layer: int, queries: Tensor, scale: float, window: int | None
) -> Tensor:
    """All sequences in one call; see `Attend`."""
    from torch.nn.attention.varlen import varlen_attn

    keys, values = step.arena[layer].transpose(1, 2).unbind()  # (tokens, heads, head size)
    out = varlen_attn(
        queries,
        keys,
        values,
        step.query_ends,
        step.starts,
        step.most_new,
        step.most_used,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=queries.shape[1] != keys.shape[1],
        seqused_k=step.used,
    )
    return out if isinstance(out, Tensor) else out[0]


def attend_flash(
    step: Sequences, layer: int, queries: Tensor, scale: float, window: int | None
) -> Tensor:
    """The same by the operator behind it; see `Attend`.

    For torch before 2.12, whose `varlen_attn` takes neither grouped heads nor used lengths.
    """
    keys, values = step.arena[layer].transpose(1, 2).unbind()  # (tokens, heads, head size)
    out: Tensor = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        step.query_ends,
        step.starts,
        step.most_new,
        step.most_used,
        0.0,
        window is None,
        False,  # noqa: FBT003 - the operator takes it by place
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
        seqused_k=step.used,
    )[0]
    return out


def attend_padded(
    step: Sequences, layer: int, queries: Tensor, scale: float, window: int | None
) -> Tensor:
    """Rows with one new token padded to the longest, others row by row; see `Attend`."""
    if step.most_new > 1:
        return attend_by_row(step, layer, queries, scale, window)
    arena = step.arena[layer]
    along = torch.arange(step.most_used, device=arena.device)
    places = (step.starts[:-1, None] + along).clamp_max(arena.shape[2] - 1)  # (S, L)
    seen = along < step.used[:, None]
    if window is not None:
        seen &= along >= step.used[:, None] - window
    # Behind a row's end lies whatever was there; not even a weight of 0 makes a number of a NaN.
    cache = arena[:, :, places].masked_fill_(~seen[:, :, None], 0)
    keys, values = cache.transpose(1, 2).unbind()  # (S, heads, L, head size)
    rows, heads, size = queries.shape
    grouped = queries.view(rows, keys.shape[1], heads // keys.shape[1], size)
    out = F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=seen[:, None, None], scale=scale
    )
    return out.reshape(rows, heads, size)


def attend_by_row(
    step: Sequences, layer: int, queries: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention sequence by sequence; see `Attend`.

    Raises:
        TypeError: The host does not know the step's sequences.
    """
    step, outputs = _known(step), []
    own_queries = torch.split(queries, [chunk.new for chunk in step.chunks])
    for chunk, caches, own in zip(step.chunks, step.caches, own_queries, strict=True):
        keys, values = caches[2 * layer : 2 * layer + 2]
        if chunk.new == 1:
            outputs.append(_attend_one(own, keys, values, scale, window))
        else:
            outputs.append(_attend_many(own, keys, values, scale, window))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _known(step: Sequences) -> Step:
    if not isinstance(step, Step):
        raise TypeError("only the device knows these sequences")
    return step


def _attend_one(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
) -> Tensor:
    """One query (1, query heads, head size): it sees everything, or the last `window`."""
    if window is not None:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    # Query heads that share keys take the place of several queries: nothing is repeated.
    grouped = query.view(1, keys.shape[1], -1, query.shape[-1])
    out = F.scaled_dot_product_attention(grouped, keys, values, scale=scale)
    return out.view(query.shape)


def _attend_many(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
) -> Tensor:
    """The last queries of a sequence, (new, query heads, head size)."""
    new, length = len(queries), keys.shape[2]
    shared = queries.shape[1] // keys.shape[1]
    if shared > 1:
        keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    whole = new == length and (window is None or window >= length)
    mask = None if whole else _mask(new, length, window, queries.device)
    out = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=mask,
        is_causal=whole,
        scale=scale,
    )
    return out[0].transpose(0, 1)


def _mask(new: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which tokens each of the last `new` queries sees, bool (new, length)."""
    place = torch.arange(length, device=device)
    own = place[length - new :, None]
    seen = place[None] <= own
    return seen if window is None else seen & (place[None] > own - window)
