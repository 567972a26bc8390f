"""One point of a curve: a method at a retention, over the same rows as every other point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, cast

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from gc2ray.compression.base import Compressor, ViewBatch
from gc2ray.compression.methods.globalcom2 import crop_scales
from gc2ray.compression.views import Views
from gc2ray.core.config.compression import Budget, Markers, Newlines, Positions, Score
from gc2ray.core.config.generation import TakenOver
from gc2ray.core.config.input import ImageLimits
from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import Recipe, parse_recipe
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.demo.photos import opened_photos
from gc2ray.demo.rows import DemoRow, Split, demo_rows
from gc2ray.engine.engine import Engine
from gc2ray.engine.prompt_builder import load_tiles
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel, ModelAdapter
from gc2ray.models.image_processor import Tiles
from jobs.quality_curve import downsample
from jobs.quality_curve.controls import Blind, ForeignScores
from jobs.quality_curve.models import DemoModel
from jobs.quality_curve.several import RowWithImages, rows_with_images
from jobs.support.answering import answers_in_order

NEW_TOKENS = 32
CONTROLS: dict[str, type[Compressor]] = {Blind.name: Blind, ForeignScores.name: ForeignScores}
TEMPERATURE = 10.0
"""The paper's."""
FAR_FROM_UNIFORM = 0.2
BATCH = 100


@dataclass(frozen=True)
class Point:
    """What is measured: a method, `downsample` or a control of `CONTROLS`, and its settings.

    Where `score` is None it is the model's default. A row shows so many `images`
    (`jobs.quality_curve.several`), which have budgets of their own or share one.
    """

    method: str
    retention: float = 1.0
    temperature: float = TEMPERATURE
    positions: Positions = "compact"
    newlines: Newlines = "kept_rows"
    markers: Markers = "all"
    score: Score | None = None
    images: int = 1
    budget: Budget = "image"


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        point: Where.
        answers: By row, of those that are answered with the point's number of images.
        tokens: Visual tokens that the language model read a row, newlines included.
        prompt_tokens: All that it read: with markers, and the question.
        fitting: Share of rows with no more visual tokens than the retention allows.
    """

    point: Point
    answers: tuple[str, ...]
    tokens: float
    prompt_tokens: float = 0.0
    fitting: float = 1.0


@dataclass(frozen=True)
class Data:
    """Rows of a split, and the model that answers them."""

    model: DemoModel
    split: Split
    rows: int


def measure_all(data: Data, points: Sequence[Point], processes: int) -> Iterator[Measured]:
    """Measure points in several processes of one thread each, as they finish.

    Points of one score should follow each other: images are encoded again for each.
    """
    if processes == 1:
        workplace = _Workplace(data)
        yield from (workplace.measure(point) for point in points)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _move_in, (data,)) as pool:
        yield from pool.map(_measure, points)


class RememberedViews:
    """An adapter that encodes each image once: points differ in what they keep, not what they see.

    Images are told apart by their seed. Everything else is the adapter's own.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._views: dict[int, Views] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def encode(self, tiles: Sequence[Tiles], seeds: Sequence[int]) -> list[Views]:
        """Views as the adapter makes them; from memory where the seed is known."""
        new = [place for place, seed in enumerate(seeds) if seed not in self._views]
        if new:
            made = self._adapter.encode([tiles[i] for i in new], [seeds[i] for i in new])
            self._views |= {seeds[place]: view for place, view in zip(new, made, strict=True)}
        return [self._views[seed] for seed in seeds]


class _Workplace:
    """Rows, and the model with one score after the other; made once in each process."""

    def __init__(self, data: Data) -> None:
        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()
        self._data = data
        self._rows = list(demo_rows(data.split, data.rows, opened_photos()))
        self._take(None)

    def _take(self, score: Score | None) -> None:
        self._score = score
        self._loaded = load(str(self._data.model.directory), score)
        adapter = cast(ModelAdapter, RememberedViews(self._loaded.adapter))
        self._remembering = replace(self._loaded, adapter=adapter)

    def measure(self, point: Point) -> Measured:
        if point.score != self._score:
            self._take(point.score)
        # What is remembered of an image would be taken for the smaller one.
        smaller = point.method == downsample.NAME
        loaded = self._loaded if smaller else self._remembering
        rows = rows_with_images(self._rows, point.images)
        answers = answer(loaded, str(self._data.model.directory), self._rows, point)
        visual = np.array([a.visual_tokens_kept or 0 for a in answers])
        newlines = np.array([a.newline_tokens or 0 for a in answers])
        family = self._loaded.adapter.family
        full = np.array(
            [sum(family.geometry(s.scene.size).visual_tokens for s in row.images) for row in rows]
        )
        return Measured(
            point,
            tuple(a.answer or "" for a in answers),
            tokens=float((visual + newlines).mean()),
            prompt_tokens=float(np.mean([a.prompt_tokens or 0 for a in answers])),
            fitting=float((visual <= point.retention * full).mean()),
        )


_here: dict[str, _Workplace] = {}


def _move_in(data: Data) -> None:
    _here["workplace"] = _Workplace(data)


def _measure(point: Point) -> Measured:
    return _here["workplace"].measure(point)


def load(model: str, score: Score | None = None) -> LoadedModel:
    """The model in float32 on the CPU: the curve is about tokens, not about rounding."""
    taken_over = TakenOver(score=score)
    return loading.load(model, revision=None, dtype="float32", device="cpu", taken_over=taken_over)


def answer(loaded: LoadedModel, model: str, rows: Sequence[DemoRow], point: Point) -> list[Answer]:
    """Answers in the order of the rows that are answered with the point's number of images.

    Raises:
        RuntimeError: A row was not answered.
    """
    requests = [
        Request(asked.row.id, "pocket", place, _images(asked), (asked.row.question.text,))
        for place, asked in enumerate(rows_with_images(rows, point.images))
    ]
    recipe, compressor = _recipe(model, point), _control(point)

    def answered(loaded: LoadedModel, requests: Sequence[Request]) -> list[Answer]:
        engine = Engine(loaded, recipe, Cluster(image_threads=1), compressor)
        return answers_in_order(engine, requests)

    if point.method == downsample.NAME:
        return downsample.answers(loaded, requests, point.retention, answered)
    return answered(loaded, requests)


def _images(asked: RowWithImages) -> tuple[ImageRef, ...]:
    return tuple(ImageRef(shown.image) for shown in asked.images)


def _recipe(model: str, point: Point) -> Recipe:
    """The recipe of a point; controls replace its method."""
    settings: dict[str, Any] = {
        "method": "none" if point.method in {downsample.NAME, *CONTROLS} else point.method,
        "retention": point.retention,
        "temperature": point.temperature,
        "positions": point.positions,
        "newlines": point.newlines,
        "markers": point.markers,
        "score": point.score,
        "budget": point.budget,
    }
    return parse_recipe(
        {
            "model": {"path": model, "dtype": "float32"},
            "compression": settings,
            "generation": {"max_new_tokens": NEW_TOKENS},
            "input": {"uri": "-", "prompt": {"column": "question"}},
        }
    )


def _control(point: Point) -> Compressor | None:
    control = CONTROLS.get(point.method)
    if control is Blind:
        return Blind()
    return ForeignScores(point.retention, point.temperature) if control else None


@torch.inference_mode()
def shares_far_from_uniform(
    loaded: LoadedModel, rows: Sequence[DemoRow], retention: float, temperatures: Sequence[float]
) -> dict[float, float]:
    """The share, by temperature, of crops whose budget is more than a fifth off the retention.

    Where it is 0 the commander commands nothing, and GlobalCom² is not being tested.
    """
    far: dict[float, list[bool]] = {temperature: [] for temperature in temperatures}
    for first in range(0, len(rows), BATCH):
        refs = [ImageRef(row.image) for row in rows[first : first + BATCH]]
        tiles = [load_tiles(ref, loaded.adapter.family.cropping, ImageLimits()) for ref in refs]
        batch = ViewBatch.from_images(loaded.adapter.encode(tiles, [0] * len(tiles)))
        for temperature, found in far.items():
            scales = crop_scales(batch, retention, temperature)
            found += ((scales / retention - 1).abs() > FAR_FROM_UNIFORM).tolist()
    return {temperature: float(np.mean(found)) for temperature, found in far.items()}
