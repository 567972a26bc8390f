"""Projector and language model: answers to questions about what the tower sees.

Images are packed as stock transformers packs them; no token is ever dropped in training, but most
images' tokens are numbered more closely (`jobs.training.positions`). An image and all questions
about it are one sequence (`jobs.training.dialogues`).

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

from gc2ray.compression.geometry import NEWLINE
from gc2ray.compression.selection import everything
from gc2ray.compression.views import Views
from gc2ray.demo.questions import TOPICS
from gc2ray.demo.scenes import COLOURS, KINDS
from gc2ray.demo.spec import demo_spec
from gc2ray.models.processor import Processor
from gc2ray.models.registry import adapter_of
from jobs.training.dialogues import PAD, VISUAL, Dialogue, DialogueMaker, attention_mask, padded
from jobs.training.labels import NOTHING
from jobs.training.lessons import Lesson
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
            is not frozen the first stage's loss is kept, so that the class token stays informative.
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
        self._adapter = adapter_of(model, processor)
        self._tokenizer = processor.tokenizer
        self._dialogues = DialogueMaker(processor)
        self._device = model.device
        self._language = model.model.language_model

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self._model, "heads": self._tower.heads}

    def groups(self, rate: float) -> Iterator[dict[str, Any]]:
        inner = self._model.model
        parts = (inner.multi_modal_projector, inner.language_model, self._model.lm_head)
        own = [parameter for part in parts for parameter in part.parameters()]
        yield {"params": [inner.image_newline, *own], "lr": rate}
        if self._share:
            yield from self._tower.groups(rate * self._share)

    def loss(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.set_grad_enabled(bool(self._share) and torch.is_grad_enabled()):
            features, class_token = self._tower.run(lesson.pixels.to(self._device))
        packed, sources = self._packed(lesson, features)
        named, figures = self._word_loss(lesson, packed, sources)
        loss = WORD_WEIGHT * named
        if any(lesson.questions):
            dialogues = [
                self._dialogues.make(
                    [VISUAL] * len(image), asked, _steps(lesson, place, len(image))
                )
                for place, (image, asked) in enumerate(zip(packed, lesson.questions, strict=True))
            ]
            answered, answer_figures = self._language_loss(dialogues, torch.cat(packed))
            figures = {"answers": answered.detach(), **answer_figures, **figures}
            loss = loss + answered
            if self._reads:
                read, read_figures = self._reading_loss(lesson)
                loss = loss + READ_WEIGHT * read
                figures["read"] = read_figures["exact"]
        if self._share:
            seen, tower_figures = self._tower.losses(lesson, features, class_token)
            loss, figures = loss + seen, {**figures, **tower_figures}
        return loss, figures

    def _reading_loss(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        """The questions about every other image again, with notes in words in its place."""
        dialogues = [
            self._dialogues.make(
                self._tokenizer(notes, add_special_tokens=False)["input_ids"], asked
            )
            for notes, asked in list(zip(lesson.notes, lesson.questions, strict=True))[::2]
        ]
        nothing = self._model.model.image_newline.new_empty(0)
        return self._language_loss(dialogues, nothing)

    def _word_loss(
        self, lesson: Lesson, packed: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """How far visual tokens are from the words that name what they show."""
        kinds, colours = (
            torch.cat(
                [
                    _taken(getattr(labels, name), source)
                    for labels, source in zip(lesson.labels, sources, strict=True)
                ]
            ).to(self._device)
            for name in ("kinds", "colours")
        )
        tokens = F.normalize(torch.cat(list(packed)), dim=-1)
        table = F.normalize(self._model.get_input_embeddings().weight, dim=-1)
        shown = kinds != NOTHING
        coloured = shown & (colours <= len(COLOURS))  # a sign's digits have no colour
        kind = WORD_SCALE * tokens[shown] @ table[self._kind_words].T
        colour = WORD_SCALE * tokens[coloured] @ table[self._colour_words].T
        loss = F.cross_entropy(kind, kinds[shown] - 1)
        loss = loss + F.cross_entropy(colour, colours[coloured] - 1)
        places = WORD_SCALE * tokens[shown] @ table[self._place_words].T
        wanted = quarters(torch.cat(list(sources)).to(self._device)[shown])
        loss = loss + F.cross_entropy(places[:, :2], wanted[:, :2])
        loss = loss + F.cross_entropy(places[:, 2:], wanted[:, 2:])
        return loss, {"words": (kind.argmax(-1) == kinds[shown] - 1).float().mean()}

    def _packed(self, lesson: Lesson, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Projected visual tokens and newlines of each image, and where they come from."""
        views = [
            Views(
                part.flatten(0, 1),
                part.new_zeros(part.shape[:2]).flatten(),
                self._adapter.family.geometry(tiles.size),
                tiles.size,
            )
            for tiles, part in zip(
                lesson.tiles,
                features.split([len(tiles.pixels) for tiles in lesson.tiles]),  # type: ignore[no-untyped-call]
                strict=True,
            )
        ]
        selections = [everything(view) for view in views]
        return self._adapter.pack(views, selections), [chosen.entries for chosen in selections]

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


def _steps(lesson: Lesson, place: int, count: int) -> np.ndarray | None:
    """How far each of an image's visual tokens lies behind the one before; None for 1 each."""
    return squeezed_steps(count, lesson.seeds[place]) if lesson.squeezed else None


def _words(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The token of each word.

    Raises:
        ValueError: A word is not one token.
    """
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    if any(len(found) != 1 for found in ids):
        raise ValueError("the tokenizer splits a word that things are named by")
    return [found[0] for found in ids]


def quarters(source: Tensor) -> Tensor:
    """Chances of top, bottom, left and right, (K, 4): certain in the thumbnail, even in crops."""
    spec = demo_spec()
    side = spec.image_size // spec.patch_size
    row, column = source % side**2 // side, source % side
    lower, right = (row >= side // 2).float(), (column >= side // 2).float()
    wanted = torch.stack([1 - lower, lower, 1 - right, right], dim=1)
    return wanted.where((source < side**2)[:, None], torch.full_like(wanted, 0.5))


def _taken(labels: np.ndarray, source: Tensor) -> Tensor:
    """Labels (V, N) of emitted tokens (K,); newlines show nothing."""
    taken = torch.from_numpy(labels).flatten()[source.clamp_min(0).long().cpu()]
    return taken.masked_fill(source.cpu() == NEWLINE, NOTHING)
