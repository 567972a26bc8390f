"""What decodes: `Decoder`, the owner of the language model, its device and its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gc2ray.records import Sampling
from gc2ray.views import Prompt


@dataclass(frozen=True)
class Completion:
    """A finished prompt.

    Attributes:
        tag: As given to `submit`.
        token_ids: New tokens, the end-of-sequence token included.
        finish_reason: `stop` (end of sequence), `length` (limit), or `error`.
        prefill_ns: This prompt's share of prefill time, by prompt tokens.
        generate_ns: Its share of the time after the first token, by output tokens.
        error: What this prompt raises even alone; there are no tokens then.
    """

    tag: int
    token_ids: tuple[int, ...]
    finish_reason: str
    prefill_ns: int
    generate_ns: int
    error: Exception | None = None


class Decoder(Protocol):
    """Prompt embeddings in, tokens out, in completion order.

    Back-pressure counts tokens, never rows: `submit` answers False when the queue is full, and the
    caller then calls `step`.
    """

    def submit(self, tag: int, prompt: Prompt, sampling: Sampling) -> bool:
        """Take a prompt, or say that there is no room before the next `step`."""

    def step(self) -> list[Completion]:
        """Work until something finishes; empty only when nothing was submitted."""

    def __len__(self) -> int:
        """Prompts that were taken and have not finished."""
