"""Batches of scenes: batch number in, tensors out, so that a run can stop and resume anywhere.

Every scene of training is drawn once, from the seed (split, stage, batch, place in it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gc2ray.demo.photos import opened_photos
from gc2ray.demo.questions import TOPICS, Question, quarter
from gc2ray.demo.rows import Split, picture
from gc2ray.demo.scenes import Scene, Style, sample_scene
from gc2ray.demo.spec import GRIDS, demo_anyres
from gc2ray.models.image_processor import Tiles
from jobs.training.labels import ViewLabels, view_labels
from jobs.training.pocket import Cutter

CROWDED_SHARE = 0.75
"""Share of the tower's scenes that are crowded; the others are as full as rows of a data set."""
ASKED = Style(things=(0.2, 0.25, 0.3, 0.25), sign=0.7)
"""Scenes that questions are asked about: a little fuller than the rows of a data set, and with more
signs, about which there is one question only."""
WEIGHTS = {
    "which": 0.3, "colour": 1.5, "where": 1.5, "count": 0.3, "sign": 0.7, "yesno": 2.5,
    "caption": 2.0,
}  # fmt: skip
"""How readily a question is asked: what is learned soon is asked less."""


TERSE = 0.5
"""Of the notes."""


@dataclass(frozen=True)
class Lesson:
    """A batch of scenes.

    Attributes:
        tiles: The images, cut.
        labels: What is to be seen.
        questions: Questions of each image.
        seeds: Seeds of what is left to chance behind the pictures, by image.
        notes: What is to be seen, in words, by image.
        squeezed: Whether positions are (`jobs.training.positions`); they are not in validation.
    """

    tiles: tuple[Tiles, ...]
    labels: tuple[ViewLabels, ...]
    questions: tuple[tuple[Question, ...], ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...]
    squeezed: bool

    @cached_property
    def pixels(self) -> Tensor:
        """All views, uint8 (sum of V, T, T, 3)."""
        return torch.from_numpy(np.concatenate([tiles.pixels for tiles in self.tiles]))

    def label(self, name: str) -> Tensor:
        """One of the labels of all views."""
        return torch.from_numpy(np.concatenate([getattr(item, name) for item in self.labels]))


class Lessons(Dataset[Lesson]):
    """Batch number to `Lesson`.

    Args:
        cutter: Cuts pictures into the model's views.
        split: Whose seeds.
        stage: A number of its own for each stage of training.
        scenes: In a batch; for a stage with questions, all of one grid, so that they pad little.
        questions: RowWithImages about a scene at most; 0 for a stage without them.
        share: Number of this process, and of all processes that take a part of each batch.
    """

    def __init__(
        self,
        cutter: Cutter,
        split: Split,
        stage: int,
        scenes: int,
        questions: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._cutter = cutter
        self._split, self._stage = split, stage
        self._places, self._questions = range(share[0], scenes, share[1]), questions
        self._anyres = demo_anyres()
        self._photographs = opened_photos()

    def __getitem__(self, batch: int) -> Lesson:
        tiles, labels, questions, seeds, notes = [], [], [], [], []
        for place in self._places:
            rng = np.random.default_rng([self._split.value, self._stage, batch, place])
            scene = self._scene(rng, batch, place)
            tiles.append(self._cutter.cut(picture(scene, self._photographs)))
            labels.append(view_labels(scene, self._cutter))
            questions.append(self._asked(scene, rng))
            seeds.append(int(rng.integers(2**31)))
            notes.append(noted(scene, rng))
        return Lesson(
            tuple(tiles),
            tuple(labels),
            tuple(questions),
            tuple(seeds),
            tuple(notes),
            squeezed=self._split is Split.TRAIN,
        )

    def _scene(self, rng: np.random.Generator, batch: int, place: int) -> Scene:
        if self._questions:
            grid = GRIDS[batch % len(GRIDS)]
            return sample_scene(rng, self._anyres, grid, ASKED)
        grid = GRIDS[place % len(GRIDS)]
        style = Style()
        if rng.random() < CROWDED_SHARE:
            most = 3 * grid[0] * grid[1]
            style = Style(things=(1 / most,) * most, sign=0.6, rich=0.2, distinct=False)
        return sample_scene(rng, self._anyres, grid, style)

    def _asked(self, scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
        if not self._questions:
            return ()
        asked = [question for ask in TOPICS.values() for question in ask(scene)]
        weights = np.array([WEIGHTS[question.topic] for question in asked])
        size = min(self._questions, len(asked))
        chosen = rng.choice(len(asked), size, replace=False, p=weights / weights.sum())
        return tuple(asked[int(index)] for index in chosen)


def noted(scene: Scene, rng: np.random.Generator) -> str:
    """A scene in words: every thing one to three times, once with its place, in any order.

    Half of the notes are terse, without articles and commas.
    """
    article, comma = ("", " ") if rng.random() < TERSE else ("a ", ", ")
    mentions = [] if scene.sign is None else [f"{article}sign with {scene.sign.text}"]
    for thing in scene.things:
        name = f"{article}{thing.colour} {thing.kind}"
        mentions += [f"{name} {quarter(scene, thing)}", *[name] * int(rng.integers(3))]
    rng.shuffle(mentions)
    return comma.join(mentions)


def lesson_loader(lessons: Lessons, first: int, stop: int, workers: int) -> DataLoader[Lesson]:
    """Lessons `first` to `stop`, drawn by other processes a little ahead."""
    return DataLoader(
        lessons, batch_size=None, sampler=range(first, stop), num_workers=workers,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
