"""Four implementations of attention over packed tokens, for different machines.

* `Compiled` is one call of our own code for CPUs (`gc2ray.models.layers.cpu_attention`): half the
  time of the next one.
* `attend_by_row` calls torch's fused attention once per sequence, on slices of the KV cache. It
  works everywhere, and other CPUs use it: there it beats one padded call with a mask (16 rows of 70
  to 700 tokens, one layer: 1.3 ms against 2.2 ms), as decoding is bound by the keys that it reads.
* `attend_varlen` is one call of torch's variable-length flash attention on the KV cache as it is:
  each sequence's first slot and its length describe it. For GPUs in half precision.
* `attend_padded` gathers keys up to the longest sequence for rows with one new token, and goes row
  by row for the others: for GPUs without the kernel.

`choose_attention` compares a GPU's kernel with `attend_by_row` on the device before using it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.models.layers.attention import Attend, Chunk, KvShape, Step
from gc2ray.models.layers.cpu_attention import CompiledAttention, MaskPattern, kernel_for

log = logging.getLogger(__name__)


def choose_attention(
    shape: KvShape, heads: int, dtype: torch.dtype, device: torch.device
) -> Attend:
    """The fastest implementation that gives correct results on this device.

    Args:
        shape: Sizes of the KV cache.
        heads: Query heads.
        dtype: Dtype of queries, keys and values.
        device: Their device.
    """
    compiled = kernel_for(shape.head_size, dtype, device)
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
    """Whether an implementation works here, with the results of `attend_by_row`."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device=device).to(dtype)

    kv_states = random(1, 2, shape.heads, 256, shape.head_size)
    chunks = (Chunk(100, 40, 40), Chunk(7, 61, 1), Chunk(200, 50, 9))
    step, queries = Step.from_chunks(chunks, kv_states), random(50, heads, shape.head_size)
    try:
        pairs = [
            (attend(step, 0, queries, 0.1, window), attend_by_row(step, 0, queries, 0.1, window))
            for window in (None, 16)
        ]
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        log.info("%s does not work here: %s", getattr(attend, "__name__", attend), error)
        return False
    return all(bool((result - expected).abs().max() < 0.05) for result, expected in pairs)


@dataclass(frozen=True, eq=False)
class Compiled:
    """All sequences in one call of our own code for CPUs; see `Attend`."""

    attend: CompiledAttention

    def __call__(
        self, step: Step, layer: int, queries: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """See `Attend`.

        Raises:
            TypeError: Only the device knows the step's sequences.
        """
        keys, values = step.kv_states[layer].unbind()
        return self.attend(queries, keys, values, step.table, MaskPattern(scale, window=window))


def attend_varlen(
    step: Step, layer: int, queries: Tensor, scale: float, window: int | None
) -> Tensor:
    """All sequences in one call; see `Attend`."""
    from torch.nn.attention.varlen import varlen_attn

    keys, values = step.kv_states[layer].transpose(1, 2).unbind()  # (tokens, heads, head size)
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
    step: Step, layer: int, queries: Tensor, scale: float, window: int | None
) -> Tensor:
    """All sequences in one call of the operator behind `varlen_attn`; see `Attend`.

    For torch before 2.12, whose `varlen_attn` takes neither grouped heads nor used lengths.
    """
    keys, values = step.kv_states[layer].transpose(1, 2).unbind()  # (tokens, heads, head size)
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
    step: Step, layer: int, queries: Tensor, scale: float, window: int | None
) -> Tensor:
    """Rows with one new token padded to the longest, others row by row; see `Attend`."""
    if step.most_new > 1:
        return attend_by_row(step, layer, queries, scale, window)
    states = step.kv_states[layer]
    along = torch.arange(step.most_used, device=states.device)
    slots = (step.starts[:-1, None] + along).clamp_max(states.shape[2] - 1)  # (S, L)
    seen = along < step.used[:, None]
    if window is not None:
        seen &= along >= step.used[:, None] - window
    # Slots behind a row's end may hold a NaN, which a weight of 0 would not remove.
    cache = states[:, :, slots].masked_fill_(~seen[:, :, None], 0)
    keys, values = cache.transpose(1, 2).unbind()  # (S, heads, L, head size)
    rows, heads, size = queries.shape
    grouped = queries.view(rows, keys.shape[1], heads // keys.shape[1], size)
    out = F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=seen[:, None, None], scale=scale
    )
    return out.reshape(rows, heads, size)


def attend_by_row(
    step: Step, layer: int, queries: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention sequence by sequence; see `Attend`.

    Raises:
        TypeError: Only the device knows the step's sequences.
    """
    chunks, outputs = step.host_chunks, []
    own_queries = torch.split(queries, [chunk.new for chunk in chunks])
    for chunk, caches, own in zip(chunks, step.caches, own_queries, strict=True):
        keys, values = caches[2 * layer : 2 * layer + 2]
        if chunk.new == 1:
            outputs.append(_attend_one(own, keys, values, scale, window))
        else:
            outputs.append(_attend_many(own, keys, values, scale, window))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


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
    index = torch.arange(length, device=device)
    own = index[length - new :, None]
    seen = index[None] <= own
    return seen if window is None else seen & (index[None] > own - window)
