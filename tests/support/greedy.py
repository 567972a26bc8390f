"""Greedy decoding with positions of one's own, as plain as it gets: what decoders compare with."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def plain_greedy(
    model: Any,
    embeds: Tensor,
    positions: Tensor,
    max_new_tokens: int,
    eos: Collection[int] = (),
) -> list[int]:
    """New tokens of one prompt, the end of sequence included; one call of the model per token.

    The answer goes on at the last position + 1.

    Args:
        model: A transformers model.
        embeds: (T, D).
        positions: Of every token, int64 (T,).
        max_new_tokens: Tokens at most.
        eos: Tokens that end the answer.
    """
    tokens: list[int] = []
    table = model.get_input_embeddings()
    cache, step, at = None, embeds[None], positions[None]
    read = 0
    while len(tokens) < max_new_tokens:
        read += step.shape[1]
        output = model(
            inputs_embeds=step,
            position_ids=at,
            # Without a mask transformers may take a gap for the start of another packed sequence.
            attention_mask=torch.ones(1, read, dtype=torch.long, device=embeds.device),
            past_key_values=cache,
            use_cache=True,
        )
        token = int(output.logits[0, -1].argmax())
        tokens.append(token)
        if token in eos:
            break
        cache, at = output.past_key_values, at[:, -1:] + 1
        step = table(torch.tensor([[token]], device=embeds.device))
    return tokens
