"""Dialogues: an image, or notes in its place, and all questions about it as one sequence of tokens.

What is shown comes first, then each question with its answer, which sees what is shown and itself
but no other question, at the positions that it would have alone. So an image costs its tokens once,
however much is asked about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gc2ray.demo.questions import Question
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.processor import Processor

VISUAL, PAD = -1, -2
"""Marks in place of token ids."""
PREFIX = 0
"""Segment of the image and what stands before it; questions count from 1."""


@dataclass
class Dialogue:
    """Tokens of one image and its questions; lists of one length."""

    ids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)

    def add(
        self, ids: Sequence[int], segment: int, positions: Sequence[int], targets: Sequence[int]
    ) -> None:
        """Go on with tokens of a segment, at positions, with what each should say next."""
        self.ids += ids
        self.segments += [segment] * len(ids)
        self.positions += positions
        self.targets += targets


class DialogueMaker:
    """Makes dialogues in the words of a processor's chat template and tokenizer."""

    def __init__(self, processor: Processor) -> None:
        self._chat = ChatPrompt(processor)
        self._tokenizer = processor.tokenizer
        self._image_token = int(processor.image_token_id)
        self._tokens = lru_cache(maxsize=100_000)(self._tokenised)

    def make(
        self, shown: Sequence[int], asked: Sequence[Question], steps: np.ndarray | None = None
    ) -> Dialogue:
        """Questions about what is shown.

        Args:
            shown: Token ids, or `VISUAL`.
            asked: The questions, one at least.
            steps: How far each token of `shown` lies behind the one before; 1 if not given.
        """
        if steps is None:
            steps = np.ones(len(shown), dtype=np.int64)
        dialogue = Dialogue()
        before = self._tokens(asked[0])[0]
        prefix = [*before, *shown]
        positions = [*range(len(before)), *(len(before) - 1 + np.cumsum(steps)).tolist()]
        dialogue.add(prefix, PREFIX, positions, [PAD] * len(prefix))
        first = positions[-1] + 1
        for segment, question in enumerate(asked, start=1):
            _, text, answer = self._tokens(question)
            targets = [*[PAD] * (len(text) - 1), *answer]
            ids = [*text, *answer[:-1]]
            dialogue.add(ids, segment, range(first, first + len(ids)), targets)
            dialogue.topics.append(question.topic)
        return dialogue

    def _tokenised(self, question: Question) -> tuple[list[int], list[int], list[int]]:
        """Before the image; after it; the answer with its end."""
        ids = self._chat.encode(question.text)
        place = ids.index(self._image_token)
        answer = self._tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"]
        return ids[:place], ids[place + 1 :], [*answer, self._tokenizer.eos_token_id]


def padded(lists: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Lists as rows, filled up to the longest, int64 (B, T)."""
    longest = max(map(len, lists))
    rows = [[*row, *[value] * (longest - len(row))] for row in lists]
    return torch.tensor(rows, device=device)


def attention_mask(segments: Tensor) -> Tensor:
    """Who sees whom, bool (B, 1, T, T): the past of the own segment and the prefix; pads see all.

    Args:
        segments: (B, T), `PREFIX`, a question's number, or `PAD`.
    """
    length = segments.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    read, by = segments[:, None, :], segments[:, :, None]
    return (past & ((read == PREFIX) | (read == by)) | (by == PAD))[:, None]
