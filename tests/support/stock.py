"""Logits of one prompt by stock transformers, from the processor's input or from ours."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from gc2ray.models.adapter import LoadedModel
from gc2ray.models.base import Prompt
from gc2ray.models.hf_reference import stock_inputs


@torch.inference_mode()
def stock_logits(loaded: LoadedModel, image: Image.Image, text: str) -> Tensor:
    """Logits of the token after the prompt, (vocabulary,)."""
    inputs = stock_inputs(loaded, [image], [text])
    logits: Tensor = loaded.model(**inputs, logits_to_keep=1).logits[0, -1]
    return logits


@torch.inference_mode()
def prompt_logits(loaded: LoadedModel, prompt: Prompt) -> Tensor:
    """Logits of the token after one of our prompts, (vocabulary,)."""
    explicit: dict[str, Tensor] = {}
    if prompt.positions is not None:
        # Without a mask transformers takes a gap for the start of another packed sequence.
        mask = torch.ones_like(prompt.positions)
        explicit = {"position_ids": prompt.positions[None], "attention_mask": mask[None]}
    output = loaded.model(inputs_embeds=prompt.embeds[None], logits_to_keep=1, **explicit)
    logits: Tensor = output.logits[0, -1]
    return logits
