"""`ForcedDecoder`: our logits along given tokens, to compare them with another implementation's.

It lets a `ContinuousBatchDecoder` read a prompt and write the given tokens, and keeps the logits of
every step. Admission, positions, KV cache and attention are the decoder's own; only the logits that
tokens are chosen from are replaced, by ones that leave the given token. Where the engine would
decode with stock `generate`, the model reads prompt and tokens in one forward.

Not covered: bursts; their tokens are compared when answers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.models.base import Prompt
from gc2ray.models.llama import LanguageModel, unsupported


class ForcedDecoder:
    """Runs the decoder of a model along given tokens.

    Args:
        model: A transformers model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._language = LanguageModel(model) if unsupported(model) is None else None

    @torch.inference_mode()
    def logits(self, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
        """Logits after the prompt and after each token, (1 + tokens, vocabulary), on the host.

        Raises:
            Exception: The error of the decoder, if it cannot read the prompt.
        """
        if self._language is None:
            return self._in_one_go(prompt, tokens)
        forced = _ForcedModel(self._language, tokens)
        sampling = GenerationConfig(max_new_tokens=1 + len(tokens))
        decoder = ContinuousBatchDecoder(
            forced, DecodeLimits(len(prompt) + sampling.max_new_tokens), eos=()
        )
        decoder.submit(0, prompt, sampling)
        while len(decoder):
            for done in decoder.step():
                if done.error is not None:
                    raise done.error
        return torch.cat(forced.kept)

    def _in_one_go(self, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
        table = self._model.get_input_embeddings()
        written = table(torch.tensor(tokens, dtype=torch.int64, device=prompt.embeds.device))
        embeds = torch.cat([prompt.embeds, written])
        output = self._model(inputs_embeds=embeds[None], logits_to_keep=1 + len(tokens))
        logits: Tensor = output.logits[0].cpu()
        return logits


class _ForcedModel(LanguageModel):
    """A language model whose logits are kept, and replaced by ones that leave the next token.

    It shares all attributes with the model that it replaces.
    """

    def __init__(self, model: LanguageModel, tokens: Sequence[int]) -> None:
        vars(self).update(vars(model))
        self.kept: list[Tensor] = []
        self._next = iter((*tokens, 0))  # the token after the last one is not used

    def logits(self, *inputs: Any) -> Tensor:
        logits = super().logits(*inputs)
        self.kept.append(logits.cpu())
        left = torch.zeros_like(logits)
        left[:, next(self._next)] = 1
        return left


def largest_difference(ours: Tensor, theirs: Tensor) -> tuple[float, int]:
    """The largest difference of logits (P, vocabulary), and its position.

    It is a share of the position's largest logit in `theirs`, and infinite where a logit is not
    finite: NaN would pass every comparison.
    """
    ours, theirs = ours.float(), theirs.float()
    largest = theirs.abs().amax(dim=1).clamp_min(1e-12)
    shares = ((ours - theirs).abs().amax(dim=1) / largest).nan_to_num(torch.inf, torch.inf)
    worst = int(shares.argmax())
    return float(shares[worst]), worst
