"""Stock transformers on ragged requests: one by one, static batches, continuous batching.

All of them are greedy, write exactly as many tokens as each request wants, and return those tokens
in the order of the requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from jobs.benchmarks.support.ragged import RaggedRequest
from jobs.benchmarks.support.timing import Times

Tokens = list[list[int]]
PAD, NO_EOS = 0, -1
PAGE_TOKENS, BATCH_TOKENS = 256, 512
"""Of continuous batching; more tokens a batch make its mask, which is dense, dearer."""
ANSWER_SECONDS = 600.0
"""Longest wait for an answer of continuous batching, whose thread may have died."""


@torch.inference_mode()
def one_by_one(model: Any, requests: Sequence[RaggedRequest]) -> Tokens:
    """Stock `generate`, request after request."""
    found: Tokens = []
    for request in requests:
        prompt = request.prompt[None]
        output = _generated(model, prompt, torch.ones_like(prompt), request.new_tokens)
        found.append(output[0])
    return found


@dataclass(frozen=True)
class Batches:
    """Stock `generate` over static batches; a batch runs to its longest answer, which is cut.

    Attributes:
        size: Requests of a batch.
        by_length: Whether batches are made of prompts of about one length, not as they come.
    """

    size: int
    by_length: bool

    @property
    def name(self) -> str:
        return f"static batches of {self.size}, {'by length' if self.by_length else 'as they come'}"

    @torch.inference_mode()
    def answer(self, model: Any, requests: Sequence[RaggedRequest]) -> Tokens:
        """The tokens that are wanted."""
        order = list(range(len(requests)))
        if self.by_length:
            order.sort(key=lambda index: len(requests[index].prompt))
        found: Tokens = [[] for _ in requests]
        for first in range(0, len(order), self.size):
            batch = order[first : first + self.size]
            made = _generated_padded(model, [requests[index] for index in batch])
            for index, tokens in zip(batch, made, strict=True):
                found[index] = tokens[: requests[index].new_tokens]
        return found


def _generated_padded(model: Any, requests: Sequence[RaggedRequest]) -> Tokens:
    longest = max(len(request.prompt) for request in requests)
    prompts = torch.full((len(requests), longest), PAD)
    mask = torch.zeros_like(prompts)
    for row, request in enumerate(requests):
        prompts[row, longest - len(request.prompt) :] = request.prompt
        mask[row, longest - len(request.prompt) :] = 1
    return _generated(model, prompts, mask, max(request.new_tokens for request in requests))


def _generated(model: Any, prompts: Any, mask: Any, new_tokens: int) -> Tokens:
    output = model.generate(
        input_ids=prompts, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens
    )
    new: Tokens = output[:, prompts.shape[1] :].tolist()
    return new


def continuous(
    model: Any, requests: Sequence[RaggedRequest], kv_tokens: int
) -> tuple[Tokens, Times]:
    """Transformers' continuous batching, and the seconds it took with its cache in place.

    Raises:
        RuntimeError: An answer did not come.
    """
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it misses psutil
    settings = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=-(-kv_tokens // PAGE_TOKENS),
        max_batch_tokens=BATCH_TOKENS,
        allow_block_sharing=False,  # no two prompts begin alike
        auto_switch_to_flash=False,  # it would look for kernels on the hub
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=NO_EOS, pad_token_id=PAD)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, warmup=False
    ) as manager:
        _answered(manager, [RaggedRequest(requests[0].prompt[:8], 2)])  # its thread has begun
        wall, cpu = time.perf_counter(), time.process_time()
        found = _answered(manager, requests)
        took = Times([time.perf_counter() - wall], [time.process_time() - cpu])
    return found, took


def _answered(manager: Any, requests: Sequence[RaggedRequest]) -> Tokens:
    names = [
        manager.add_request(
            request.prompt.tolist(), max_new_tokens=request.new_tokens, eos_token_id=NO_EOS
        )
        for request in requests
    ]
    found: dict[str, list[int]] = {}
    while len(found) < len(names):
        result = manager.get_result(timeout=ANSWER_SECONDS)
        if result is None or result.error is not None:
            raise RuntimeError(f"continuous batching gave no answer: {result and result.error}")
        if result.is_finished():
            found[result.request_id] = list(result.generated_tokens)
    return [found[name] for name in names]


Answering = Callable[[Any, Sequence[RaggedRequest]], Tokens]
