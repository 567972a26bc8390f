"""`Decoder`: from prompts to tokens. It owns the language model, its device and its KV cache.

The rules that all decoders share are here as well: when an answer ends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.errors import BadRow, Status
from gc2ray.engine.decoding.sampler import NOT_FINITE
from gc2ray.models.base import Prompt

LONGEST_LOOP, LOOP_TOKENS = 64, 16
"""Most tokens that repeat in a loop, and least tokens of all repeats: "7 7 7" is no loop."""
ROW_ERRORS = (RuntimeError, ValueError, IndexError)
"""Errors of a forward that a row may cause; the first covers out of memory."""


@dataclass(frozen=True)
class Completion:
    """A finished prompt.

    Attributes:
        tag: The tag given to `submit`.
        token_ids: New tokens, the end-of-sequence token included.
        finish_reason: `stop` (end of sequence), `length` (limit), `repetition` (the last tokens
            repeat), or `error`.
        prefill_ns: This prompt's share of prefill time, by prompt tokens.
        generate_ns: Its share of the time after the first token, by output tokens.
        error: The error that this prompt raises even alone; there are no tokens then.
        shared: Prompt tokens whose keys and values another prompt had computed.
        oom_splits: How often a batch with this prompt ran out of memory and was split in half.
    """

    tag: int
    token_ids: tuple[int, ...]
    finish_reason: str
    prefill_ns: int
    generate_ns: int
    error: Exception | None = None
    shared: int = 0
    oom_splits: int = 0


class Decoder(Protocol):
    """Prompt embeddings in, tokens out, in completion order.

    Back-pressure counts tokens, never rows: `submit` answers False when the queue is full, and the
    caller then calls `step`.

    Attributes:
        oom_splits: How often a batch ran out of memory and was split in half.
        steps: Forwards so far, each over all prompts that were live.
    """

    oom_splits: int
    steps: int

    def submit(self, tag: int, prompt: Prompt, sampling: GenerationConfig) -> bool:
        """Take a prompt, or return False if `step` has to be called first."""

    def step(self) -> list[Completion]:
        """Do some work, and return the prompts that it finished, if any."""

    @property
    def wants_more(self) -> bool:
        """Whether no prompt waits: then a small batch now is better than a large one later."""

    def clear_cache(self) -> None:
        """Drop what is kept of finished prompts for others that begin alike."""

    def __len__(self) -> int:
        """Prompts that were taken and have not finished."""


def end_tokens(model: Any) -> tuple[int, ...]:
    """Token ids that end an answer of a transformers model."""
    eos = model.generation_config.eos_token_id
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def end_reason(
    tokens: Sequence[int], sampling: GenerationConfig, eos: Collection[int]
) -> str | None:
    """Why an answer ends with the last of its tokens; None if it does not end yet."""
    if tokens[-1] == NOT_FINITE:
        return "error"
    if tokens[-1] in eos or tokens[-1] in sampling.stop_token_ids:
        return "stop"
    if len(tokens) >= sampling.max_new_tokens:
        return "length"
    if sampling.max_repeats is not None and loops(tokens, sampling.max_repeats):
        return "repetition"
    return None


def not_finite(tokens: int) -> BadRow:
    """The error of a row whose logits are not finite after so many tokens of its answer."""
    return overflow("the model's logits", f" after {tokens} tokens of the answer")


def overflow(values: str, place: str = "") -> BadRow:
    """The error of a row in which some values are not finite, in some place."""
    return BadRow(
        Status.FAILED,
        f"{values} are not finite (NaN or infinite){place}: in float16 that is an overflow (set "
        "recipe.model.dtype to bfloat16 or float32), else the weights are damaged",
    )


def loops(tokens: Sequence[int], max_repeats: int) -> bool:
    """Whether the answer ends in a loop: the same tokens more than `max_repeats` times in a row."""
    times = max_repeats + 1
    for period in range(1, min(LONGEST_LOOP, len(tokens) // times) + 1):
        tail = list(tokens[-period * times :])
        if len(tail) >= LOOP_TOKENS and tail == tail[:period] * times:
            return True
    return False
