"""Our logits along tokens that somebody else chose: what a check compares with another's.

`ForcedDecoder` has a decoder read a prompt and then write what it is told, and keeps the logits
that it had at every step. It is the `ContinuousBatchDecoder` itself that runs: its way of letting
prompts in, its positions, its KV cache, its attention. Only the logits that it draws from are
exchanged, for ones that leave the dictated token. Where the decoder is stock `generate`, which has
no step of ours in it, the model reads prompt and tokens in one go.

Not covered: bursts; the tokens that they give are compared by whoever compares answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder, DecodeLimits
from gc2ray.models.base import Prompt
from gc2ray.models.llama import LanguageModel, unsupported


class ForcedDecoder:
    """Dictates to the decoder that a model would get.

    Args:
        model: A transformers model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._language = LanguageModel(model) if unsupported(model) is None else None

    @torch.inference_mode()
    def logits(self, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
        """Behind the prompt and behind each of the tokens, (1 + tokens, vocabulary), on the host.

        Raises:
            Exception: What the decoder says of a prompt that it cannot read.
        """
        if self._language is None:
            return self._in_one_go(prompt, tokens)
        dictated = _ForcedModel(self._language, tokens)
        wanted = GenerationConfig(max_new_tokens=1 + len(tokens))
        decoder = ContinuousBatchDecoder(
            dictated, DecodeLimits(len(prompt) + wanted.max_new_tokens), eos=()
        )
        decoder.submit(0, prompt, wanted)
        while len(decoder):
            for done in decoder.step():
                if done.error is not None:
                    raise done.error
        return torch.cat(dictated.kept)

    def _in_one_go(self, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
        table = self._model.get_input_embeddings()
        written = table(torch.tensor(tokens, dtype=torch.int64, device=prompt.embeds.device))
        embeds = torch.cat([prompt.embeds, written])
        output = self._model(inputs_embeds=embeds[None], logits_to_keep=1 + len(tokens))
        logits: Tensor = output.logits[0].cpu()
        return logits


class _ForcedModel(LanguageModel):
    """A language model whose logits are kept, and exchanged for ones that leave the next token.

    It shares everything with the model that it stands for.
    """

    def __init__(self, model: LanguageModel, tokens: Sequence[int]) -> None:
        vars(self).update(vars(model))
        self.kept: list[Tensor] = []
        self._next = iter((*tokens, 0))  # what follows the last one is read by nobody

    def logits(self, *inputs: Any) -> Tensor:
        logits = super().logits(*inputs)
        self.kept.append(logits.cpu())
        left = torch.zeros_like(logits)
        left[:, next(self._next)] = 1
        return left


def largest_difference(ours: Tensor, theirs: Tensor) -> tuple[float, int]:
    """Of logits (P, vocabulary): the largest, as a share of their largest one, and its position.

    Where either is not finite it is infinite: NaN would pass every comparison.
    """
    ours, theirs = ours.float(), theirs.float()
    largest = theirs.abs().amax(dim=1).clamp_min(1e-12)
    shares = ((ours - theirs).abs().amax(dim=1) / largest).nan_to_num(torch.inf, torch.inf)
    worst = int(shares.argmax())
    return float(shares[worst]), worst
