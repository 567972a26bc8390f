"""Every way to compute attention gives what a plain softmax gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gc2ray.models.layers.attention import Chunk, KvShape, Step
from gc2ray.models.layers.attention_backends import (
    _agrees,
    attend_by_row,
    attend_flash,
    attend_padded,
    attend_varlen,
    choose_attention,
)


def fake_varlen(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ends: torch.Tensor,
    starts: torch.Tensor, most_new: int, most_used: int, *, scale: float,
    window_size: tuple[int, int], enable_gqa: bool, seqused_k: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What flash attention's documentation says of these arguments, in loops."""
    assert queries.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert {t.dtype for t in (ends, starts, seqused_k)} == {torch.int32}
    assert len(ends) == len(starts) == len(seqused_k) + 1
    assert (window_size[1], enable_gqa) == (0, queries.shape[1] != keys.shape[1])
    out = torch.empty_like(queries)
    for s, used in enumerate(seqused_k.tolist()):
        new = int(ends[s + 1] - ends[s])
        assert new <= most_new
        assert used <= most_used
        for q in range(new):
            at = used - new + q
            first = 0 if window_size[0] < 0 else max(0, at - window_size[0])
            rows = slice(int(starts[s]) + first, int(starts[s]) + at + 1)
            for head in range(queries.shape[1]):
                shared = head * keys.shape[1] // queries.shape[1]
                weights = (keys[rows, shared] @ queries[int(ends[s]) + q, head] * scale).softmax(0)
                out[int(ends[s]) + q, head] = weights @ values[rows, shared]
    return out


def fake_flash(*places: Any, **named: Any) -> tuple[torch.Tensor, ...]:
    """The operator behind it: the same, but for how a window is said, with what nobody reads."""
    *tensors, dropout, is_causal, wants_weights = places
    left, right = named.pop("window_size_left"), named.pop("window_size_right")
    assert (dropout, is_causal, wants_weights) == (0.0, left == -1, False)
    grouped = tensors[0].shape[1] != tensors[1].shape[1]
    out = fake_varlen(*tensors, window_size=(left, right), enable_gqa=grouped, **named)
    return out, torch.zeros(0)


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("stage", ["mixed", "decoding"])
def test_attention_equals_a_plain_softmax(
    heads: int, window: int | None, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences at different stages, against softmax over the tokens that each query may see."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", fake_flash)
    generator = torch.Generator().manual_seed(0)
    kv_states = torch.randn(1, 2, 2, 60, 8, generator=generator)
    chunks = (Chunk(3, 9, 9), Chunk(20, 7, 1), Chunk(30, 12, 5), Chunk(50, 1, 1))
    step = (
        Step.from_chunks(chunks, kv_states).only_last
        if stage == "decoding"
        else Step.from_chunks(chunks, kv_states)
    )
    queries = torch.randn(sum(chunk.new for chunk in step.chunks), heads, 8, generator=generator)
    wanted, row = torch.empty_like(queries), 0
    for chunk in step.host_chunks:
        for at in range(chunk.length - chunk.new, chunk.length):
            first = 0 if window is None else max(0, at - window + 1)
            for head in range(heads):
                seen = kv_states[
                    0, :, head * 2 // heads, chunk.start + first : chunk.start + at + 1
                ]
                weights = (seen[0] @ queries[row, head] * 0.3).softmax(0)
                wanted[row, head] = weights @ seen[1]
            row += 1
    for attend in (attend_by_row, attend_padded, attend_varlen, attend_flash):
        torch.testing.assert_close(attend(step, 0, queries, 0.3, window), wanted)


def test_an_attention_backend_that_works_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    shape = KvShape(layers=1, heads=2, head_size=16)
    assert (
        choose_attention(KvShape(layers=1, heads=2, head_size=8), 4, torch.float32, cpu)
        is attend_by_row
    )
    for attend in (attend_varlen, attend_flash):
        assert not _agrees(attend, shape, 4, torch.bfloat16, cpu), "no such kernel on a CPU"
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen)
    assert _agrees(attend_varlen, shape, 4, torch.float32, cpu)

    def wrong(*arguments: Any, **named: Any) -> torch.Tensor:
        return fake_varlen(*arguments, **named | {"seqused_k": named["seqused_k"] - 1})

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong)
    assert not _agrees(attend_varlen, shape, 4, torch.float32, cpu), "it forgets a token"
