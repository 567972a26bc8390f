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
from gc2ray.core.config.compression import Newlines, Positions
from gc2ray.core.config.input import ImageLimits
from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import parse_recipe
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.demo.photos import opened_photos
from gc2ray.demo.rows import DemoRow, Split, demo_rows
from gc2ray.engine.engine import Engine
from gc2ray.engine.prompt_builder import load_tiles
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel, ModelAdapter
from gc2ray.models.image_processor import Tiles
from jobs.quality_curve.controls import Blind, ForeignScores
from jobs.support.answering import answers_in_order

NEW_TOKENS = 32
CONTROLS: dict[str, type[Compressor]] = {Blind.name: Blind, ForeignScores.name: ForeignScores}
TEMPERATURE = 10.0
"""The paper's."""
FAR_FROM_UNIFORM = 0.2
BATCH = 100


@dataclass(frozen=True)
class Point:
    """What is measured: a method or control of `CONTROLS`, its settings, and the packing."""

    method: str
    retention: float = 1.0
    temperature: float = TEMPERATURE
    positions: Positions = "compact"
    newlines: Newlines = "kept_rows"


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        point: Where.
        answers: By row.
        tokens: Visual tokens that the language model read a row, newlines included.
    """

    point: Point
    answers: tuple[str, ...]
    tokens: float


@dataclass(frozen=True)
class Data:
    """Rows of a split, and the model that answers them."""

    model: str
    split: Split
    rows: int


def measure_all(data: Data, points: Sequence[Point], processes: int) -> Iterator[Measured]:
    """Measure points in several processes of one thread each, as they finish."""
    if processes == 1:
        workplace = _Workplace(data)
        yield from (workplace.measure(point) for point in points)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _move_in, (data,)) as pool:
        yield from pool.map(_measure, points)


class RememberedViews:
    """An adapter that encodes each row once: points differ in what they keep, not in what they see.

    Rows are told apart by their seed. Everything else is the adapter's own.
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
    """A loaded model and rows; made once in each process."""

    def __init__(self, data: Data) -> None:
        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()
        self._data = data
        loaded = load(data.model)
        self._loaded = replace(loaded, adapter=cast(ModelAdapter, RememberedViews(loaded.adapter)))
        self._rows = list(demo_rows(data.split, data.rows, opened_photos()))

    def measure(self, point: Point) -> Measured:
        answers = answer(self._loaded, self._data.model, self._rows, point)
        tokens = [(a.visual_tokens_kept or 0) + (a.newline_tokens or 0) for a in answers]
        return Measured(point, tuple(a.answer or "" for a in answers), float(np.mean(tokens)))


_here: dict[str, _Workplace] = {}


def _move_in(data: Data) -> None:
    _here["workplace"] = _Workplace(data)


def _measure(point: Point) -> Measured:
    return _here["workplace"].measure(point)


def load(model: str) -> LoadedModel:
    """The model in float32 on the CPU: the curve is about tokens, not about rounding."""
    return loading.load(model, revision=None, dtype="float32", device="cpu")


def answer(loaded: LoadedModel, model: str, rows: Sequence[DemoRow], point: Point) -> list[Answer]:
    """Answers in the order of the rows.

    Raises:
        RuntimeError: A row was not answered.
    """
    control = CONTROLS.get(point.method)
    settings: dict[str, Any] = {
        "method": "none" if control else point.method,
        "retention": point.retention,
        "temperature": point.temperature,
        "positions": point.positions,
        "newlines": point.newlines,
    }
    recipe = parse_recipe(
        {
            "model": {"path": model, "dtype": "float32"},
            "compression": settings,
            "generation": {"max_new_tokens": NEW_TOKENS},
            "input": {"uri": "-", "prompt": {"column": "question"}},
        }
    )
    compressor: Compressor | None = None
    if control is Blind:
        compressor = Blind()
    elif control is ForeignScores:
        compressor = ForeignScores(point.retention, point.temperature)
    engine = Engine(loaded, recipe, Cluster(image_threads=1), compressor)
    requests = [
        Request(row.id, "pocket", place, (ImageRef(row.image),), (row.question.text,))
        for place, row in enumerate(rows)
    ]
    return answers_in_order(engine, requests)


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
