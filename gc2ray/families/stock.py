"""The same model through stock transformers: what parity checks and benchmarks compare with.

The `stock_` functions use none of our preprocessing, tower run, packing or decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gc2ray.families.family import Loaded
from gc2ray.views import Prompt


def stock_inputs(loaded: Loaded, images: Sequence[Image.Image], texts: Sequence[str]) -> Any:
    """The processor's model inputs; `texts` are rendered chat prompts with `<image>` in them."""
    processor = loaded.processor
    bos = processor.tokenizer.bos_token
    has_bos = bool(bos) and all(text.startswith(bos) for text in texts)
    inputs = processor(
        images=list(images),
        text=list(texts),
        padding=True,
        padding_side="left",
        add_special_tokens=not has_bos,
        return_tensors="pt",
    )
    return inputs.to(loaded.family.device, dtype=loaded.model.dtype)


@torch.inference_mode()
def stock_logits(loaded: Loaded, image: Image.Image, text: str) -> Tensor:
    """Logits of the token after the prompt, (vocabulary,)."""
    inputs = stock_inputs(loaded, [image], [text])
    logits: Tensor = loaded.model(**inputs, logits_to_keep=1).logits[0, -1]
    return logits


@torch.inference_mode()
def stock_generate(
    loaded: Loaded, images: Sequence[Image.Image], texts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers of one padded batch; per row the new tokens, padding behind the end kept."""
    inputs = stock_inputs(loaded, images, texts)
    output = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return new


@torch.inference_mode()
def prompt_logits(loaded: Loaded, prompt: Prompt) -> Tensor:
    """Logits of the token after one of our prompts, (vocabulary,)."""
    placed: dict[str, Tensor] = {}
    if prompt.positions is not None:
        # Without a mask transformers takes a gap for the start of another packed sequence.
        mask = torch.ones_like(prompt.positions)
        placed = {"position_ids": prompt.positions[None], "attention_mask": mask[None]}
    output = loaded.model(inputs_embeds=prompt.embeds[None], logits_to_keep=1, **placed)
    logits: Tensor = output.logits[0, -1]
    return logits
