"""Projector and language model: answers to questions about what the tower sees.

Images are packed as stock transformers packs them (`jobs.training.pocket`). No token is ever
dropped in training, but most images' tokens are numbered closer (`jobs.training.positions`). An
image and all questions about it are one sequence (`jobs.training.dialogues`).

The word loss pulls each projected token of a thing towards the embeddings of the words that name
its kind and its colour. Without it the model learns to find a thing by its colour, of which there
are six, but for a long time not by its kind, of which there are 22: every pair of word and feature
has to be found by itself. With it one match serves all of them. In the thumbnail, which alone shows
where in the image a thing lies, tokens are pulled towards the words of its quarter too, and in
crops kept from them. LLaVA's first stage, which aligns features with the word table of a trained
language model (arXiv 2304.08485, section 4.2), does the same.

The reading loss asks the same questions about notes in words that stand where the image stood.
LLaVA's language model could read before it saw; this one has read nothing, and knows things only as
a few tokens among many of background. Where a compressor keeps the things and little else it
answered well and then did not stop ("2 green", "top right 7 7 7").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gc2ray.demo.questions import TOPICS
from gc2ray.demo.scenes import COLOURS, KINDS
from gc2ray.models.processor import Processor
from jobs.training.dialogues import PAD, VISUAL, Dialogue, DialogueMaker, attention_mask, padded
from jobs.training.lessons import Lesson
from jobs.training.pocket import ShownImage
from jobs.training.positions import squeezed_steps
from jobs.training.tower import TowerLearner

WORD_WEIGHT = 0.5
READ_WEIGHT = 0.5
"""Weight of the reading loss, beside the answers'."""
WORD_SCALE = 10.0
"""Cosines times this are the logits of the word loss."""


class LanguageLearner:
    """Later stages; see `jobs.training.trainer.Learner`.

    Args:
        model: The whole model.
        processor: Its processor.
        tower: The first stage, trained.
        tower_share: Learning rate of the tower as a share of the others'; 0 freezes it. Where it
            is not frozen the first stage's loss is kept, so that what stands for the view stays
            informative.
        reads: Whether questions are asked about notes in words too.
    """

    def __init__(
        self,
        model: Any,
        processor: Processor,
        tower: TowerLearner,
        *,
        tower_share: float,
        reads: bool = False,
    ) -> None:
        self._kind_words = _words(processor.tokenizer, KINDS)
        self._colour_words = _words(processor.tokenizer, tuple(COLOURS))
        self._place_words = _words(processor.tokenizer, ("top", "bottom", "left", "right"))
        self._model, self._tower, self._share = model, tower, tower_share
        self._reads = reads
        self._packer = tower.pocket.packer(model, processor)
        self._tokenizer = processor.tokenizer
        self._dialogues = DialogueMaker(processor)
        self._device = model.device
        self._language = self._packer.language()

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self._model, "heads": self._tower.heads}

    def groups(self, rate: float) -> Iterator[dict[str, Any]]:
        yield {"params": list(self._packer.parameters()), "lr": rate}
        if self._share:
            yield from self._tower.groups(rate * self._share)

    def loss(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.set_grad_enabled(bool(self._share) and torch.is_grad_enabled()):
            features, views = self._tower.run(lesson.pixels.to(self._device))
        shown = self._packer.pack(lesson.tiles, lesson.labels, features)
        named, figures = self._word_loss(shown)
        loss = WORD_WEIGHT * named
        if any(lesson.questions):
            dialogues = [
                self._dialogues.make(image.marks, asked, _steps(lesson, place, image.marks))
                for place, (image, asked) in enumerate(zip(shown, lesson.questions, strict=True))
            ]
            visual = torch.cat([image.embeds for image in shown])
            answered, answer_figures = self._language_loss(dialogues, visual)
            figures = {"answers": answered.detach(), **answer_figures, **figures}
            loss = loss + answered
            if self._reads:
                read, read_figures = self._reading_loss(lesson)
                loss = loss + READ_WEIGHT * read
                figures["read"] = read_figures["exact"]
        if self._share:
            seen, tower_figures = self._tower.losses(lesson, features, views)
            loss, figures = loss + seen, {**figures, **tower_figures}
        return loss, figures

    def _reading_loss(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        """The questions about every other image again, with notes in words in its place."""
        dialogues = [
            self._dialogues.make(
                self._tokenizer(self._packer.notes(notes), add_special_tokens=False)["input_ids"],
                asked,
            )
            for notes, asked in list(zip(lesson.notes, lesson.questions, strict=True))[::2]
        ]
        return self._language_loss(dialogues, torch.empty(0, device=self._device))

    def _word_loss(self, images: Sequence[ShownImage]) -> tuple[Tensor, dict[str, Tensor]]:
        """How far visual tokens are from the words that name what they show."""
        kinds = torch.cat([image.kinds for image in images])
        colours = torch.cat([image.colours for image in images])
        tokens = F.normalize(torch.cat([image.embeds for image in images]), dim=-1)
        table = F.normalize(self._model.get_input_embeddings().weight, dim=-1)
        shown, coloured = kinds.any(-1), colours.any(-1)
        kind = WORD_SCALE * tokens[shown] @ table[self._kind_words].T
        colour = WORD_SCALE * tokens[coloured] @ table[self._colour_words].T
        loss = F.cross_entropy(kind, kinds[shown])
        loss = loss + F.cross_entropy(colour, colours[coloured])
        places = WORD_SCALE * tokens[shown] @ table[self._place_words].T
        wanted = torch.cat([image.places for image in images])[shown]
        loss = loss + F.cross_entropy(places[:, :2], wanted[:, :2])
        loss = loss + F.cross_entropy(places[:, 2:], wanted[:, 2:])
        right = kind.argmax(-1) == kinds[shown].argmax(-1)
        return loss, {"words": right.float().mean()}

    def _language_loss(
        self, dialogues: Sequence[Dialogue], visual: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ids = padded([d.ids for d in dialogues], PAD, self._device)
        segments = padded([d.segments for d in dialogues], PAD, self._device)
        positions = padded([d.positions for d in dialogues], 0, self._device)
        targets = padded([d.targets for d in dialogues], PAD, self._device)
        embeds = self._model.get_input_embeddings()(ids.clamp_min(0))
        embeds = embeds.masked_scatter((ids == VISUAL)[..., None], visual)
        state = self._language(
            inputs_embeds=embeds,
            attention_mask=attention_mask(segments),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        asked = targets != PAD
        logits, wanted = self._model.lm_head(state[asked]), targets[asked]
        right = logits.argmax(-1) == wanted
        rows = torch.arange(len(ids), device=self._device)[:, None].expand_as(ids)
        owner = rows[asked] * (1 + int(segments.max())) + segments[asked]
        names = [
            (row, number) for row, d in enumerate(dialogues) for number in range(len(d.topics))
        ]
        wrong = torch.zeros(len(ids) * (1 + int(segments.max())), device=self._device)
        wrong.index_add_(0, owner, (~right).float())
        exact = (wrong.view(len(ids), -1) == 0).float().cpu()
        figures = {"exact": torch.stack([exact[row, n + 1] for row, n in names]).mean()}
        for topic in TOPICS:
            marks = [exact[row, n + 1] for row, n in names if dialogues[row].topics[n] == topic]
            if marks:
                figures[topic] = torch.stack(marks).mean()
        return F.cross_entropy(logits, wanted), figures


def _steps(lesson: Lesson, place: int, marks: Sequence[int]) -> np.ndarray | None:
    """How far each of an image's tokens lies behind the one before; None for 1 each.

    Only visual tokens move closer: markers keep their steps under every method.
    """
    if not lesson.squeezed:
        return None
    steps = np.ones(len(marks), dtype=np.int64)
    visual = np.array(marks) == VISUAL
    steps[visual] = squeezed_steps(int(visual.sum()), lesson.seeds[place])
    return steps


def _words(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The token of each word.

    Raises:
        ValueError: A word is not one token.
    """
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    if any(len(found) != 1 for found in ids):
        raise ValueError("the tokenizer splits a word that things are named by")
    return [found[0] for found in ids]
