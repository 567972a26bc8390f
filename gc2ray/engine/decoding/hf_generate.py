"""Decoding with stock `generate(inputs_embeds=…)` on left-padded batches.

Prompts of similar length are batched, so that padding and waiting stay small. A row samples from
its own generator, so its tokens do not depend on its batch. A batch that runs out of memory or
fails otherwise is split in half; a prompt that fails alone finishes with its error. So does one
whose logits are not finite; the others of its batch are answered. A lost device is not a prompt's
error and is raised.

Not covered: explicit positions (`generate` gets positions after a gap wrong; they are refused), and
refilling a batch while it runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig as HfGenerationConfig
from transformers import LogitsProcessor, LogitsProcessorList

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.stats import apportion
from gc2ray.engine.decoding.decoder import ROW_ERRORS, Completion, end_reason, not_finite
from gc2ray.engine.decoding.sampler import NOT_FINITE, Repetition, Sampler, row_numbers
from gc2ray.models.base import Prompt

_Item = tuple[int, Prompt, GenerationConfig]


class GenerateDecoder:
    """A `Decoder` on a whole transformers model.

    Args:
        model: The model; only its `generate` is used.
        max_tokens: Tokens of prompt and answer that one batch may hold, padding included.
        eos: Token ids that end an answer.
    """

    def __init__(self, model: Any, *, max_tokens: int, eos: Iterable[int]) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._waiting: list[_Item] = []
        self.oom_splits = self.steps = 0
        self._eos = list(eos)
        pad = model.generation_config.pad_token_id
        self._pad = pad if pad is not None else (self._eos or [0])[0]

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def wants_more(self) -> bool:
        """Whether no prompt waits."""
        return not self._waiting

    def submit(self, tag: int, prompt: Prompt, sampling: GenerationConfig) -> bool:
        """Take a prompt, unless two batches' worth of tokens are waiting already.

        Raises:
            ValueError: The prompt has positions of its own.
        """
        if prompt.positions is not None:
            raise ValueError("stock generate cannot place tokens at positions of their own")
        waiting = sum(_tokens(item) for item in self._waiting)
        item = (tag, prompt, sampling)
        if self._waiting and waiting + _tokens(item) > 2 * self._max_tokens:
            return False
        self._waiting.append(item)
        return True

    def clear_cache(self) -> None:
        """Nothing is kept between two calls of `generate`."""

    def step(self) -> list[Completion]:
        """Generate for the longest waiting prompts that fit one batch."""
        if not self._waiting:
            return []
        self._waiting.sort(key=lambda item: len(item[1]))
        new = max(sampling.max_new_tokens for _, _, sampling in self._waiting)
        rows = max(1, self._max_tokens // (len(self._waiting[-1][1]) + new))
        batch = self._waiting[-rows:]
        del self._waiting[-rows:]
        return self._run_or_split(batch, 0)

    def _run_or_split(self, batch: list[_Item], oom_splits: int) -> list[Completion]:
        """Generate for a batch, or for its halves if it fails.

        Args:
            batch: The prompts.
            oom_splits: How often a batch with them ran out of memory before.
        """
        try:
            return [replace(done, oom_splits=oom_splits) for done in self._run(batch)]
        except torch.AcceleratorError:
            raise
        except ROW_ERRORS as error:
            if len(batch) == 1:
                return [Completion(batch[0][0], (), "error", 0, 0, error, oom_splits=oom_splits)]
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            self.oom_splits += out_of_memory
            oom_splits += out_of_memory
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return [
            *self._run_or_split(batch[:half], oom_splits),
            *self._run_or_split(batch[half:], oom_splits),
        ]

    @torch.inference_mode()
    def _run(self, batch: list[_Item]) -> list[Completion]:
        embeds, mask = _left_padded([prompt.embeds for _, prompt, _ in batch])
        sampler = _RowSampler(
            [sampling for _, _, sampling in batch], [prompt.penalised_ids for _, prompt, _ in batch]
        )
        config = HfGenerationConfig(
            max_new_tokens=max(sampling.max_new_tokens for _, _, sampling in batch),
            do_sample=False,
            eos_token_id=self._eos or None,
            pad_token_id=self._pad,
        )
        started = time.perf_counter_ns()
        with _default_settings(self._model):
            output = self._model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
            )
        output = sampler.marked(output).tolist()
        ended = time.perf_counter_ns()
        self.steps += max(map(len, output))
        ends = [
            self._ended(row, sampling) for row, (_, _, sampling) in zip(output, batch, strict=True)
        ]
        tokens = [row[:length] for row, (length, _) in zip(output, ends, strict=True)]
        prefill = apportion(
            sampler.first_token_ns - started, [len(prompt) for _, prompt, _ in batch]
        )
        generate = apportion(ended - sampler.first_token_ns, [len(row) for row in tokens])
        return [
            _completion(tag, row, reason, before, after)
            for (tag, _, _), row, (_, reason), before, after in zip(
                batch, tokens, ends, prefill, generate, strict=True
            )
        ]

    def _ended(self, row: Sequence[int], sampling: GenerationConfig) -> tuple[int, str]:
        """How many of a row's tokens are its answer, and why the answer ends there."""
        for length in range(1, len(row) + 1):
            reason = end_reason(row[:length], sampling, self._eos)
            if reason is not None:
                return length, reason
        raise RuntimeError(f"generate stopped after {len(row)} tokens, without an end")


class _RowSampler(LogitsProcessor):
    """Chooses each row's tokens with the row's own random numbers, and times the first token.

    `generate` runs greedily; a sampled row's logits are replaced by ones that leave only the chosen
    token. Rows whose logits are not finite are recorded on the device.
    """

    def __init__(
        self, samplings: Sequence[GenerationConfig], prompts: Sequence[tuple[int, ...]]
    ) -> None:
        self.first_token_ns = 0
        self._samplings = samplings
        self._prompts = prompts
        self._penalises = any(sampling.penalty != 1 for sampling in samplings)
        self._repetition: Repetition | None = None
        self._finite: list[Tensor] = []
        self._numbers = [row_numbers(s).tolist() for s in samplings]
        self._step = 0

    def marked(self, output: Tensor) -> Tensor:
        """New tokens (B, T), with `NOT_FINITE` where logits were not finite."""
        finite = torch.stack(self._finite, dim=1)
        return output.where(finite, NOT_FINITE)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.first_token_ns:
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.first_token_ns = time.perf_counter_ns()
        # A row that reached its limit before its batch uses its last number again.
        numbers = [row[min(self._step, len(row) - 1)] for row in self._numbers]
        self._step += 1
        sampler = Sampler.from_samplings(self._samplings, numbers, scores.device)
        scores = self._penalised(input_ids, scores)
        tokens = sampler.tokens(scores)
        self._finite.append(tokens >= 0)
        if len(sampler.rows) == 0:
            return scores
        sampled = tokens[sampler.rows, None].clamp_min(0)
        forced = torch.full_like(scores[sampler.rows], -torch.inf).scatter_(1, sampled, 0)
        return scores.index_copy(0, sampler.rows, forced)

    def _penalised(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with the repetition penalty; `input_ids` are new tokens only."""
        if not self._penalises:
            return scores
        if self._repetition is None:
            rows, vocabulary = scores.shape
            self._repetition = Repetition.none(rows, vocabulary, scores.device)
            self._repetition.load(self._samplings, self._prompts)
        if input_ids.shape[1]:
            self._repetition.add(input_ids[:, -1])
        return self._repetition.applied(scores)


def _completion(tag: int, row: Sequence[int], reason: str, before: int, after: int) -> Completion:
    """A finished row: its answer, or its error."""
    if reason == "error":
        return Completion(tag, (), reason, before, after, not_finite(len(row) - 1))
    return Completion(tag, tuple(row), reason, before, after)


@contextmanager
def _default_settings(model: Any) -> Iterator[None]:
    """Replace the model's generation config, from which `generate` takes settings not given.

    The model's own settings were followed, refused or replaced by the recipe when it was loaded.
    """
    before = model.generation_config
    model.generation_config = HfGenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _tokens(item: _Item) -> int:
    _, prompt, sampling = item
    return len(prompt) + sampling.max_new_tokens


def _left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, D) with zeros in front of shorter prompts, and their mask (B, T)."""
    longest = max(len(prompt) for prompt in prompts)
    embeds = prompts[0].new_zeros(len(prompts), longest, prompts[0].shape[1])
    mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=prompts[0].device)
    for row, prompt in enumerate(prompts):
        embeds[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return embeds, mask
