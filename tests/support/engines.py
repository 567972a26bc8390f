"""Engines on tiny models, whose vision tower may be watched or fail, and rows for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.engine.engine import Engine
from gc2ray.models.adapter import LoadedModel
from tests.support.rows import encoded, make_recipe, picture, request

NEW_TOKENS = 6


def make_engine(loaded: LoadedModel, cluster: Cluster | None = None, **changes: Any) -> Engine:
    settings = {"generation__max_new_tokens": NEW_TOKENS, **changes}
    return Engine(loaded, make_recipe("unused", **settings), cluster or Cluster())


def answers_of(engine: Engine, rows: Iterable[Request]) -> list[Answer]:
    """Answers in order of their rows."""
    return sorted(engine.stream(rows), key=lambda answer: answer.request.row)


def tokens_of(engine: Engine, rows: Iterable[Request]) -> list[tuple[int, ...]]:
    answers = answers_of(engine, rows)
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [answer.token_ids for answer in answers]


class WatchedAdapter:
    """An adapter whose `encode` is watched, or fails, and that may have other limits."""

    def __init__(self, adapter: Any, **changes: Any) -> None:
        self._adapter = adapter
        self.error: Exception | None = None
        self.on_size: tuple[int, int] | None = None
        self.batches: list[int] = []
        self.ns = 0
        vars(self).update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def encode(self, tiles: Any, seeds: Any) -> Any:
        self.batches.append(len(tiles))
        if self.error and (self.on_size is None or self.on_size in [t.size for t in tiles]):
            raise self.error
        started = time.perf_counter_ns()
        views = self._adapter.encode(tiles, seeds)
        self.ns += time.perf_counter_ns() - started
        return views


def with_adapter(loaded: LoadedModel, **changes: Any) -> tuple[LoadedModel, WatchedAdapter]:
    """The model with a watched adapter, and the adapter."""
    adapter = WatchedAdapter(loaded.adapter, **changes)
    return replace(loaded, adapter=adapter), adapter


def mixed_rows() -> list[Request]:
    """Good and bad rows; the number of a row is its index."""
    good = encoded(picture((100, 200), 1))
    images = {
        0: ImageRef(good),
        1: ImageRef(good[: len(good) // 2]),
        2: ImageRef(),
        3: ImageRef(good),
        4: ImageRef(b""),
        5: ImageRef(b"GIF89a" + b"\0" * 40),
        6: ImageRef(path="/etc/passwd"),
        7: ImageRef(encoded(picture((25, 30), 2), "JPEG")),
    }
    fault = BadRow(Status.BAD_PROMPT, "prompt column 'q' is null")
    rows = [replace(request(seed=n), images=(image,)) for n, image in images.items()]
    rows[3] = replace(rows[3], prompts=(), fault=fault)
    return rows


class PatientEngine(Engine):
    """Encodes no part of a batch: it waits until so many rows are at hand."""

    rows = 7

    def _worth_encoding(self, batch: Sequence[Any]) -> bool:
        return len(batch) >= self.rows


def make_patient_engine(loaded: LoadedModel, rows: int, **changes: Any) -> PatientEngine:
    """An engine as `make_engine` makes it, that encodes so many rows at once."""
    settings = {"generation__max_new_tokens": NEW_TOKENS, **changes}
    engine = PatientEngine(loaded, make_recipe("unused", **settings), Cluster())
    engine.rows = rows
    return engine


def rows_of_one_image(seed: int, prompts: Sequence[str]) -> list[Request]:
    """A row for each prompt; all show the same image."""
    return [
        replace(request((40, 300), seed), row=row, row_key=f"rows#{row}", prompts=(prompt,))
        for row, prompt in enumerate(prompts)
    ]


QUESTIONS = ("What is it?", "How many objects are there?", "Which colour is it?", "Describe it.")
